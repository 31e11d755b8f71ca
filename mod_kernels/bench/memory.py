"""How much memory a call holds over its time, as PyTorch's CPU allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Timeline:
    """``points``: (share of the call's time, MiB held beyond what was held before it), each a change; ``peak_mib``
    is the largest of all, also of those that ``points`` leaves out.
    """

    peak_mib: float
    points: list[tuple[float, float]]


def timeline(call: Callable[[], object], points: int = 400) -> Timeline:
    """Record ``call``: every allocation and release of tensors, in order; not what libraries take for themselves.

    The profiler slows the call down, so that its time is no measure of its speed. Of the changes at most some
    ``points`` are kept, those at each part's peak.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held, changes = 0, []
    for event in events:
        held += event.nbytes()
        changes.append((event.start_ns(), held / MIB))
    if not changes:
        return Timeline(0.0, [])
    start, length = changes[0][0], max(1, changes[-1][0] - changes[0][0])
    part = -(-len(changes) // points)
    kept = [max(changes[at : at + part], key=lambda change: change[1]) for at in range(0, len(changes), part)]
    peak = max(held for _, held in changes)
    return Timeline(round(peak, 2), [(round((at - start) / length, 4), round(held, 2)) for at, held in kept])

"""Interleaved timing: rounds over all providers of a cell, so that drift of the machine falls on all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# A CPU sample lasts at least this long; below, the clock and the loop around the calls show.
MIN_SAMPLE_S = 1e-3
# Calls in a sample, at most: an in-place block runs that often on one buffer before it is refilled.
MAX_REPEATS = 200
# Two warm-up times this close to each other count as steady.
STEADY = 0.1


@dataclass
class Timed:
    """One provider in a cell. ``prepare`` runs before every sample, outside the clock (refills a buffer)."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    repeats: int = 1
    samples: list[float] = field(default_factory=list)  # seconds per call

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile in milliseconds."""
        values = torch.tensor(self.samples, dtype=torch.float64) * 1e3
        low, median, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return low, median, high


class CpuClock:
    """Wall clock around ``repeats`` calls."""

    def sample(self, timed: Timed) -> float:
        timed.prepare()
        timed.call()  # untimed: what prepare touched must not be what the first call finds
        call, repeats = timed.call, timed.repeats
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def calibrate(self, timed: Timed) -> None:
        """Warm up to steady state, then choose the repeats that fill MIN_SAMPLE_S."""
        before = float("inf")
        for _ in range(10):
            now = self.sample(timed)
            timed.repeats = min(MAX_REPEATS, max(1, round(MIN_SAMPLE_S / now + 0.5)))
            if abs(now - before) <= STEADY * now:
                return
            before = now


class GpuClock:
    """CUDA events around one call with a cold L2, or around ``repeats`` calls with a warm one."""

    def __init__(self, cold: bool) -> None:
        self.cold = cold
        # Twice the L2: written before each cold sample. Also keeps the GPU busy while the call is queued, so
        # that the events do not see Python unless the call is slower to queue than this is to run.
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(size, 64 << 20), dtype=torch.int8, device="cuda")

    def sample(self, timed: Timed) -> float:
        timed.prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        repeats = 1 if self.cold else timed.repeats
        if not self.cold:
            timed.call()
        self._flush.zero_() if self.cold else torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            timed.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    def calibrate(self, timed: Timed) -> None:
        for _ in range(3):
            now = self.sample(timed)
            timed.repeats = min(MAX_REPEATS, max(1, round(MIN_SAMPLE_S / now + 0.5)))


def measure(
    providers: list[Timed],
    clock: CpuClock | GpuClock,
    rounds: int,
    budget_s: float = float("inf"),
    on_round: Callable[[int], None] = lambda done: None,
) -> int:
    """Fill every provider's samples: ``rounds`` rounds in a new order each; returns the rounds done.

    ``budget_s`` ends it early, after at least five rounds: cells of a second a call would never end.
    """
    order = list(providers)
    start, shuffle = time.monotonic(), random.Random(0).shuffle
    with torch.inference_mode():
        for timed in providers:
            clock.calibrate(timed)
        for done in range(1, rounds + 1):
            shuffle(order)
            for timed in order:
                timed.samples.append(clock.sample(timed))
            on_round(done)
            if done >= 5 and time.monotonic() - start > budget_s:
                return done
    return rounds

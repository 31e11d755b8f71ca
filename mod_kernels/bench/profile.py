"""Where a network's time goes: ``torch.profiler`` on plain and fused, summed up by the parts of a MoD block.

On a CPU a part's time is the wall time of its ranges. On a GPU it is that of the kernels launched in them, and the
time in which the GPU waits for Python is in no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function, schedule
from torch.profiler import profile as profiler

from .. import plain
from ..backends import use_backend
from ..nn import MoDBlock
from . import paper
from .cells import OnCell, run_cells
from .networks import PlainBlock, build, compare
from .providers import same_arithmetic
from .store import Results, Row
from .timing import CpuClock, GpuClock, Timed, measure

SUITE, KIND = "profile", "part"
PLAIN, FUSED = "plain", "fused"
STEPS = ("pool", "selector", "top-k", "gather", "conv", "scale", "add", "copies")
DISPATCH = "dispatch"  # a plain block's wall time that is in no step
BLOCK, OTHER = "MoD block", "other blocks"
# By the endings of plain.mod_block, what networks.build calls the network.
FORMS = {"clone": "plain", "cat": "plain-cat", "inplace": "plain-inplace"}
PREFIX = "mod_kernels::"  # of every range, as a trace shows it
UNPROFILED_S = 60.0  # without the profiler, at most


@dataclass(frozen=True)
class Cell:
    """``threads`` is None on a GPU; ``form`` is of FORMS."""

    name: str
    batch: int
    threads: int | None
    device: str
    dtype: torch.dtype
    form: str

    def __str__(self) -> str:
        where = self.device if self.threads is None else f"{self.threads} thread(s)"
        return f"{self.name} N={self.batch} {where} {self.form}"


def run(cell: Cell, results: Results, on_cell: OnCell, repeats: int, trace: Path | None = None) -> None:
    """Profile a network into ``results``; ``trace`` is for the Chrome trace of a forward of each.

    Raises:
        ValueError: a name that :func:`mod_kernels.models.list_models` does not have.
        OSError: the trace can't be written.
    """
    run_cells([cell], results, on_cell, partial(_run_cell, results=results, repeats=repeats, trace=trace))


def _run_cell(cell: Cell, results: Results, repeats: int, trace: Path | None) -> list[Row]:
    data = paper.data_of(cell.name)
    built = build(cell.name, cell.device, cell.dtype, **data.options)
    models = {PLAIN: built[FORMS[cell.form]], FUSED: built["fused"]}
    generator = torch.Generator().manual_seed(1)
    image = torch.randn((cell.batch, 3, data.size, data.size), generator=generator).to(cell.device, cell.dtype)
    timed = [Timed(name, partial(model, image)) for name, model in models.items()]
    with torch.inference_mode(), same_arithmetic():
        with use_backend("reference"):
            expected = models[FUSED](image)
        checks = {name: compare(model(image), expected, cell.dtype) for name, model in models.items()}
        clock = CpuClock() if cell.device == "cpu" else GpuClock(cold=False)
        measure(timed, clock, repeats, UNPROFILED_S)
        with in_ranges(models):
            profiled = profile(models, image, repeats)
            if trace is not None:
                profile(models, image, 1).export_chrome_trace(str(trace))
    forwards = {name: forwards_of(name, profiled.events(), cell.device) for name in models}
    results.networks[cell.name] = {
        "form": cell.form,
        "unprofiled_ms": {one.name: one.quartiles()[1] for one in timed if checks[one.name] == "ok"},
        "blocks": len(forwards[PLAIN][0].calls),
        # Of one block: kernels on a GPU, on a CPU ops that Python calls.
        "calls": {name: sum(found[0].calls) / len(found[0].calls) for name, found in forwards.items()},
    }
    dtype = str(cell.dtype).removeprefix("torch.")
    rows = []
    for name, found in forwards.items():
        for part in found[0].parts_ms:
            cached = (KIND, cell.batch, cell.threads, cell.device, dtype, "eager", "warm")
            times = {} if checks[name] != "ok" else _times([one.parts_ms[part] for one in found])
            rows.append(Row(cell.name, *cached, f"{name}/{part}", checks[name], **times))
    return rows


def _times(parts_ms: list[float]) -> dict[str, Any]:
    low, median, high = Timed("", lambda: None, samples=[one * 1e-3 for one in parts_ms]).quartiles()
    return {"median_ms": median, "q1_ms": low, "q3_ms": high, "samples": len(parts_ms), "repeats": 1}


def profile(models: dict[str, nn.Module], image: Tensor, repeats: int) -> profiler:
    """The models in turn, ``repeats`` times, each forward a range of its own; one round before is not recorded."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * image.is_cuda
    plan = schedule(wait=0, warmup=1, active=repeats, repeat=1)
    with profiler(activities=activities, schedule=plan) as recorded:
        for _ in range(1 + repeats):
            for name, model in models.items():
                with record_function(PREFIX + name):
                    model(image)
                if image.is_cuda:
                    torch.cuda.synchronize()
            recorded.step()
    return recorded


def stepped(block: PlainBlock, x: Tensor) -> Tensor:
    """:func:`mod_kernels.plain.mod_block` at position ``"first"``, bit for bit, each step in a range of its own.

    A copy of it: the baseline of every benchmark is not to pay for ranges.
    """
    k, fc1, fc2 = block.k, block.selector.fc1, block.selector.fc2
    with _step("pool"):
        pooled = x.mean((2, 3))
    with _step("selector"):
        hidden = F.relu(F.linear(pooled, fc1.weight, fc1.bias))
        scores = torch.sigmoid(F.linear(hidden, fc2.weight, fc2.bias))
    with _step("top-k"):
        scores, index = torch.topk(scores, k, dim=1)
    with _step("gather"):
        gathered = plain.gather_channels(x, index)
    with _step("conv"):
        z = block.conv_block(gathered)
    with _step("scale"):
        scaled = scores[:, :, None, None].to(z.dtype) * z
    if block.ending == "cat":
        with _step("add"):
            added = x[:, :k] + scaled
        with _step("copies"):
            return torch.cat((added, x[:, k:]), dim=1)
    y = x
    if block.ending == "clone":
        with _step("copies"):
            y = x.clone()
    with _step("add"):
        y[:, :k] += scaled
    return y


def _step(name: str) -> record_function:
    return record_function(PREFIX + name)


@contextmanager
def in_ranges(models: dict[str, nn.Module]) -> Iterator[None]:
    """Within, every MoD block is a range, and a plain one's steps are ranges in it.

    By the call of the classes: a stage passes means on to a MoDBlock itself only, and to none that has a hook or
    a forward of its own.
    """
    call = nn.Module.__call__
    blocks = [block for block in models[PLAIN].modules() if isinstance(block, PlainBlock)]

    def called(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        with _step(BLOCK):
            return call(self, *arguments, **named)

    PlainBlock.__call__ = MoDBlock.__call__ = called
    for block in blocks:
        block.forward = partial(stepped, block)
    try:
        yield
    finally:
        del PlainBlock.__call__, MoDBlock.__call__
        for block in blocks:
            del block.forward


@dataclass
class Forward:
    """One forward: ms by part, and how many calls each of its MoD blocks made (kernels on a GPU, ops on a CPU)."""

    parts_ms: dict[str, float]
    calls: list[int]


def forwards_of(name: str, events: list[Any], device: str) -> list[Forward]:
    """Of the network ``name``, PLAIN or FUSED, from the profiler's events."""
    ms, calls = (_wall_ms, _ops) if device == "cpu" else (_kernels_ms, lambda event: len(_kernels(event)))
    forwards = []
    for forward in events:
        if forward.name != PREFIX + name or forward.device_type != torch.autograd.DeviceType.CPU:
            continue  # a GPU's timeline has the same ranges again
        blocks = [event for event in _inside(forward) if event.name == PREFIX + BLOCK]
        in_blocks = sum(map(ms, blocks))
        parts = _steps_ms(blocks, ms) if name == PLAIN else {BLOCK: in_blocks}
        if name == PLAIN and device == "cpu":  # on a GPU every kernel is in a step
            parts[DISPATCH] = in_blocks - sum(parts.values())
        parts[OTHER] = ms(forward) - in_blocks
        forwards.append(Forward(parts, list(map(calls, blocks))))
    return forwards


def _steps_ms(blocks: list[Any], ms: Callable[[Any], float]) -> dict[str, float]:
    parts = dict.fromkeys(STEPS, 0.0)
    for block in blocks:
        for event in block.cpu_children:
            if event.name.startswith(PREFIX):
                parts[event.name.removeprefix(PREFIX)] += ms(event)
    return parts


def _inside(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _inside(child)


def _wall_ms(event: Any) -> float:
    return event.time_range.elapsed_us() * 1e-3


def _ops(event: Any) -> int:
    """How many ops Python called in a range: not those that ops call."""
    children = event.cpu_children
    return sum(_ops(child) if child.name.startswith(PREFIX) else 1 for child in children)


def _kernels(event: Any) -> list[Any]:
    """All that the GPU ran for a range. The lists may hold the GPU's own ranges as well, which are no kernels."""
    found = [kernel for one in (event, *_inside(event)) for kernel in one.kernels]
    return [kernel for kernel in found if not kernel.name.startswith(PREFIX)]


def _kernels_ms(event: Any) -> float:
    return sum(kernel.duration for kernel in _kernels(event)) * 1e-3

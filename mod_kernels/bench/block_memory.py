"""The memory that a call of a block takes at its peak, beyond what was held before it; no times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from . import blocks, providers, training
from .cells import OnCell, run_cells
from .check import check, exact_logits
from .memory import MIB, timeline
from .networks import PlainBlock
from .providers import ENGINES, IN_PLACE, PLAIN, Provider, Unavailable
from .shapes import BOTTLENECK, Shape, make_spec, make_x
from .store import Results, Row

EAGER, TRAIN = "eager", "train"


@dataclass(frozen=True)
class Cell(blocks.Cell):
    """A block's cell whose label says the mode: "eager", or "train" for forward and backward."""

    def __str__(self) -> str:
        where = "" if self.threads is None else f" {self.threads} thread(s)"
        return f"{self.shape.name} N={self.batch} {self.mode}{where}"


def run(
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    results: Results,
    on_cell: OnCell,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    shapes: tuple[Shape, ...] = BOTTLENECK,
) -> None:
    """Measure blocks in inference and in training into ``results``; ``threads`` is ignored on a GPU."""
    counts = threads if device == "cpu" else (None,)
    planned = [
        Cell(shape, batch, count, mode)
        for shape in shapes
        for batch in batches
        for count in counts
        for mode in (EAGER, TRAIN)
    ]
    run_cells(planned, results, on_cell, lambda cell: run_cell(cell, device, dtype))


def run_cell(cell: Cell, device: str, dtype: torch.dtype) -> list[Row]:
    """Check every provider of one cell, then take the peak of a second call."""
    rows = []
    candidates = _training if cell.mode == TRAIN else _inference
    engine, short = ENGINES[device], str(dtype).removeprefix("torch.")
    with backends.use_backend(engine), providers.same_arithmetic():
        for name, said, call in candidates(cell, device, dtype):
            peak = peak_mib(call, device) if said == "ok" else None
            where = (cell.batch, cell.threads, device, short, cell.mode, cell.cache)
            rows.append(Row(cell.shape.name, cell.shape.kind, *where, name, said, peak_mib=peak))
    return rows


def peak_mib(call: Callable[[], object], device: str) -> float:
    """What PyTorch's allocator of ``device`` holds at the peak of ``call`` beyond what it held before."""
    if device == "cpu":
        return timeline(call).peak_mib
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 2)


# Of each provider its name, a row's check, and a call; one after the other, for each holds memory of its own.
Candidates = Iterator[tuple[str, str, Callable[[], object]]]


def _inference(cell: Cell, device: str, dtype: torch.dtype) -> Candidates:
    engine, spec = ENGINES[device], make_spec(cell.shape, dtype, device)
    x = make_x(cell.shape, cell.batch, spec)
    logits = exact_logits(x, spec)

    def candidate(provider: Provider, ours: bool) -> tuple[str, str, Callable[[], object]]:
        problem = check(provider, x, spec, logits, ours)
        given = x.clone() if provider.in_place else x

        def call() -> None:
            with torch.inference_mode():
                provider.run(given)

        return provider.name, f"wrong: {problem}" if problem else "ok", call

    for name in PLAIN:
        yield candidate(providers.plain_provider(name.removeprefix("plain-"), spec), ours=False)
    for ending in ("", IN_PLACE):
        try:
            provider = providers.engine_provider(engine, spec, ending != "", x)
        except Unavailable as reason:
            yield engine + ending, f"left out: {reason}", lambda: None
        else:
            yield candidate(provider, ours=True)


def _training(cell: Cell, device: str, dtype: torch.dtype) -> Candidates:
    """Gradients of x and of all weights, from x as an op before the block left it."""
    engine, block = ENGINES[device], training.make_block(cell.shape, dtype).to(device)
    modules = {name: PlainBlock(block, name.removeprefix("plain-")) for name in PLAIN}
    modules[engine] = block  # with overwrite_input it takes as much: where there are gradients it writes elsewhere
    x, dy = (_random(cell, device, dtype, seed) for seed in (1, 2))
    exact = PlainBlock(copy.deepcopy(block).double(), "clone")
    expected = _on("reference", training.Step(exact, x.double(), dy.double()))()
    for name, module in modules.items():
        step = training.Step(module, x, dy)
        call = _on(engine if name == engine else "reference", step)
        try:
            problem = training._problem(call(), expected, dtype)
        except RuntimeError as error:
            # Autograd's own refusal (torch.gather has saved what the in-place form overwrites), or our engine's.
            yield name, f"left out: {str(error).partition(':')[0]}", call
            continue
        step.refill()
        yield name, f"wrong: {problem}" if problem else "ok", call


def _on(backend: str, step: training.Step) -> Callable[[], tuple[Tensor, ...]]:
    """The step on one backend: what is plain, or expected, must not have its conv block trained by an engine."""

    def call() -> tuple[Tensor, ...]:
        with backends.use_backend(backend):
            return step.run()

    return call


def _random(cell: Cell, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    size = (cell.batch, cell.shape.channels, cell.shape.height, cell.shape.width)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

"""The block benchmark: cells of shape, batch and threads; in each, all providers checked, then interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends
from .._layout import NCHW
from . import providers
from .check import check, exact_logits
from .compiled import Compiler, LeftOut, Limit
from .providers import COMPILE, FED, IN_PLACE, MAX_AUTOTUNE, PLAIN, Provider, Unavailable
from .shapes import BASIC, BATCHES, BOTTLENECK, Shape, make_spec, make_x
from .store import Results, Row
from .timing import CpuClock, GpuClock, Timed, measure

FLOOR, LIMIT = "floor", "limit"


@dataclass(frozen=True)
class Plan:
    """What to measure and how long it may take."""

    shapes: tuple[Shape, ...] = BOTTLENECK + BASIC
    batches: tuple[int, ...] = BATCHES
    threads: tuple[int, ...] = (1,)  # ignored on a GPU
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    layout: str = NCHW
    rounds: int = 40
    cell_s: float = 10.0  # rounds end early past this
    compile_batches: tuple[int, ...] = BATCHES
    compile_s: float = float("inf")  # no new compilation once this much went into them
    max_autotune: bool = False  # compile in that mode as well
    autotune_s: float = float("inf")
    total_s: float = float("inf")  # no new cell past this


def quick(plan: Plan) -> Plan:
    """Four shapes within two minutes on two cores; a GPU has four times as many cells."""
    return replace(
        plan,
        rounds=15,
        cell_s=1.0,
        compile_batches=(1,) if plan.device == "cpu" else plan.batches,
        compile_s=35.0 if plan.device == "cpu" else 70.0,
        autotune_s=40.0,
        total_s=85.0 if plan.device == "cpu" else 160.0,
    )


@dataclass(frozen=True)
class Cell:
    """A shape, a batch, and how it is run."""

    shape: Shape
    batch: int
    threads: int | None
    mode: str = "eager"
    cache: str = "warm"

    def __str__(self) -> str:
        where = f"{self.mode} {self.cache}" if self.threads is None else f"{self.threads} thread(s)"
        return f"{self.shape.name} N={self.batch} {where}"


def cells(plan: Plan) -> list[Cell]:
    """All cells; on a GPU each inside a CUDA graph and not, with L2 flushed and warm.

    Those of one shape and batch follow each other: on a GPU they share what torch.compile made.
    """
    if plan.device == "cpu":
        runs = [(threads, "eager", "warm") for threads in plan.threads]
    else:
        runs = [(None, mode, cache) for mode in ("eager", "graph") for cache in ("cold", "warm")]
    return [Cell(shape, batch, *run) for shape in plan.shapes for batch in plan.batches for run in runs]


def run(plan: Plan, results: Results, on_cell: Callable[[Cell, int, int], None]) -> None:
    """Measure cell by cell into ``results``: what an interrupt leaves there is whole cells.

    ``on_cell`` is called before each with the cell, its number and how many there are.
    """
    started, compiler = time.monotonic(), compiler_of(plan)
    threads_before = torch.get_num_threads()
    planned = cells(plan)
    try:
        for number, cell in enumerate(planned):
            if time.monotonic() - started > plan.total_s:
                left = ", ".join(map(str, planned[number:]))
                results.notes.append(f"out of time ({plan.total_s:.0f} s), not measured: {left}")
                break
            on_cell(cell, number, len(planned))
            if cell.threads is not None:
                torch.set_num_threads(cell.threads)
            key = "gpu" if cell.threads is None else str(cell.threads)
            if key not in results.bandwidth_gbs:
                results.bandwidth_gbs[key] = bandwidth_gbs(plan.device)
            results.rows += run_cell(cell, plan, results.bandwidth_gbs[key], compiler)
    finally:
        torch.set_num_threads(threads_before)
        for name, limit in compiler.limits.items():
            if limit.cells_refused:
                where = f"{limit.cells_refused} of {len(planned)} cells"
                results.notes.append(f"{_NAMES[name]} left out of {where} to save time; without --quick it is not")


_NAMES = {COMPILE: "torch.compile", MAX_AUTOTUNE: "torch.compile with max-autotune"}


def compiler_of(plan: Plan) -> Compiler:
    limits = {COMPILE: Limit(plan.compile_batches, plan.compile_s)}
    if plan.max_autotune:
        limits[MAX_AUTOTUNE] = Limit(plan.batches, plan.autotune_s)
    return Compiler(limits)


@torch.inference_mode()
def run_cell(
    cell: Cell, plan: Plan, bandwidth: float, compiler: Compiler, make_x: Callable[..., Tensor] = make_x
) -> list[Row]:
    """Check and time every provider of one cell; ``make_x`` as :func:`mod_kernels.bench.shapes.make_x`."""
    spec = make_spec(cell.shape, plan.dtype, plan.device)
    x = make_x(cell.shape, cell.batch, spec, layout=plan.layout)
    logits = exact_logits(x, spec)
    rows = CellRows(cell, plan)
    clock = CpuClock() if plan.device == "cpu" else GpuClock(cold=cell.cache == "cold")
    engine = providers.ENGINES[plan.device]
    with backends.use_backend(engine), providers.same_arithmetic():
        to_time = []
        for provider in _candidates(spec, x, engine, rows):
            problem = check(provider, x, spec, logits, ours=provider.name not in PLAIN)
            if problem:
                rows.add(provider.name, f"wrong: {problem}")
            else:
                to_time.append(provider)
        key = (cell.shape, cell.batch, cell.threads)
        checked = list(to_time)
        for name in compiler.limits:
            try:
                made = compiler.provider(
                    name, key, x, cell.threads or 0, lambda: _fastest_plain(checked, x, clock)
                )
                problem = check(made, x, spec, logits, ours=False)
            except LeftOut:
                rows.add(name, "left out: time")
            except Unavailable as reason:
                rows.add(name, f"wrong: {reason}")
            else:
                if problem:
                    rows.add(name, f"wrong: {problem}", compile_s=made.compile_s)
                else:
                    to_time.append(made)
        timed = [_timed(provider, x, cell.mode) for provider in to_time]
        floor = Provider(FLOOR, providers.floor(spec), None)
        timed.append(_timed(floor, x, cell.mode))
        measure(timed, clock, plan.rounds, plan.cell_s)
    compile_s = {provider.name: provider.compile_s for provider in to_time}
    for one in timed:
        rows.add(one.name, "none" if one.name == FLOOR else "ok", one, compile_s.get(one.name))
    limit_ms = cell.shape.floor_bytes(cell.batch, plan.dtype) / bandwidth / 1e6
    rows.rows.append(rows.row(LIMIT, "none", median_ms=limit_ms))
    return rows.rows


class CellRows:
    """The rows of one cell."""

    def __init__(self, cell: Cell, plan: Plan) -> None:
        self.cell, self.plan, self.rows = cell, plan, []

    def row(self, provider: str, check: str, **times) -> Row:
        cell, dtype = self.cell, str(self.plan.dtype).removeprefix("torch.")
        return Row(
            cell.shape.name,
            cell.shape.kind,
            cell.batch,
            cell.threads,
            self.plan.device,
            dtype,
            cell.mode,
            cell.cache,
            provider,
            check,
            layout=self.plan.layout,
            **times,
        )

    def add(self, provider: str, check: str, timed: Timed | None = None, compile_s: float | None = None) -> None:
        times = {"compile_s": compile_s}
        if timed is not None:
            low, median, high = timed.quartiles()
            times |= {"median_ms": median, "q1_ms": low, "q3_ms": high}
            times |= {"samples": len(timed.samples), "repeats": timed.repeats}
        self.rows.append(self.row(provider, check, **times))


def _candidates(spec, x: Tensor, engine: str, rows: CellRows) -> list[Provider]:
    """The plain forms and ours; a row for each of ours that can't run."""
    found = [providers.plain_provider(name.removeprefix("plain-"), spec) for name in PLAIN]
    for ending in ("", IN_PLACE, FED):
        try:
            found.append(providers.engine_provider(engine, spec, ending != "", x, fed=ending == FED))
        except Unavailable as reason:
            rows.add(engine + ending, f"left out: {reason}")
    return found


def _fastest_plain(checked: list[Provider], x: Tensor, clock) -> Provider:
    """Of the out-of-place plain forms that are right, found in a few rounds.

    Raises:
        Unavailable: there is none.
    """
    plain = [provider for provider in checked if provider.name in PLAIN and not provider.in_place]
    if not plain:
        raise Unavailable("no plain form is right")
    timed = [_timed(provider, x, "eager") for provider in plain]
    measure(timed, clock, rounds=3)
    return min(zip(timed, plain, strict=True), key=lambda pair: pair[0].quartiles()[1])[1]


def _timed(provider: Provider, x: Tensor, mode: str) -> Timed:
    """A provider over x; one that writes gets a buffer of its own, filled from x again before each sample."""
    given = x.clone() if provider.in_place else x
    run = provider.run
    call = providers.graphed(run, given) if mode == "graph" else lambda: run(given)
    return Timed(provider.name, call, (lambda: given.copy_(x)) if provider.in_place else lambda: None)


def bandwidth_gbs(device: str) -> float:
    """Bytes a second of reading 256 MB that no cache holds, GB/s: the best of five sums."""
    data = torch.ones(64 << 20, device=device)
    data.sum()
    clock = CpuClock() if device == "cpu" else GpuClock(cold=True)
    timed = Timed("bandwidth", data.sum)
    return data.numel() * 4 / min(clock.sample(timed) for _ in range(5)) / 1e9

"""The block benchmark: cells of shape, batch and threads; in each, all providers checked, then interleaved."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import backends
from .._layout import NCHW
from ..spec import MoDSpec
from . import providers
from .cells import OnCell, run_cells
from .check import check, exact_logits
from .compiled import Compiler, LeftOut, Limit
from .providers import COMPILE, FED, IN_PLACE, MAX_AUTOTUNE, PLAIN, Provider, Unavailable
from .rotation import Rotation, copies_of, places_of
from .shapes import BASIC, BATCHES, BOTTLENECK, Shape, make_spec, make_x
from .store import Results, Row
from .timing import CpuClock, GpuClock, Timed, measure, on_round_of

FLOOR = "floor"
WARM, COLD = "warm", "cold"


@dataclass(frozen=True)
class Plan:
    """What to measure and how long it may take."""

    shapes: tuple[Shape, ...] = BOTTLENECK + BASIC
    batches: tuple[int, ...] = BATCHES
    threads: tuple[int, ...] = (1,)  # ignored on a GPU
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    layout: str = NCHW
    # Of x on a CPU; cold only where x would fit the cache, see rotation.py. On a GPU both, always.
    caches: tuple[str, ...] = (WARM, COLD)
    rounds: int = 50
    spread: float = 0.02  # rounds end early once all providers have settled to this
    cell_s: float = 4.0  # and past this
    # How often all cells are gone through, each time with other memory. What a call takes hangs on where its
    # tensors lie and on what else the machine does that minute: rounds of one pass agree with each other and not
    # with those of the next.
    passes: int = 1
    compile_batches: tuple[int, ...] = BATCHES
    compile_s: float = float("inf")  # no new compilation once this much went into them
    max_autotune: bool = False  # compile in that mode as well
    autotune_s: float = float("inf")
    total_s: float = float("inf")  # no new cell past this


def quick(plan: Plan) -> Plan:
    """Four shapes within two minutes on two cores; a GPU has four times as many cells."""
    plan = replace(plan, caches=(WARM,), autotune_s=40.0)
    if plan.device == "cpu":
        return replace(plan, cell_s=0.5, passes=4, compile_batches=(1,), compile_s=25.0, total_s=95.0)
    return replace(plan, rounds=15, cell_s=1.0, compile_batches=plan.batches, compile_s=70.0, total_s=160.0)


@dataclass(frozen=True)
class Cell:
    """A shape, a batch, and how it is run."""

    shape: Shape
    batch: int
    threads: int | None
    mode: str = "eager"
    cache: str = "warm"

    def __str__(self) -> str:
        if self.threads is None:
            where = f"{self.mode} {self.cache}"
        else:
            where = f"{self.threads} thread(s)" + (f" {COLD}" if self.cache == COLD else "")
        return f"{self.shape.name} N={self.batch} {where}"


def cells(plan: Plan) -> list[Cell]:
    """All cells; on a GPU each inside a CUDA graph and not, with L2 flushed and warm.

    Those of one shape and batch follow each other: on a GPU they share what torch.compile made.
    """
    if plan.device == "cpu":
        runs = [(threads, "eager", cache) for threads in plan.threads for cache in plan.caches]
    else:
        runs = [(None, mode, cache) for mode in ("eager", "graph") for cache in (COLD, WARM)]
    planned = [Cell(shape, batch, *run) for shape in plan.shapes for batch in plan.batches for run in runs]
    if plan.device != "cpu":
        return planned
    return [cell for cell in planned if cell.cache == WARM or _copies(cell.shape, cell.batch, plan) > 1]


def _copies(shape: Shape, batch: int, plan: Plan) -> int:
    return copies_of(batch * shape.channels * shape.height * shape.width * plan.dtype.itemsize)


def run(plan: Plan, results: Results, on_cell: OnCell) -> None:
    """Measure cell by cell into ``results``: what an interrupt leaves there is whole cells."""
    compiler = compiler_of(plan)
    planned = cells(plan)
    found: defaultdict[Cell, Found] = defaultdict(Found)

    def measured(cell: Cell) -> list[Row]:
        bandwidth = bandwidth_of(cell.threads, plan.device, results)
        return run_cell(cell, plan, bandwidth, compiler, found=found[cell])

    try:
        run_cells(planned, results, on_cell, measured, plan.total_s, plan.passes)
    finally:
        for name, limit in compiler.limits.items():
            if limit.cells_refused:
                where = f"{limit.cells_refused} of {len(planned)} cells"
                results.notes.append(f"{_NAMES[name]} left out of {where} to save time; without --quick it is not")


def bandwidth_of(threads: int | None, device: str, results: Results) -> float:
    """:func:`bandwidth_gbs` with so many threads, measured once in a run."""
    key = "gpu" if threads is None else str(threads)
    if key not in results.bandwidth_gbs:
        results.bandwidth_gbs[key] = bandwidth_gbs(device)
    return results.bandwidth_gbs[key]


_NAMES = {COMPILE: "torch.compile", MAX_AUTOTUNE: "torch.compile with max-autotune"}


def compiler_of(plan: Plan) -> Compiler:
    limits = {COMPILE: Limit(plan.compile_batches, plan.compile_s)}
    if plan.max_autotune:
        limits[MAX_AUTOTUNE] = Limit(plan.batches, plan.autotune_s)
    return Compiler(limits)


@dataclass
class Found:
    """What the passes over a cell have found so far; dicts are by provider."""

    samples: dict[str, list[float]] = field(default_factory=dict)  # seconds a call
    problems: dict[str, str] = field(default_factory=dict)  # of those that were wrong in any pass
    compiled: list[Row] | None = None  # of what torch.compile made; None before the first pass


@torch.inference_mode()
def run_cell(
    cell: Cell,
    plan: Plan,
    bandwidth: float,
    compiler: Compiler,
    make_x: Callable[..., Tensor] = make_x,
    found: Found | None = None,
) -> list[Row]:
    """Check and time every provider of one cell; the rows are of all samples, those of ``found`` as well.

    ``make_x`` as :func:`mod_kernels.bench.shapes.make_x`. What torch.compile makes is measured in the first pass
    alone: it does not outlive the next compilation, and each would take seconds again.
    """
    found = Found() if found is None else found
    spec = make_spec(cell.shape, plan.dtype, plan.device)
    x = make_x(cell.shape, cell.batch, spec, layout=plan.layout)
    logits = exact_logits(x, spec)
    rows = CellRows(cell, plan, bandwidth)
    clock = CpuClock() if plan.device == "cpu" else GpuClock(cold=cell.cache == COLD)
    inputs = _inputs(x, cell, plan)
    engine = providers.ENGINES[plan.device]
    with backends.use_backend(engine), providers.same_arithmetic():
        to_time = []
        for provider in _candidates(spec, x, engine, rows):
            name = provider.name
            problem = found.problems.get(name) or check(provider, x, spec, logits, ours=name not in PLAIN)
            if problem:
                found.problems[name] = problem
                rows.add(name, f"wrong: {problem}")
            else:
                to_time.append(provider)
        if found.compiled is None:
            fastest = functools.partial(_fastest_plain, list(to_time), x, clock)
            to_time += _compiled(compiler, x, spec, logits, fastest, rows)
        to_time.append(Provider(FLOOR, providers.floor(spec), None))
        timed = [_timed(provider, x, cell.mode, inputs) for provider in to_time]
        for one in timed:
            one.samples = found.samples.setdefault(one.name, one.samples)
        measure(timed, clock, plan.rounds, plan.cell_s, on_round_of(plan.device), plan.spread)
    compile_s = {provider.name: provider.compile_s for provider in to_time}
    for one in timed:
        rows.add(one.name, "none" if one.name == FLOOR else "ok", one, compile_s.get(one.name))
    if found.compiled is None:
        found.compiled = [row for row in rows.rows if row.provider in compiler.limits]
        return rows.rows
    return found.compiled + rows.rows


def _compiled(
    compiler: Compiler,
    x: Tensor,
    spec: MoDSpec,
    logits: Tensor,
    fastest: Callable[[], Provider],
    rows: CellRows,
) -> list[Provider]:
    """What torch.compile makes of ``fastest()``, if it is right; a row for what is not, or is left out."""
    cell, right = rows.cell, []
    for name in compiler.limits:
        try:
            made = compiler.provider(name, (cell.shape, cell.batch, cell.threads), x, cell.threads or 0, fastest)
            problem = check(made, x, spec, logits, ours=False)
        except LeftOut:
            rows.add(name, "left out: time")
        except Unavailable as reason:
            rows.add(name, f"wrong: {reason}")
        else:
            if problem:
                rows.add(name, f"wrong: {problem}", compile_s=made.compile_s)
            else:
                right.append(made)
    return right


def _inputs(x: Tensor, cell: Cell, plan: Plan) -> Rotation:
    """What a cell's calls read in turn. A CUDA graph is of one place, and a GPU has its L2 flushed."""
    if plan.device != "cpu":
        return Rotation(x, 1)
    cold = cell.cache == COLD
    return Rotation(x, _copies(cell.shape, cell.batch, plan) if cold else places_of(x.nbytes), cold)


class CellRows:
    """The rows of one cell."""

    def __init__(self, cell: Cell, plan: Plan, bandwidth: float) -> None:
        self.cell, self.plan, self.rows = cell, plan, []
        least = cell.shape.floor_bytes(cell.batch, plan.dtype, cell.mode == "train")
        self._limit = {"bytes": least, "bandwidth_gbs": bandwidth}

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
            **self._limit,
            **times,
        )

    def add(self, provider: str, check: str, timed: Timed | None = None, compile_s: float | None = None) -> None:
        times = {"compile_s": compile_s}
        if timed is not None:
            low, median, high = timed.quartiles()
            times |= {"median_ms": median, "q1_ms": low, "q3_ms": high}
            times |= {"samples": len(timed.samples), "repeats": timed.repeats, "warning": timed.warning()}
        self.rows.append(self.row(provider, check, **times))


def _candidates(spec, x: Tensor, engine: str, rows: CellRows) -> list[Provider]:
    """The plain forms and ours; a row for each of ours that can't run."""
    found = [providers.plain_provider(name.removeprefix("plain-"), spec) for name in PLAIN]
    for name, ending in itertools.product((engine, *providers.BESIDE[x.device.type]), ("", IN_PLACE, FED)):
        try:
            found.append(providers.engine_provider(name, spec, ending != "", x, fed=ending == FED))
        except Unavailable as reason:
            rows.add(name + ending, f"left out: {reason}")
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


def _timed(provider: Provider, x: Tensor, mode: str, inputs: Rotation | None = None) -> Timed:
    """A provider over x; one that writes gets buffers of its own, filled from x again before each sample.

    ``inputs``: what all others read in turn; None for x alone.
    """
    inputs = Rotation(x, 1) if inputs is None else inputs
    given = inputs.beside(x.clone()) if provider.in_place else inputs
    with backends.use_backend(provider.backend or backends.requested()):
        call = providers.graphed(provider.run, given.first) if mode == "graph" else given.calling(provider.run)

    def prepare() -> None:
        if provider.backend:
            backends.request(provider.backend)  # here, where it takes none of the call's time
        given.prepare(refill_with=x if provider.in_place else None)

    return Timed(provider.name, call, prepare)


def bandwidth_gbs(device: str) -> float:
    """Bytes a second of reading 256 MB that no cache holds, GB/s: the best of five sums."""
    data = torch.ones(64 << 20, device=device)
    data.sum()
    clock = CpuClock() if device == "cpu" else GpuClock(cold=True)
    timed = Timed("bandwidth", data.sum)
    return data.numel() * 4 / min(clock.sample(timed) for _ in range(5)) / 1e9

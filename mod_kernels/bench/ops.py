"""Every public op by itself: the plain PyTorch code of it against the engine of the device.

A row's provider is ``"<op>:plain"`` (``"<op>:plain-..."`` where people write the op in a second way) or
``"<op>:<engine>"``; all ops of one shape are one cell, timed in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends, functional, plain, reference
from .._library import accumulation_dtype
from .._tolerances import LOGITS, VALUES, relative_norm
from ..spec import MoDSpec
from . import blocks, providers
from .cells import OnCell, run_cells
from .check import _LOW_PRECISION, _check_selection, exact_logits
from .shapes import BOTTLENECK, Shape, make_spec, make_x
from .store import Results, Row
from .timing import CpuClock, GpuClock, Timed, measure, on_round_of

KIND = "op"  # of a row
PLAIN = "plain"
FED = "-fed"  # select_channels given the means of x
ROUNDS, QUICK_ROUNDS = 40, 15
CELL_S, QUICK_CELL_S = 10.0, 2.0  # rounds end early past this


@dataclass(frozen=True)
class Case:
    """One op on fixed arguments. Calls take x, the first argument, which an op in place writes into."""

    name: str
    op: str  # of mod_kernels.functional
    x: Tensor
    arguments: tuple  # the others, as the public op takes them
    plain: dict[str, Callable[[Tensor], object]]
    # What is wrong with an output, or "". ``ours``: held to float32 selectors whatever x is.
    problem: Callable[[object, bool], str]
    bytes: int

    @property
    def in_place(self) -> bool:
        return self.op.endswith("_")

    def public(self, x: Tensor) -> object:
        """The public op, which runs on the backend in force."""
        return getattr(functional, self.op)(x, *self.arguments)


def run(
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    results: Results,
    on_cell: OnCell,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
    shapes: tuple[Shape, ...] = BOTTLENECK,
) -> None:
    """Measure every op at ``shapes`` into ``results``; ``threads`` is ignored on a GPU."""
    plan = blocks.Plan(shapes, batches, threads, device, dtype, caches=(blocks.WARM,))
    rounds, cell_s = (QUICK_ROUNDS, QUICK_CELL_S) if quick else (ROUNDS, CELL_S)
    plan = replace(plan, rounds=rounds, cell_s=cell_s)

    def measured(cell: blocks.Cell) -> list[Row]:
        return run_cell(cell, plan, blocks.bandwidth_of(cell.threads, device, results))

    run_cells(blocks.cells(plan), results, on_cell, measured)


@torch.inference_mode()
def run_cell(cell: blocks.Cell, plan: blocks.Plan, bandwidth: float) -> list[Row]:
    """Check and time every provider of every op."""
    engine = providers.ENGINES[plan.device]
    rows, timed, sizes = [], [], {}

    def row(provider: str, said: str, **more) -> Row:
        dtype = str(plan.dtype).removeprefix("torch.")
        where = (cell.batch, cell.threads, plan.device, dtype, cell.mode, cell.cache)
        return Row(cell.shape.name, KIND, *where, provider, said, **more)

    with backends.use_backend(engine), providers.same_arithmetic():
        for case in cases(cell.shape, cell.batch, plan.device, plan.dtype):
            for way, call in {**case.plain, engine: case.public}.items():
                name = f"{case.name}:{way}"
                reason = unserved(case, engine) if way == engine else ""
                problem = reason or wrong(case, call, ours=way == engine)
                if problem:
                    rows.append(row(name, f"{'left out' if reason else 'wrong'}: {problem}"))
                else:
                    timed.append(_timed(name, case, call, cell.mode))
                    sizes[name] = case.bytes
        clock = CpuClock() if plan.device == "cpu" else GpuClock(cold=cell.cache == "cold")
        measure(timed, clock, plan.rounds, plan.cell_s, on_round_of(plan.device), plan.spread)
    for one in timed:
        rows.append(row(one.name, "ok", **times(one), bytes=sizes[one.name], bandwidth_gbs=bandwidth))
    return rows


def times(timed: Timed) -> dict[str, object]:
    """A row's fields of what was timed."""
    low, median, high = timed.quartiles()
    counts = {"samples": len(timed.samples), "repeats": timed.repeats}
    return {"median_ms": median, "q1_ms": low, "q3_ms": high, **counts, "warning": timed.warning()}


def _timed(name: str, case: Case, call: Callable[[Tensor], object], mode: str) -> Timed:
    """One that writes gets a buffer of its own, filled from x again before each sample."""
    given = case.x.clone() if case.in_place else case.x
    run = providers.graphed(call, given) if mode == "graph" else lambda: call(given)
    return Timed(name, run, (lambda: given.copy_(case.x)) if case.in_place else lambda: None)


def unserved(case: Case, engine: str) -> str:
    """Why the engine does not serve the op here, or ``""``; to be asked under ``use_backend(engine)``."""
    explanation = functional.explain(case.op, case.x, *case.arguments)
    return "" if explanation.backend == engine else explanation.reasons.get(engine, "not served")


def wrong(case: Case, call: Callable[[Tensor], object], ours: bool) -> str:
    """What is wrong with ``call`` on a copy of x, or ``""``."""
    given = case.x.clone()
    try:
        out = call(given)
    except RuntimeError as error:
        return f"raised: {str(error).partition(chr(10))[0]}"
    if not case.in_place and not torch.equal(given, case.x):
        return "wrote into its input"
    written = out[0] if isinstance(out, tuple) else out
    if case.in_place and written.data_ptr() != given.data_ptr():
        return "did not return what it was to write into"
    with torch.no_grad():
        return case.problem(out, ours)


def cases(shape: Shape, batch: int, device: str, dtype: torch.dtype) -> list[Case]:
    """Every op of :mod:`mod_kernels.functional` but the whole block, at one shape."""
    spec = make_spec(shape, dtype, device)
    x = make_x(shape, batch, spec)
    index = reference.rank_channels(exact_logits(x, spec), shape.k)
    generator = torch.Generator().manual_seed(2)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    z, b = randn(batch, shape.k, *x.shape[2:]), randn(*x.shape)
    scores = torch.rand((batch, shape.k), generator=generator).to(device, accumulation_dtype(dtype))
    return [*_selects(x, spec), _gather(x, index), *_fuses(x, z, scores), *_adds(x, b)]


def _selects(x: Tensor, spec: MoDSpec) -> list[Case]:
    logits, low = exact_logits(x, spec), _LOW_PRECISION.get(x.dtype, LOGITS[x.dtype])
    pooled = x.mean((2, 3), dtype=accumulation_dtype(x.dtype))
    weights = (spec.fc1_weight, spec.fc2_weight, spec.k)
    narrow = pooled.to(x.dtype)  # what plain code would be handed

    def problem(out: tuple[Tensor, Tensor], ours: bool) -> str:
        return _check_selection(logits, *out, LOGITS[x.dtype] if ours else low)

    read = _bytes(*weights[:2]) + len(x) * spec.k * (pooled.itemsize + 8)  # and scores and index written
    return [
        Case(
            f"select_channels{fed}",
            "select_channels",
            x,
            (*weights, None, None, pooled if fed else None),
            {PLAIN: lambda x, means=means: plain.select_channels(x, *weights, pooled=means)},
            problem,
            read + _bytes(pooled if fed else x),
        )
        for fed, means in (("", None), (FED, narrow))
    ]


def _gather(x: Tensor, index: Tensor) -> Case:
    expected, samples = reference.gather_channels(x, index), torch.arange(len(x), device=x.device)[:, None]
    ways = {PLAIN: lambda x: plain.gather_channels(x, index), "plain-index": lambda x: x[samples, index]}

    def problem(out: Tensor, ours: bool) -> str:
        return "" if torch.equal(out, expected) else "gathered other values"

    return Case(
        "gather_channels", "gather_channels", x, (index,), ways, problem, 2 * _bytes(expected) + _bytes(index)
    )


def _fuses(x: Tensor, z: Tensor, scores: Tensor) -> list[Case]:
    k = z.shape[1]
    expected = x[:, :k].double() + scores.double()[:, :, None, None] * z.double()

    def problem(out: Tensor, ours: bool) -> str:
        if not torch.equal(out[:, k:], x[:, k:]):
            return "changed a channel that passes through"
        return _off("values", out[:, :k], expected)

    def way(ending: str) -> Callable[[Tensor], Tensor]:
        return lambda x: plain.fuse_channels(x, z, scores, ending=ending)

    name, few = "fuse_channels", _bytes(z, scores)
    return [
        Case(
            name,
            name,
            x,
            (z, scores),
            {PLAIN: way("clone"), "plain-cat": way("cat")},
            problem,
            2 * _bytes(x) + few,
        ),
        Case(f"{name}_", f"{name}_", x, (z, scores), {PLAIN: way("inplace")}, problem, 2 * _bytes(z) + few),
    ]


def _adds(a: Tensor, b: Tensor) -> list[Case]:
    expected = torch.relu(a.double() + b.double())

    def problem(out: tuple[Tensor, Tensor], ours: bool) -> str:
        y, pooled = out
        means = y.mean((2, 3), dtype=torch.float64)  # of what was written
        return _off("values", y, expected) or _off("means", pooled, means)

    def out_of_place(a: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu_(a + b)
        return y, y.mean((2, 3))

    def in_place(a: Tensor) -> tuple[Tensor, Tensor]:
        y = a.add_(b).relu_()
        return y, y.mean((2, 3))

    moved = 3 * _bytes(a) + a.shape[0] * a.shape[1] * accumulation_dtype(a.dtype).itemsize
    return [
        Case(name, name, a, (b,), {PLAIN: way}, problem, moved)
        for name, way in (("add_relu_pool", out_of_place), ("add_relu_pool_", in_place))
    ]


def _off(what: str, actual: Tensor, expected: Tensor) -> str:
    error, allowed = relative_norm(actual, expected), VALUES[actual.dtype]
    return "" if error <= allowed else f"{what} off by {error:.1e}, {allowed:.1e} is allowed"


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

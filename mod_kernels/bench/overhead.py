"""What a call costs beside the arithmetic: Python, checks, dispatch, allocation.

Each op runs on one sample of 16 channels and one pixel, k = 1, where its kernel takes well under half a
microsecond: the time of the call is the cost of the call, kernel included. It is the least over many short runs
taken in turns, on one thread: other processes only ever add to it. A row's median and quartiles are those of
SAMPLES such minima. On a GPU it is the time until the call has been queued.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends, functional
from .cells import OnCell, run_cells
from .check import check, exact_logits
from .ops import KIND, Case, cases, times, unserved, wrong
from .providers import ENGINES, engine_provider
from .shapes import Shape, make_spec, make_x
from .store import Results, Row
from .timing import Timed

SHAPE = Shape("bottleneck", 16, 1, 1)
PUBLIC, RAW, YARDSTICK = "public", "op", "torch.add"
EAGER, TRAIN = "eager", "train"
SAMPLES, RUNS, CALLS = 7, 20, 300


@dataclass(frozen=True)
class Repeated:
    """A call that is made again and again with x."""

    call: Callable[[Tensor], object]
    x: Tensor
    # An alias of x for each call: what was written into under autograd has a history, which would grow.
    aliases: bool = False

    def seconds(self, count: int) -> float:
        """Of one call, from ``count`` of them."""
        given = [self.x.detach() if self.aliases else self.x for _ in range(count)]
        if self.x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for x in given:
            self.call(x)
        return (time.perf_counter() - begin) / count


def minima(calls: dict[str, Repeated], runs: int = RUNS, count: int = CALLS) -> dict[str, float]:
    """Seconds of each call, the least of ``runs`` runs of ``count`` calls, taken in turns."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(runs):
        for name, repeated in calls.items():
            least[name] = min(least[name], repeated.seconds(count))
    return least


@dataclass(frozen=True)
class Cell:
    """One op, without gradients ("eager") or with them ("train")."""

    op: str
    mode: str
    threads: int | None

    def __str__(self) -> str:
        return f"{self.op} {self.mode}"


def run(results: Results, on_cell: OnCell, device: str = "cpu") -> None:
    """Measure every public op into ``results``, on one thread, without and with gradients."""
    threads = 1 if device == "cpu" else None
    modes = [(op, EAGER) for op in functional._CALLS]
    modes += [(op, TRAIN) for op in functional._CALLS if not op.startswith("mod_block")]
    planned = [Cell(op, mode, threads) for op, mode in modes]
    run_cells(planned, results, on_cell, lambda cell: run_cell(cell, device))


def run_cell(cell: Cell, device: str) -> list[Row]:
    """Check and time one op: the public one, the one it calls, and ``torch.add`` of two maps as small."""
    with backends.use_backend(ENGINES[device]), torch.inference_mode(cell.mode == EAGER):
        calls, problems = _providers(cell, device)
        a, b = torch.randn(1, 16, 1, 1, device=device), torch.randn(1, 16, 1, 1, device=device)
        b.requires_grad_(cell.mode == TRAIN)
        calls[YARDSTICK] = Repeated(lambda a: torch.add(a, b), a)
        timed = {name: Timed(name, repeated.call, repeats=RUNS * CALLS) for name, repeated in calls.items()}
        for _ in range(SAMPLES):
            for name, seconds in minima(calls).items():
                timed[name].samples.append(seconds)

    def row(provider: str, said: str, **more) -> Row:
        return Row(cell.op, KIND, 1, cell.threads, device, "float32", cell.mode, "warm", provider, said, **more)

    found = [row(name, said) for name, said in problems.items()]
    return found + [
        row(one.name, "none" if one.name == YARDSTICK else "ok", **times(one)) for one in timed.values()
    ]


def _providers(cell: Cell, device: str) -> tuple[dict[str, Repeated], dict[str, str]]:
    """The calls of a cell that are right, and what is wrong with the others; under the engine's backend."""
    engine = ENGINES[device]
    case, problem = _judged(cell.op, engine, device)
    if problem:
        return {}, {PUBLIC: problem, RAW: problem}
    if cell.mode == TRAIN:
        case = _with_gradients(case)
        problem = wrong(case, case.public, ours=True)
        return ({}, {PUBLIC: f"wrong: {problem}"}) if problem else ({PUBLIC: _public(case)}, {})
    found, problems, raw = {PUBLIC: _public(case)}, {}, _raw(case)
    written, again = case.x.clone(), case.x.clone()
    expected, given = case.public(written), _as_public(case.op, again, raw(again))
    if _equal(expected, given):
        found[RAW] = Repeated(raw, case.x)
    else:
        problems[RAW] = "wrong: another output than the public op's"
    return found, problems


def calls(device: str = "cpu") -> dict[str, Repeated]:
    """Every public op as a call, without gradients."""
    with torch.no_grad():
        return {op: _public(_case(op, device)) for op in functional._CALLS}


def _case(op: str, device: str) -> Case:
    """Of an op without a case of its own, the whole block, one that :func:`_judged` checks in another way."""
    if not op.startswith("mod_block"):
        return {case.name: case for case in cases(SHAPE, 1, device, torch.float32)}[op]
    spec = make_spec(SHAPE, torch.float32, device)
    return Case(op, op, make_x(SHAPE, 1, spec), (spec,), {}, lambda out, ours: "", 0)


def _judged(op: str, engine: str, device: str) -> tuple[Case, str]:
    """The op's case, and why the public op gets no time, as a row's check says it."""
    case = _case(op, device)
    if reason := unserved(case, engine):
        return case, f"left out: {reason}"
    if op.startswith("mod_block"):
        (spec,) = case.arguments
        provider = engine_provider(engine, spec, case.in_place, case.x)
        problem = check(provider, case.x, spec, exact_logits(case.x, spec), ours=True)
    else:
        problem = wrong(case, case.public, ours=True)
    return case, problem and f"wrong: {problem}"


def _with_gradients(case: Case) -> Case:
    """Every tensor of a case that can need a gradient needs one; not x where it is written into."""

    def needing(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    x = case.x if case.in_place else needing(case.x)
    return replace(case, x=x, arguments=tuple(map(needing, case.arguments)))


def _public(case: Case) -> Repeated:
    op, arguments = getattr(functional, case.op), case.arguments
    return Repeated(lambda x: op(x, *arguments), case.x, aliases=case.in_place and torch.is_grad_enabled())


def _raw(case: Case) -> Callable[[Tensor], object]:
    """The engine's registered op, as the public one calls it once it has seen the arguments before."""
    op = backends.choose(functional._CALLS[case.op](case.x, *case.arguments)).ops[case.op]
    op, arguments = getattr(op, "_op", op), _raw_arguments(case.op, *case.arguments)
    return lambda x: op(x, *arguments)


def _raw_arguments(op: str, *given: object) -> tuple:
    if op == "select_channels":
        fc1_weight, fc2_weight, k, *rest = given
        return fc1_weight, fc2_weight, *rest, k
    if op.startswith("fuse_channels"):
        return *given, None, "first"
    if op.startswith("add_relu_pool"):
        return *given, True
    if op.startswith("mod_block"):
        (spec,) = given
        return *spec.selector_arguments, None, spec.k, *spec.conv_arguments
    return given


def _as_public(op: str, x: Tensor, out: object) -> object:
    """A raw op's output on x as the public op returns it."""
    if op == "add_relu_pool_":
        return x, out
    if op.endswith("_"):
        return x
    return out[0] if op == "mod_block" else out


def _equal(one: object, other: object) -> bool:
    if isinstance(one, tuple):
        return all(map(torch.equal, one, other))
    return torch.equal(one, other)

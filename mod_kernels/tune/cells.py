"""What is timed: an op on one of the paper's blocks, and what of its results another tuning may not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._fresh_memory import poisoned
from .._layout import memory_format_of
from .._tolerances import LOGITS, VALUES, relative_norm, relative_to_largest
from ..bench.shapes import FORMATS, Shape, make_spec, make_x
from ..spec import MoDSpec


class Near(NamedTuple):
    """A result that may be ``bound`` off by ``distance``."""

    values: Tensor
    distance: Callable[[Tensor, Tensor], float]
    bound: float


class Results(NamedTuple):
    """By name: what must be equal, and what may differ as rounding does."""

    equal: dict[str, Tensor]
    near: dict[str, Near]


@dataclass(frozen=True)
class Call:
    """One op on tensors of its own. ``run`` may write into ``written`` alone; ``kept`` is what was in there.

    x is among them out of place too: restored, it lies in the L2 as the block before would leave it.
    """

    run: Callable[[], object]
    read: Callable[[object], Results]
    written: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

    def restore(self) -> None:
        """Put back what a call has written, as ``restore_value`` of ``triton.autotune`` does."""
        for tensor, value in zip(self.written, self.kept, strict=True):
            tensor.copy_(value)

    def results(self) -> Results:
        """Of one call on restored tensors. Fresh memory holds NaN before it, not what the last call left there."""
        self.restore()
        with poisoned():
            return self.read(self.run())


@dataclass(frozen=True, eq=False)
class Inputs:
    """A block and a feature map that no two right selections differ on (:func:`..bench.shapes.make_x`)."""

    shape: Shape
    spec: MoDSpec
    x: Tensor
    layout: str

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape.kind} {self.shape.name} N={self.x.shape[0]} {dtype} {self.layout}"


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Iterator[Inputs]:
    """The same values in both layouts; drawn on the CPU, the same ones everywhere."""
    x = make_x(shape, batch, make_spec(shape, dtype, "cpu")).to(device)
    spec = make_spec(shape, dtype, device)
    for layout, memory_format in FORMATS.items():
        yield Inputs(shape, spec, x.contiguous(memory_format=memory_format), layout)


@dataclass(frozen=True, eq=False)
class Cell:
    """An op on inputs."""

    op: str
    inputs: Inputs

    def __str__(self) -> str:
        return f"{self.op} {self.inputs}"

    def open(self) -> Call:
        return OPS[self.op](self.inputs)


def cells_of(inputs: Inputs) -> Iterator[Cell]:
    """Every op on these inputs."""
    return (Cell(op, inputs) for op in OPS)


def difference(expected: Results, found: Results) -> str:
    """What is wrong with ``found``, or ""."""
    for name, value in expected.equal.items():
        if not torch.equal(found.equal[name], value):
            return f"another {name}"
    for name, (value, distance, bound) in expected.near.items():
        off = distance(found.near[name].values, value)
        if not off <= bound:  # NaN is off
            return f"{name} off by {off:.1e}, {bound:.1e} is allowed"
    return ""


def _raw(name: str) -> Callable:
    """The op itself, counters an argument: the engine's would be a new set for every call in a graph."""
    return getattr(torch.ops.mod_kernels_triton, name).default


def _block(inputs: Inputs, in_place: bool, fed: bool = False) -> Call:
    spec, x, k = inputs.spec, inputs.x.clone(), inputs.spec.k
    counters = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    pooled = x.mean((2, 3), dtype=torch.float32) if fed else None
    arguments = (*spec.selector_arguments, pooled, k, *spec.conv_arguments, counters)
    op = _raw("mod_block_" if in_place else "mod_block")

    def read(returned: object) -> Results:
        y, logits = (x, returned) if in_place else returned
        index = reference.rank_channels(logits, k)
        equal = {"index": index, "channel that passes through": y[:, k:].clone(), "counters": counters.clone()}
        near = {"logits": Near(logits, relative_to_largest, LOGITS[x.dtype])}
        return Results(equal, near | _values(y[:, :k]))

    return Call(lambda: op(x, *arguments), read, (x, counters), (inputs.x, torch.zeros_like(counters)))


def _values(y: Tensor) -> dict[str, Near]:
    return {"values": Near(y.clone(), relative_norm, VALUES[y.dtype])}


def _select(inputs: Inputs) -> Call:
    op, arguments = _raw("select_channels"), (inputs.x, *inputs.spec.selector_arguments, None, inputs.spec.k)

    def read(returned: tuple[Tensor, Tensor]) -> Results:
        scores, index = returned
        return Results({"index": index}, {"scores": Near(scores, relative_to_largest, LOGITS[inputs.dtype])})

    return Call(lambda: op(*arguments), read, (), ())


def _scores_and_index(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(N, k) each: channels far apart, in an order of their own."""
    n, channels, k = *inputs.x.shape[:2], inputs.spec.k
    index = torch.arange(k, device=inputs.x.device).flip(0) * (channels // k)
    return torch.full((n, k), 0.5, device=inputs.x.device), index.expand(n, k).contiguous()


def _tail(inputs: Inputs) -> Call:
    x, (scores, index), k = inputs.x.clone(), _scores_and_index(inputs), inputs.spec.k
    op, arguments = _raw("tail_"), (scores, index, *inputs.spec.conv_arguments)

    def read(_: object) -> Results:
        return Results({"channel that passes through": x[:, k:].clone()}, _values(x[:, :k]))

    return Call(lambda: op(x, *arguments), read, (x,), (inputs.x,))


def _gather(inputs: Inputs) -> Call:
    op, (_, index) = _raw("gather_channels"), _scores_and_index(inputs)
    return Call(lambda: op(inputs.x, index), lambda out: Results({"channels": out}, {}), (), ())


def _fuse(inputs: Inputs, in_place: bool) -> Call:
    x, (scores, _), k = inputs.x.clone(), _scores_and_index(inputs), inputs.spec.k
    z = inputs.x[:, -k:].contiguous(memory_format=memory_format_of(x))
    op = _raw("fuse_channels_" if in_place else "fuse_channels")

    def read(returned: Tensor | None) -> Results:
        y = x if in_place else returned
        return Results({"channel that passes through": y[:, k:].clone()}, _values(y[:, :k]))

    return Call(lambda: op(x, z, scores, None, "first"), read, (x,), (inputs.x,))


def _add_relu_pool(inputs: Inputs, in_place: bool) -> Call:
    a, b = inputs.x.clone(), inputs.x.flip(1).contiguous(memory_format=memory_format_of(inputs.x))
    op = _raw("add_relu_pool_" if in_place else "add_relu_pool")

    def read(returned: object) -> Results:
        y, pooled = (a, returned) if in_place else returned
        return Results({"sum": y.clone()}, {"pooled": Near(pooled, relative_norm, VALUES[torch.float32])})

    return Call(lambda: op(a, b, True), read, (a,), (inputs.x,))


OPS: dict[str, Callable[[Inputs], Call]] = {
    "mod_block_": lambda inputs: _block(inputs, in_place=True),
    "mod_block": lambda inputs: _block(inputs, in_place=False),
    "mod_block_ fed": lambda inputs: _block(inputs, in_place=True, fed=True),
    "add_relu_pool_": lambda inputs: _add_relu_pool(inputs, in_place=True),
    "add_relu_pool": lambda inputs: _add_relu_pool(inputs, in_place=False),
    "select_channels": _select,
    "tail_": _tail,
    "gather_channels": _gather,
    "fuse_channels_": lambda inputs: _fuse(inputs, in_place=True),
    "fuse_channels": lambda inputs: _fuse(inputs, in_place=False),
}

"""The gradients of the numerics check: of every op that has one, and of a block in training.

Like the values they are judged given the kernel's own selection: what is compared with is the float64 formula at
the index and the scores that the forward gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _gradients, _training, backends, functional, reference
from ._fresh_memory import poisoned
from ._tolerances import VALUES
from ._verify_inputs import Inputs

PARAMETERS = ("fc1", "fc2", "bias1", "bias2")
FACTOR = 1.5  # of the conv block that stands in for one: z is the gathered channels times this


class Gradient(NamedTuple):
    """One gradient: what it is of, the engine's, the float64 one, and the same formula with all terms positive."""

    name: str
    found: Tensor | None
    expected: Tensor
    magnitude: Tensor

    @property
    def error(self) -> float:
        """|found - expected| over |magnitude|, as norms.

        Over |expected| it would be a matter of luck: with one living unit in the hidden layer the gradients are
        one sum of many terms, which may all but cancel. A step of a format's smallest numbers is rounding.
        """
        if self.found is None:
            return float("inf")
        difference = (self.found.double() - self.expected).abs()
        difference = difference.masked_fill(difference <= torch.finfo(self.found.dtype).smallest_normal / 1024, 0)
        size = float(torch.linalg.vector_norm(self.magnitude))
        off = float(torch.linalg.vector_norm(difference))
        return off / size if size else off

    @property
    def bound(self) -> float:
        return VALUES[torch.float64 if self.found is None else self.found.dtype]


def of_select(inputs: Inputs, given_pooled: bool) -> Iterator[Gradient]:
    """Of scores, in x (or pooled) and the selector's parameters."""
    x, spec = inputs.feature_map(), inputs.spec("bottleneck", "first")
    leaves = [_leaf(x), *map(_leaf, spec.selector_arguments)]
    pooled = _leaf(inputs.pooled()) if given_pooled else None
    with poisoned(), torch.enable_grad():
        w1, w2, b1, b2 = leaves[1:]
        scores, index = functional.select_channels(leaves[0], w1, w2, spec.k, b1, b2, pooled)
        ds = inputs.scores() - 0.5
        wanted = [pooled if given_pooled else leaves[0], *leaves[1:]]
        found = _gradients_of(scores, wanted, ds)
    both = []
    for signed in (True, False):
        dpooled, *parameters = _selector(x, spec, scores, index, ds, pooled, signed)
        spread = (dpooled / max(1, x[0, 0].numel()))[:, :, None, None].expand(x.shape)
        both.append((dpooled if given_pooled else spread, *parameters))
    yield from _named(("pooled" if given_pooled else "x", *PARAMETERS), found, *both)


def of_block(inputs: Inputs, position: str) -> Iterator[Gradient]:
    """Of a block in training, its conv block a factor: in x, through pass-through, gather and scores at once."""
    x, spec = inputs.feature_map(), inputs.spec("bottleneck", position)
    leaves = [_leaf(x), *map(_leaf, spec.selector_arguments)]
    with poisoned(), torch.enable_grad():
        selector = tuple(leaves[1:])
        engine = _training.serving(leaves[0], selector, spec.k, position, None, _training.BLOCK_OPS)
        if engine is None:  # the reference, whose autograd needs no Function
            scores, index = functional.select_channels(leaves[0], *selector[:2], spec.k, *selector[2:])
            onward, gathered = leaves[0], functional.gather_channels(leaves[0], index)
        else:
            onward, gathered, scores, index = _training.select_gather(engine, leaves[0], selector, spec.k, None)
        y = functional.fuse_channels(onward, gathered * FACTOR, scores, index, position)
        dy = inputs.residual()
        found = _gradients_of(y, leaves, dy)
    # z and dz as they are rounded on the way.
    z = (reference.gather_channels(x.double(), index) * FACTOR).to(x.dtype).double()
    own, both = scores.detach().double(), []
    for signed in (True, False):
        dy64, z = (dy.double(), z) if signed else (dy.double().abs(), z.abs())
        dz, ds = _gradients.fuse_channels_backward(dy64, z, own, index, position, True, True)
        dgathered = (dz.to(x.dtype) * FACTOR).double()
        dpooled, *parameters = _selector(x, spec, scores, index, ds, None, signed)
        dx = _gradients.input_gradient(dy64, dpooled, dgathered, index, None, None, "first")
        both.append((dx, *parameters))
    yield from _named(("x", *PARAMETERS), found, *both)


def of_ending(inputs: Inputs) -> Iterator[Gradient]:
    """Of add_relu_pool: in both of its inputs, through y and through pooled."""
    a, b = _leaf(inputs.feature_map()), _leaf(inputs.residual())
    with poisoned(), torch.enable_grad():
        y, pooled = functional.add_relu_pool(a, b)
        dy, dpooled = inputs.residual(), inputs.pooled()
        found = torch.autograd.grad([y, pooled], [a, b], [dy, dpooled])
    both = []
    for signed in (True, False):
        given = [one.double() if signed else one.double().abs() for one in (dy, dpooled)]
        da = _gradients.input_gradient(*given, None, None, y.detach().double(), None, "first")
        both.append((da, da))
    yield from _named(("a", "b"), found, *both)


def served(backend: str, inputs: Inputs) -> bool:
    """Whether the backend itself serves a training block of these inputs."""
    x, spec = inputs.feature_map(), inputs.spec("bottleneck", "first")
    w1, w2, b1, b2 = spec.selector_arguments
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("select_channels", (x, w1, w2, spec.k, b1, b2)),
        ("gather_channels", (x, inputs.index())),
        ("add_relu_pool", (x, None)),
    ]
    with backends.use_backend(backend):
        return all(functional.explain(op, *arguments).backend == backend for op, arguments in calls)


def _selector(x, spec, scores, index, ds, pooled, signed: bool) -> tuple[Tensor, ...]:
    """dpooled and the parameters' gradients, in float64; not ``signed``: with every factor's absolute value."""
    w1, w2, b1, _ = spec.selector_arguments
    means = x.double().mean((2, 3)) if pooled is None else pooled.detach().double()
    bias = None if b1 is None else b1.double()
    hidden = torch.relu(torch.nn.functional.linear(means, w1.double(), bias))
    ds, w1, w2 = ds.double(), w1.double(), w2.double()
    if not signed:
        alive = hidden > 0
        ds, means, w1, w2 = ds.abs(), means.abs(), w1.abs(), w2.abs()
        hidden = torch.nn.functional.linear(means, w1, None if bias is None else bias.abs()) * alive
    needed = (True,) * 5
    own = scores.detach().double()
    return _gradients.select_channels_backward(ds, own, index, hidden, means, w1, w2, *needed)


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()


def _gradients_of(output: Tensor, leaves: list[Tensor | None], gradient: Tensor) -> list[Tensor | None]:
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(output, given, gradient, allow_unused=True))
    return [None if leaf is None else next(found) for leaf in leaves]


def _named(names, found, expected, magnitude) -> Iterator[Gradient]:
    for one in map(Gradient, names, found, expected, magnitude):
        if not (one.name.startswith("bias") and one.found is None):
            yield one

"""A MoD block in training: two Functions around its conv block, and the pair that spares a second map.

``select_gather`` -> any conv block -> :func:`mod_kernels.functional.fuse_channels`, whose gradient of x is the
block's dy as it came. All gradients of x then meet in one backward, which is one pass over the map.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks, _gradients
from ._autograd import (
    fusion_gradients,
    input_gradient,
    keep_fusion,
    keep_map,
    select_saving,
    selection_gradients,
)
from ._layout import OTHER, layout_of, memory_format_of
from .backends import Engine, choose
from .functional import cast_like, fuse_arguments, row_major, select_call

# What an engine must serve for a block's gradients.
BLOCK_OPS = ("select_channels", "gather_channels")

Selector = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # fc1_weight, fc2_weight, fc1_bias, fc2_bias


def serving(x: Tensor, selector: Selector, k: int, position: str, pooled: Tensor | None, ops: tuple[str, ...]):
    """The one engine that serves all of ``ops`` on x; None where there is none, x is of another layout, or the
    reference was asked for. Checks the selector's arguments.
    """
    fc1_weight, fc2_weight, fc1_bias, fc2_bias = selector
    call = select_call(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)
    call = call._replace(layout=layout_of(x), position=position)
    if call.layout == OTHER:
        return None
    engines = {choose(call._replace(op=op)) for op in ops}
    return engines.pop() if len(engines) == 1 else None


def select_gather(
    engine: Engine, x: Tensor, selector: Selector, k: int, pooled: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x to be fused into, the gathered channels, scores and index, all with gradients."""
    arguments = (*map(row_major, selector), row_major(pooled), k)
    return SelectGather.apply(engine.ops, x, *arguments)[:4]


class Pair:
    """The residual ending of a block, and the MoD block after it, which writes into what the ending wrote.

    ``out`` and ``identity`` (N, C, H, W), or None, of one dtype; out is written: nothing else may read it.
    """

    OPS = ("add_relu_pool_", "select_channels", "gather_channels", "fuse_channels_")

    def __init__(self, engine: Engine, position: str) -> None:
        self._engine, self._position, self._overwritten = engine, position, Overwritten()

    def begin(self, out: Tensor, identity: Tensor | None, selector: Selector, k: int) -> tuple[Tensor, ...]:
        """``out = relu(out + identity)``; x, the gathered channels, scores and index."""
        if identity is not None and layout_of(identity) != layout_of(out):
            identity = identity.contiguous(memory_format=memory_format_of(out))
        arguments = (out, identity, *map(row_major, selector), k)
        return EndingSelectGather_.apply(self._engine.ops, self._overwritten, self._position, *arguments)[:4]

    def end(self, x: Tensor, z: Tensor, scores: Tensor, index: Tensor) -> Tensor:
        """The fusion into x, which is returned."""
        z = cast_like(x, z)
        _checks.fusion(x, z, scores, index, self._position)
        arguments = (x, *fuse_arguments(z, scores, index), self._position)
        return FuseOverwriting_.apply(self._engine.ops, self._overwritten, *arguments)


class SelectGather(Function):
    """:class:`~mod_kernels._autograd.SelectChannels` and the gathering on one x, and x itself handed on as a view.

    Returns x, the gathered channels (N, k, H, W), scores, index, and hidden and pooled for second derivatives.
    """

    @staticmethod
    def forward(ctx, ops, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
        selector = (fc1_weight, fc2_weight, fc1_bias, fc2_bias)
        scores, index, hidden, pooled_out = select_saving(ctx, ops, x, *selector, pooled, k)
        keep_map(ctx, x)
        ctx.pooled_given = pooled is not None
        return x.view_as(x), ops["gather_channels"](x, index), scores, index, hidden, pooled_out

    @staticmethod
    def backward(ctx, dy, dgathered, dscores, _, dhidden, dpooled):
        _, x_needed, *parameters_needed, pooled_needed, _ = ctx.needs_input_grad
        pools, saved = x_needed and not ctx.pooled_given, ctx.saved_tensors
        dpooled, *parameters = selection_gradients(
            ctx,
            saved,
            dscores,
            dhidden,
            None if ctx.pooled_given else dpooled,
            pools or pooled_needed,
            parameters_needed,
        )
        dx = None
        if x_needed:
            dx = input_gradient(ctx, dy, dpooled if pools else None, dgathered, saved[1])
        return None, dx, *parameters, dpooled if pooled_needed else None, None


class Overwritten:
    """What the fusion's backward hands to that of the ending before it: y as it is now, and what stood in P.

    Autograd lets go of the tensors a node saved once its backward has run; this holds them for one step more. Of a
    backward that is itself to be differentiated it keeps them: then the ending's alone runs again.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None
        self._differentiated = False

    def put(self, y: Tensor, channels: Tensor) -> None:
        self._kept = y, channels
        self._differentiated |= torch.is_grad_enabled()

    def take(self) -> tuple[Tensor, Tensor]:
        """Raises RuntimeError where no gradient came through the fusion."""
        kept = self._kept
        if kept is None:
            raise RuntimeError(
                "a gradient reached the inside of a MoD block but not its output, which its MoDStage writes into: "
                "let the loss depend on the block's output, or run the stage's blocks as nn.Sequential"
            )
        if not self._differentiated:
            self._kept = None
        return kept


class EndingSelectGather_(Function):
    """``a = relu(a + b)`` in place and :class:`SelectGather` on it, for a fusion that will write into a.

    The ReLU's backward needs its output, of which the fusion overwrites the k channels P.
    :class:`FuseOverwriting_` keeps those and hands them over; the rest is read where it is. So the two blocks have
    one map in memory where the plain form has two.
    """

    @staticmethod
    def forward(ctx, ops, overwritten, position, a, b, fc1_weight, fc2_weight, fc1_bias, fc2_bias, k):
        ctx.mark_dirty(a)
        pooled = ops["add_relu_pool_"](a, b, True)
        selector = (fc1_weight, fc2_weight, fc1_bias, fc2_bias)
        scores, index, hidden, _ = select_saving(ctx, ops, a, *selector, pooled, k)
        keep_map(ctx, a)
        ctx.overwritten, ctx.position = overwritten, position
        return a, ops["gather_channels"](a, index), scores, index, hidden, pooled

    @staticmethod
    def backward(ctx, dy, dgathered, dscores, _, dhidden, dpooled):
        _, _, _, a_needed, b_needed, *parameters_needed, _ = ctx.needs_input_grad
        y, channels = ctx.overwritten.take()
        maps_needed, saved = a_needed or b_needed, ctx.saved_tensors
        dpooled, *parameters = selection_gradients(
            ctx, saved, dscores, dhidden, dpooled, maps_needed, parameters_needed
        )
        da = None
        if maps_needed:
            da = input_gradient(ctx, dy, dpooled, dgathered, saved[1], y, channels, ctx.position)
        return None, None, None, da if a_needed else None, da if b_needed else None, *parameters, None


class FuseOverwriting_(Function):
    """The in-place fusion into what :class:`EndingSelectGather_` wrote, keeping what stood in P."""

    @staticmethod
    def forward(ctx, ops, overwritten, x, z, scores, index, position):
        ctx.mark_dirty(x)
        channels = _gradients.channels_of(x, z.shape[1], index, position).clone(memory_format=memory_format_of(x))
        ops["fuse_channels_"](x, z, scores, index, position)
        keep_fusion(ctx, ops, x, z, scores, index, position, x, channels)
        ctx.overwritten = overwritten
        return x

    @staticmethod
    def backward(ctx, dy):
        z, scores, index, y, channels = ctx.saved_tensors
        ctx.overwritten.put(y, channels)
        gradients = fusion_gradients(ctx, dy, z, scores, index, ctx.needs_input_grad[2:5])
        return None, None, *gradients, None, None

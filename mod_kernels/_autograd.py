"""Gradients of the engine-served ops: what is saved, and which backward op is called.

Each Function takes the engine's raw ops first; :mod:`mod_kernels.functional` and the modules enter one only when a
gradient is needed. Saved for backward are k-channel tensors and (N, C)-sized ones, never a copy of x.
The reference needs none of this: autograd goes through its ATen ops.

The engine's backward kernels run where the gradient is not to be differentiated. Where it is (``create_graph``
in eager mode), and for an engine without them, :mod:`mod_kernels._gradients` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from . import _gradients
from ._layout import CHANNELS_LAST, NCHW, layout_of
from ._library import accumulation_dtype

Ops = dict[str, Callable]


def needed(*tensors: Tensor | None) -> bool:
    """Whether a gradient would flow to any of ``tensors``."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def backward_op(ops: Ops, name: str) -> Callable:
    """The engine's backward op, or its composed form."""
    differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return getattr(_gradients, name) if differentiated or name not in ops else ops[name]


def dense(gradient: Tensor, layout: str) -> Tensor:
    """``gradient`` as kernels read it: dense, in the layout of the map it is of."""
    if layout_of(gradient) == layout:
        return gradient
    return gradient.contiguous(memory_format=_FORMATS[layout])


_FORMATS = {NCHW: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}


def select_saving(ctx, ops, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
    """Scores, index, hidden and pooled_out; what :func:`selection_gradients` reads is saved."""
    saving = ops["select_channels_saving"]
    scores, index, _, hidden, pooled_out = saving(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
    means = pooled_out if pooled is None else pooled
    ctx.save_for_backward(scores, index, hidden, means, fc1_weight, fc2_weight)
    ctx.ops = ops
    ctx.dtypes = [None if one is None else one.dtype for one in (fc1_weight, fc2_weight, fc1_bias, fc2_bias)]
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    return scores, index, hidden, pooled_out


def selection_gradients(ctx, saved, dscores, dhidden, dpooled, pooled_needed, parameters_needed):
    """dpooled, then those of fc1_weight, fc2_weight, fc1_bias, fc2_bias in their own dtypes.

    ``dhidden`` and ``dpooled`` come with second derivatives alone; the composed form then takes them.
    """
    wanted = (pooled_needed, *parameters_needed)
    if not any(wanted):
        return (None,) * 5
    if dscores is None or dhidden is not None:
        found = _gradients.select_channels_backward(dscores, *saved, *wanted, dhidden=dhidden)
    else:
        found = backward_op(ctx.ops, "select_channels_backward")(dscores.contiguous(), *saved, *wanted)
    found = [one if is_wanted else None for one, is_wanted in zip(found, wanted, strict=True)]
    if dpooled is not None and pooled_needed:
        found[0] = dpooled if found[0] is None else found[0] + dpooled
    cast = [None if one is None else one.to(to) for one, to in zip(found[1:], ctx.dtypes, strict=True)]
    return (found[0], *cast)


def keep_map(ctx, x):
    """Note what a gradient of x is made from where there is none to add to."""
    ctx.shape, ctx.dtype, ctx.device, ctx.layout = x.shape, x.dtype, x.device, layout_of(x)


def zeros(ctx) -> Tensor:
    """A map of zeros."""
    fresh = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
    return fresh.contiguous(memory_format=_FORMATS[ctx.layout])


def input_gradient(ctx, dy, dpooled, dgathered, index, y=None, overwritten=None, position="first"):
    """The one pass over a map's gradient; without dy over zeros. ctx knows the map (:func:`keep_map`)."""
    if dy is None:
        dy = zeros(ctx)
    # No generator: Dynamo (torch 2.14) fails on one that runs into another call.
    maps = [None if one is None else dense(one, ctx.layout) for one in (dy, dgathered, y, overwritten)]
    dy, dgathered, y, overwritten = maps
    dpooled = None if dpooled is None else dpooled.contiguous()
    return backward_op(ctx.ops, "input_gradient")(dy, dpooled, dgathered, index, y, overwritten, position)


class SelectChannels(Function):
    """``scores = sigmoid(relu(pooled W1' + b1) W2' + b2)`` at the selected channels; index has no gradient.

    The gradients are those of :func:`mod_kernels._gradients.select_channels_backward`;
    ``dx = dpooled / (H W)`` spread over each plane.

    hidden and pooled are outputs too, beside the public scores and index: the backward is then a function of
    inputs and outputs alone, and a second derivative through it is right.
    """

    @staticmethod
    def forward(ctx, ops, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
        ctx.x_shape, ctx.x_dtype, ctx.pooled_given = x.shape, x.dtype, pooled is not None
        return select_saving(ctx, ops, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)

    @staticmethod
    def backward(ctx, dscores, _, dhidden, dpooled):
        _, x_needed, *parameters_needed, pooled_needed, _ = ctx.needs_input_grad
        pools = x_needed and not ctx.pooled_given
        means = None if ctx.pooled_given else dpooled
        saved, needed_means = ctx.saved_tensors, pools or pooled_needed
        dpooled, *parameters = selection_gradients(
            ctx, saved, dscores, dhidden, means, needed_means, parameters_needed
        )
        dx = None
        if pools and dpooled is not None:
            _, _, h, w = ctx.x_shape
            dx = (dpooled / (h * w)).to(ctx.x_dtype)[:, :, None, None].expand(ctx.x_shape)
        return None, dx, *parameters, dpooled if pooled_needed else None, None


class GatherChannels(Function):
    """``G = x[:, index]``; ``dx`` is zero but ``dx[n, index[n, j]] += dG[n, j]``."""

    @staticmethod
    def forward(ctx, ops, x, index):
        ctx.save_for_backward(index)
        ctx.ops = ops
        keep_map(ctx, x)
        return ops["gather_channels"](x, index)

    @staticmethod
    def backward(ctx, dgathered):
        (index,) = ctx.saved_tensors
        return None, _scattered(ctx.ops, zeros(ctx), dense(dgathered, ctx.layout), index), None


def _scattered(ops: Ops, zeros: Tensor, dgathered: Tensor, index: Tensor) -> Tensor:
    """``dgathered`` added up at its channels; index may repeat one, and the order is then that of j."""
    if torch.is_grad_enabled():
        return zeros.scatter_add(1, _gradients.spread(index, dgathered), dgathered)
    ones = torch.ones(index.shape, dtype=accumulation_dtype(zeros.dtype), device=zeros.device)
    ops["fuse_channels_"](zeros, dgathered, ones, index, "original")
    return zeros


class FuseChannels(Function):
    """``y = x``, ``y[:, P] += s z``: ``dx = dy``, ``dz = s dy[:, P]``, ``ds = sum of z dy[:, P]`` over a plane."""

    @staticmethod
    def forward(ctx, ops, x, z, scores, index, position):
        keep_fusion(ctx, ops, x, z, scores, index, position)
        return ops["fuse_channels"](x, z, scores, index, position)

    @staticmethod
    def backward(ctx, dy):
        gradients = fusion_gradients(ctx, dy, *ctx.saved_tensors, ctx.needs_input_grad[1:4])
        return None, *gradients, None, None


class FuseChannels_(Function):
    """:class:`FuseChannels` in place: x is marked dirty, so autograd knows of the write."""

    @staticmethod
    def forward(ctx, ops, x, z, scores, index, position):
        ctx.mark_dirty(x)
        ops["fuse_channels_"](x, z, scores, index, position)
        keep_fusion(ctx, ops, x, z, scores, index, position)
        return x

    @staticmethod
    def backward(ctx, dy):
        gradients = fusion_gradients(ctx, dy, *ctx.saved_tensors, ctx.needs_input_grad[1:4])
        return None, *gradients, None, None


def keep_fusion(ctx, ops, x, z, scores, index, position, *more):
    """Save what :func:`fusion_gradients` reads, and more."""
    ctx.save_for_backward(z, scores, index, *more)
    ctx.ops, ctx.position, ctx.layout = ops, position, layout_of(x)


def fusion_gradients(ctx, dy, z, scores, index, needed):
    """Those of x, z and scores, each if needed."""
    x_needed, z_needed, scores_needed = needed
    dz = dscores = None
    if z_needed or scores_needed:
        op = backward_op(ctx.ops, "fuse_channels_backward")
        dy_dense, z = dense(dy, ctx.layout), dense(z, ctx.layout)
        dz, dscores = op(dy_dense, z, scores, index, ctx.position, z_needed, scores_needed)
    return dy if x_needed else None, dz if z_needed else None, dscores if scores_needed else None


class AddReluPool(Function):
    """``y = relu(a + b)``, ``pooled = y.mean((2, 3))``: ``da = db = (dy + dpooled / (H W))`` where ``y > 0``."""

    @staticmethod
    def forward(ctx, ops, a, b, relu):
        y, pooled = ops["add_relu_pool"](a, b, relu)
        _keep_ending(ctx, ops, y, relu)
        return y, pooled

    @staticmethod
    def backward(ctx, dy, dpooled):
        return _add_relu_pool_backward(ctx, dy, dpooled)


class AddReluPool_(Function):
    """:class:`AddReluPool` in place."""

    @staticmethod
    def forward(ctx, ops, a, b, relu):
        ctx.mark_dirty(a)
        pooled = ops["add_relu_pool_"](a, b, relu)
        _keep_ending(ctx, ops, a, relu)
        return a, pooled

    @staticmethod
    def backward(ctx, dy, dpooled):
        return _add_relu_pool_backward(ctx, dy, dpooled)


def _keep_ending(ctx, ops, y, relu):
    ctx.save_for_backward(y if relu else None)
    ctx.ops = ops
    keep_map(ctx, y)
    ctx.set_materialize_grads(False)


def _add_relu_pool_backward(ctx, dy, dpooled):
    (y,) = ctx.saved_tensors
    _, a_needed, b_needed, _ = ctx.needs_input_grad
    gradient = input_gradient(ctx, dy, dpooled, None, None, y)
    return None, gradient if a_needed else None, gradient if b_needed else None, None

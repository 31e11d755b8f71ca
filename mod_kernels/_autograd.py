"""Gradients of the engine-served ops: what is saved, and the backward, composed of PyTorch ops for now.

Each Function takes the engine's raw op as its first argument; :mod:`mod_kernels.functional` enters one only
when a gradient is needed. Saved for backward are k-channel tensors and (N, C)-sized ones, never a copy of x.
The reference needs none of this: autograd goes through its ATen ops.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from ._layout import memory_format_of


def needed(*tensors: Tensor | None) -> bool:
    """Whether a gradient would flow to any of ``tensors``."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class SelectChannels(Function):
    """``scores = sigmoid(relu(pooled W1' + b1) W2' + b2)`` at the selected channels; index has no gradient.

    With ds (N, k) the gradient of scores, everything in the accumulation dtype:
    ``dlogits[n, index[n, j]] = ds * s * (1 - s)``, zero elsewhere; ``dW2 = dlogits' hidden``;
    ``dhidden = dlogits W2`` where ``hidden > 0``; ``dW1 = dhidden' pooled``; ``dpooled = dhidden W1``;
    ``dx = dpooled / (H W)`` spread over each plane.

    hidden and pooled are outputs too, beside the public scores and index: the backward is then a function of
    inputs and outputs alone, and a second derivative through it is right.
    """

    @staticmethod
    def forward(ctx, op, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
        # op is select_channels_saving.
        scores, index, _, hidden, pooled_out = op(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
        ctx.save_for_backward(
            scores, index, hidden, pooled_out if pooled is None else pooled, fc1_weight, fc2_weight
        )
        ctx.x_shape, ctx.x_dtype, ctx.pooled_given = x.shape, x.dtype, pooled is not None
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (fc1_bias, fc2_bias)]
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return scores, index, hidden, pooled_out

    @staticmethod
    def backward(ctx, dscores, _, dhidden, dpooled):
        scores, index, hidden, pooled, fc1_weight, fc2_weight = ctx.saved_tensors
        _, x_needed, fc1_needed, fc2_needed, b1_needed, b2_needed, pooled_needed, _ = ctx.needs_input_grad
        below_fc2 = x_needed or pooled_needed or fc1_needed or b1_needed
        dx = dfc1 = dfc2 = db1 = db2 = None
        with torch.autocast(scores.device.type, enabled=False):
            if dscores is not None:
                dlogits = scores.new_zeros(pooled.shape).scatter(1, index, dscores * scores * (1 - scores))
                dfc2 = (dlogits.t() @ hidden).to(fc2_weight.dtype) if fc2_needed else None
                db2 = dlogits.sum(0).to(ctx.bias_dtypes[1]) if b2_needed else None
                if below_fc2:
                    dhidden = _sum(dhidden, dlogits @ fc2_weight.to(scores.dtype))
            if dhidden is not None and below_fc2:
                # As torch's ReLU: a NaN is not <= 0, so its gradient passes.
                dhidden = dhidden.masked_fill(hidden <= 0, 0)
                dfc1 = (dhidden.t() @ pooled).to(fc1_weight.dtype) if fc1_needed else None
                db1 = dhidden.sum(0).to(ctx.bias_dtypes[0]) if b1_needed else None
                if x_needed or pooled_needed:
                    dpooled = _sum(None if ctx.pooled_given else dpooled, dhidden @ fc1_weight.to(scores.dtype))
        if dpooled is not None and x_needed and not ctx.pooled_given:
            _, _, h, w = ctx.x_shape
            dx = (dpooled / (h * w)).to(ctx.x_dtype)[:, :, None, None].expand(ctx.x_shape)
        return None, dx, dfc1, dfc2, db1, db2, dpooled if pooled_needed else None, None


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


class GatherChannels(Function):
    """``G = x[:, index]``; ``dx`` is zero but ``dx[n, index[n, j]] += dG[n, j]``."""

    @staticmethod
    def forward(ctx, op, x, index):
        ctx.save_for_backward(index)
        ctx.x_shape, ctx.memory_format = x.shape, memory_format_of(x)
        return op(x, index)

    @staticmethod
    def backward(ctx, dgathered):
        (index,) = ctx.saved_tensors
        dx = torch.zeros(ctx.x_shape, dtype=dgathered.dtype, device=dgathered.device)
        dx = dx.contiguous(memory_format=ctx.memory_format)
        return None, dx.scatter_add(1, _spread(index, dgathered), dgathered), None


class FuseChannels(Function):
    """``y = x``, ``y[:, P] += s z``: ``dx = dy``, ``dz = s dy[:, P]``, ``ds = sum of z dy[:, P]`` over a plane."""

    @staticmethod
    def forward(ctx, op, x, z, scores, index, position):
        ctx.save_for_backward(z, scores, index)
        ctx.position = position
        return op(x, z, scores, index, position)

    @staticmethod
    def backward(ctx, dy):
        return _fuse_backward(ctx, dy)


class FuseChannels_(Function):
    """:class:`FuseChannels` in place: x is marked dirty, so autograd knows of the write."""

    @staticmethod
    def forward(ctx, op, x, z, scores, index, position):
        ctx.mark_dirty(x)
        op(x, z, scores, index, position)
        ctx.save_for_backward(z, scores, index)
        ctx.position = position
        return x

    @staticmethod
    def backward(ctx, dy):
        return _fuse_backward(ctx, dy)


def _fuse_backward(ctx, dy):
    z, scores, index = ctx.saved_tensors
    _, x_needed, z_needed, scores_needed, _, _ = ctx.needs_input_grad
    k, channels = z.shape[1], dy.shape[1]
    if ctx.position == "original":
        at_target = dy.gather(1, _spread(index, dy))
    else:
        at_target = dy.narrow(1, 0 if ctx.position == "first" else channels - k, k)
    at_target = at_target.to(scores.dtype)
    dz = (at_target * scores[:, :, None, None]).to(z.dtype) if z_needed else None
    dscores = (at_target * z.to(scores.dtype)).sum((2, 3)) if scores_needed else None
    return None, dy if x_needed else None, dz, dscores, None, None


class AddReluPool(Function):
    """``y = relu(a + b)``, ``pooled = y.mean((2, 3))``: ``da = db = (dy + dpooled / (H W))`` where ``y > 0``."""

    @staticmethod
    def forward(ctx, op, a, b, relu):
        y, pooled = op(a, b, relu)
        ctx.save_for_backward(y if relu else None)
        return y, pooled

    @staticmethod
    def backward(ctx, dy, dpooled):
        return _add_relu_pool_backward(ctx, dy, dpooled)


class AddReluPool_(Function):
    """:class:`AddReluPool` in place."""

    @staticmethod
    def forward(ctx, op, a, b, relu):
        ctx.mark_dirty(a)
        pooled = op(a, b, relu)
        ctx.save_for_backward(a if relu else None)
        return a, pooled

    @staticmethod
    def backward(ctx, dy, dpooled):
        return _add_relu_pool_backward(ctx, dy, dpooled)


def _add_relu_pool_backward(ctx, dy, dpooled):
    (y,) = ctx.saved_tensors
    _, a_needed, b_needed, _ = ctx.needs_input_grad
    _, _, h, w = dy.shape
    grad = dy + (dpooled / (h * w)).to(dy.dtype)[:, :, None, None]
    if y is not None:
        grad = grad.masked_fill(y <= 0, 0)
    return None, grad if a_needed else None, grad if b_needed else None, None


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """index (N, k) as (N, k, H, W)."""
    return index[:, :, None, None].expand(-1, -1, *x.shape[2:])

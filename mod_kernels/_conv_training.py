"""The gradients of a narrowed conv block in training, as one op forward and one backward.

As PyTorch ops the block is a dozen passes over k channels, and as many again backward; the engine's ops convolve,
sum for the batch norm and normalise sample by sample. Which modules may be run so is for
:mod:`mod_kernels.nn._conv_training` to say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from . import _autocast, _autograd
from ._layout import NCHW, layout_of
from ._tracing import exporting
from .backends import Call, Engine, offered


class Norms(NamedTuple):
    """What the batch norms of a block have in common, as the ops take it.

    The running statistics, one of each a layer, are written where ``batch_statistics``, else read; empty where the
    norms have none.
    """

    running_means: list[Tensor]
    running_vars: list[Tensor]
    batch_statistics: bool
    momentum: float
    eps: float


def serving(x: Tensor) -> Engine | None:
    """The engine that trains a conv block on x; None where there is none, or where PyTorch has to see each op."""
    if (
        torch.compiler.is_compiling()
        or exporting()
        or torch.jit.is_tracing()
        or type(x) is not Tensor
        or x.ndim != 4
        or x.numel() == 0
        or _autocast.is_on(x.device.type)
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    k = x.shape[1]
    return offered(Call("conv_block_saving", x.device.type, x.dtype, layout_of(x), k, k))


def conv_block(
    engine: Engine, x: Tensor, flat: list[Tensor], layers: int, norms: Norms, final_relu: bool
) -> Tensor:
    """z with gradients. ``flat``: the weights of all layers, then the norms' weights and biases, if any."""
    return TrainedConvBlock.apply(engine.ops, layers, norms, final_relu, x, *flat)


class TrainedConvBlock(Function):
    """x and the parameters to z; formulas in csrc/cpu/conv_training.h.

    Saved are x, the convolutions' outputs and the statistics that normalised them: no normalised map.
    """

    @staticmethod
    def forward(ctx, ops, layers, norms, final_relu, x, *flat):
        parameters = _by_kind(flat, layers)
        z, convolved, statistics = ops["conv_block_saving"](x, *parameters, *norms, final_relu)
        if norms.batch_statistics and norms.running_means:
            # A raw op's write: whoever kept what was made of the statistics, a fold for one, is to see it.
            increment_version([*norms.running_means, *norms.running_vars])
        ctx.save_for_backward(x, convolved, statistics, *flat)
        ctx.ops, ctx.layers, ctx.norms, ctx.final_relu = ops, layers, norms, final_relu
        return z

    @staticmethod
    def backward(ctx, dz):
        x, convolved, statistics, *flat = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():  # the gradient is itself to be differentiated, which no raw op can be
            return (None,) * 4 + _composed(ctx, dz, x, statistics, flat, needed)
        if _is_batched(dz):
            with torch.enable_grad():
                return (None,) * 4 + _composed(ctx, dz, x, statistics, flat, needed)
        parameters = _by_kind(flat, ctx.layers)
        every = needed + [False] * (1 + 3 * ctx.layers - len(needed))
        dx, dflat = ctx.ops["conv_block_backward"](
            _autograd.dense(dz, NCHW),
            x,
            convolved,
            statistics,
            *parameters,
            ctx.norms.batch_statistics,
            ctx.final_relu,
            every,
        )
        found = zip((dx, *dflat), needed, strict=False)
        return (None,) * 4 + tuple(one if is_needed else None for one, is_needed in found)


def _is_batched(dz: Tensor) -> bool:
    """Whether it is many at once, as torch.autograd.grad(is_grads_batched=True) gives; an op with lists of tensors
    has no batching rule.
    """
    return torch._C._functorch.is_legacy_batchedtensor(dz) or torch._C._functorch.is_batchedtensor(dz)


def _by_kind(flat, layers: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, the norms' weights, the norms' biases."""
    return list(flat[:layers]), list(flat[layers : 2 * layers]), list(flat[2 * layers :])


def _composed(ctx, dz, x, statistics, flat, needed):
    """The same gradients from the block run again in PyTorch ops, which autograd can differentiate once more."""
    # Through views of their own: a parameter may also be behind x, and its gradient from there is not this node's.
    inputs = [one.view_as(one) for one in (x, *flat)]
    weights, norm_weights, norm_biases = _by_kind(inputs[1:], ctx.layers)
    y, first = inputs[0], 0
    for layer, weight in enumerate(weights):
        c = F.conv2d(y, weight, padding=weight.shape[2] // 2)
        scale, shift = (kind[layer] if kind else None for kind in (norm_weights, norm_biases))
        if ctx.norms.batch_statistics:
            y = F.batch_norm(c, None, None, scale, shift, True, 0.0, ctx.norms.eps)
        else:
            mean, inverse = (one[first : first + len(weight), None, None] for one in statistics)
            y = (c - mean) * inverse
            y = y if scale is None else y * scale[:, None, None] + shift[:, None, None]
        first += len(weight)
        if layer + 1 < ctx.layers or ctx.final_relu:
            y = F.relu(y)
    wanted = [one for one, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(y, wanted, dz, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)

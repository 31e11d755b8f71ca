"""The specification: every public op in plain PyTorch, slow and exact, with gradients by autograd.

The engines are held to this file. It differs from the code people write (:mod:`mod_kernels.plain`) where that
code leaves something open: equal logits go to the lower channel (stable sort; ``torch.topk`` promises no order
among equals), a NaN logit ranks first, ranking is on the logits and not on sigmoids that saturate into ties,
and nothing between the convolutions is rounded to a narrower dtype.

Shapes: x (N, C, H, W); fc1_weight (R, C); fc2_weight (C, R); 1 <= k <= C. Arithmetic is in float32 for float16,
bfloat16 and float32 inputs and in float64 for float64 (pass ``x.double()`` and double weights for an oracle).
Source: arXiv 2409.17016, section 3; what the paper leaves open is settled above.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autocast
from ._layout import memory_format_of
from ._library import accumulation_dtype
from .spec import CONV_KINDS, LAYER_NORM_EPS, MoDSpec


def selector_logits(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    pooled: Tensor | None = None,
) -> Tensor:
    """``relu(pooled @ fc1_weight.T + b1) @ fc2_weight.T + b2`` with ``pooled = x.mean((2, 3))``: (N, C)."""
    dtype = accumulation_dtype(x.dtype)
    with _autocast.outside(x.device.type):
        if pooled is None:
            pooled = x.mean((2, 3), dtype=dtype)
        hidden = F.relu(F.linear(pooled.to(dtype), fc1_weight.to(dtype), _cast(fc1_bias, dtype)))
        return F.linear(hidden, fc2_weight.to(dtype), _cast(fc2_bias, dtype))


def rank_channels(logits: Tensor, k: int) -> Tensor:
    """Channels of the k largest logits per row, descending, ties to the lower channel, NaN first: (N, k) int64."""
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k].contiguous()


def select_channels(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    k: int,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores (N, k), the sigmoids of the k largest logits, and their channels (N, k) int64."""
    logits = selector_logits(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled)
    index = rank_channels(logits.detach(), k)
    return torch.sigmoid(logits.gather(1, index)), index


def gather_channels(x: Tensor, index: Tensor) -> Tensor:
    """``out[n, j] = x[n, index[n, j]]``: (N, k, H, W) in x's layout."""
    # Not torch.gather: its backward keeps x, and x may be written into next (fuse_channels_).
    gathered = x[torch.arange(x.shape[0], device=x.device)[:, None], index]
    return gathered.contiguous(memory_format=memory_format_of(x))


def fuse_channels(
    x: Tensor, z: Tensor, scores: Tensor, index: Tensor | None = None, position: str = "first"
) -> Tensor:
    """``y = x``, then ``y[:, P] += scores[:, :, None, None] * z``; P the first k, the last k, or ``index``."""
    y = x.clone(memory_format=memory_format_of(x))
    return fuse_channels_(y, z, scores, index, position)


def fuse_channels_(
    x: Tensor, z: Tensor, scores: Tensor, index: Tensor | None = None, position: str = "first"
) -> Tensor:
    """:func:`fuse_channels` written into x, which is returned. The sum is rounded once, to x's dtype."""
    dtype = accumulation_dtype(x.dtype)
    scaled = scores.to(dtype)[:, :, None, None] * z.to(dtype)
    k = z.shape[1]
    if position == "original":
        # Repeated channels add up before the one rounding; untouched ones keep their bits (a NaN's payload
        # would not survive the way through another dtype).
        total = x.to(dtype).scatter_add(1, _spread(index, x), scaled).to(x.dtype)
        touched = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, index, True)
        return x.copy_(torch.where(touched[:, :, None, None], total, x))
    first = 0 if position == "first" else x.shape[1] - k
    target = x.narrow(1, first, k)
    target.copy_(target.to(dtype) + scaled)
    return x


def add_relu_pool(a: Tensor, b: Tensor | None = None, relu: bool = True) -> tuple[Tensor, Tensor]:
    """``y = relu(a + b)`` (each part optional) and ``pooled = y.mean((2, 3))`` in the accumulation dtype."""
    y = a if b is None else a + b
    y = F.relu(y) if relu else y
    y = y.clone(memory_format=memory_format_of(a)) if y is a else y.contiguous(memory_format=memory_format_of(a))
    return y, y.mean((2, 3), dtype=accumulation_dtype(y.dtype))


def add_relu_pool_(a: Tensor, b: Tensor | None = None, relu: bool = True) -> tuple[Tensor, Tensor]:
    """:func:`add_relu_pool` written into a; returns ``(a, pooled)``."""
    if b is not None:
        a.add_(b)
    if relu:
        a.relu_()
    return a, a.mean((2, 3), dtype=accumulation_dtype(a.dtype))


def narrow_conv_block(x: Tensor, spec: MoDSpec) -> Tensor:
    """The narrowed conv block with its norms folded, (N, k, H, W) to the same.

    Convolutions, and between them what :data:`mod_kernels.spec.CONV_KINDS` says of the kind. In the accumulation
    dtype throughout; a ReLU after the last one only where ``spec.final_relu``.
    """
    dtype = accumulation_dtype(x.dtype)
    following = (*CONV_KINDS[spec.kind].between, "relu" if spec.final_relu else "nothing")
    with _autocast.outside(x.device.type):
        z = x.to(dtype)
        for weight, bias, then in zip(spec.conv_weights, spec.conv_biases, following, strict=True):
            groups = z.shape[1] // weight.shape[1]
            z = F.conv2d(z, weight.to(dtype), bias.to(dtype), padding=weight.shape[-1] // 2, groups=groups)
            z = _BETWEEN[then](z)
    return z


def _layer_norm(z: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the channels of every pixel."""
    centred = z - z.mean(1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + LAYER_NORM_EPS)


_BETWEEN = {"relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "layer_norm": _layer_norm, "nothing": lambda z: z}


def mod_block(x: Tensor, spec: MoDSpec, pooled: Tensor | None = None) -> Tensor:
    """The whole block for inference: select, gather, narrowed conv block, scale, fuse."""
    z, scores, index = _branch(x, spec, pooled)
    return fuse_channels(x, z, scores, index, spec.position)


def mod_block_(x: Tensor, spec: MoDSpec, pooled: Tensor | None = None) -> Tensor:
    """:func:`mod_block` written into x, which is returned."""
    z, scores, index = _branch(x, spec, pooled)
    return fuse_channels_(x, z, scores, index, spec.position)


def _branch(x: Tensor, spec: MoDSpec, pooled: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    scores, index = select_channels(
        x, spec.fc1_weight, spec.fc2_weight, spec.k, spec.fc1_bias, spec.fc2_bias, pooled
    )
    return narrow_conv_block(gather_channels(x, index), spec), scores, index


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """index (N, k) as (N, k, H, W), for a scatter along the channels of x."""
    return index[:, :, None, None].expand(-1, -1, *x.shape[2:])


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)

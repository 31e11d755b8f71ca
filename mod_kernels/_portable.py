"""The ops as ``torch.export`` gets them: plain ATen that ONNX and other runtimes have.

As :mod:`mod_kernels.reference`, logits, rounding and all, but for what does not convert, a stable sort: with
``torch.topk`` equal logits are ranked as the runtime pleases. Not :mod:`mod_kernels.plain`, which ranks sigmoids
(they saturate into ties) and runs the selector in x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import plain, reference
from ._library import accumulation_dtype
from .spec import MoDSpec

gather_channels = plain.gather_channels
add_relu_pool = reference.add_relu_pool
add_relu_pool_ = reference.add_relu_pool_


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
    logits = reference.selector_logits(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled)
    largest, index = torch.topk(logits, k, dim=1)
    return torch.sigmoid(largest), index


def fuse_channels(
    x: Tensor, z: Tensor, scores: Tensor, index: Tensor | None = None, position: str = "first"
) -> Tensor:
    """x with ``scores * z`` added to the channels P, by a concatenation: runtimes have no slice to write into."""
    dtype = accumulation_dtype(x.dtype)
    scaled = scores.to(dtype)[:, :, None, None] * z.to(dtype)
    if position == "original":
        spread = index[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return x.to(dtype).scatter_add(1, spread, scaled).to(x.dtype)
    k, rest = z.shape[1], x.shape[1] - z.shape[1]
    if position == "first":
        return torch.cat(((x[:, :k].to(dtype) + scaled).to(x.dtype), x[:, k:]), dim=1)
    return torch.cat((x[:, :rest], (x[:, rest:].to(dtype) + scaled).to(x.dtype)), dim=1)


def fuse_channels_(
    x: Tensor, z: Tensor, scores: Tensor, index: Tensor | None = None, position: str = "first"
) -> Tensor:
    """:func:`fuse_channels` written into x, which is returned."""
    return x.copy_(fuse_channels(x, z, scores, index, position))


def mod_block(x: Tensor, spec: MoDSpec, pooled: Tensor | None = None) -> Tensor:
    """The whole block for inference."""
    selector = (spec.fc1_weight, spec.fc2_weight, spec.k, spec.fc1_bias, spec.fc2_bias)
    scores, index = select_channels(x, *selector, pooled)
    z = reference.narrow_conv_block(gather_channels(x, index), spec)
    return fuse_channels(x, z, scores, index, spec.position)


def mod_block_(x: Tensor, spec: MoDSpec, pooled: Tensor | None = None) -> Tensor:
    """:func:`mod_block` written into x, which is returned."""
    return x.copy_(mod_block(x, spec, pooled))

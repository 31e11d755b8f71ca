"""The paper's block as people write it in PyTorch: the baseline of every benchmark.

Equal to :mod:`mod_kernels.reference` wherever no two logits tie and the sigmoids do not saturate. Three endings,
since people write three: ``"clone"`` (copy, then add to a slice), ``"cat"``, and ``"inplace"`` (writes into x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ENDINGS = ("clone", "cat", "inplace")


def select_channels(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    k: int,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores (N, k) and index (N, k) int64: pool, two linears, sigmoid, ``torch.topk``."""
    pooled = x.mean((2, 3)) if pooled is None else pooled
    hidden = F.relu(F.linear(pooled, fc1_weight, fc1_bias))
    scores = torch.sigmoid(F.linear(hidden, fc2_weight, fc2_bias))
    return torch.topk(scores, k, dim=1)


def gather_channels(x: Tensor, index: Tensor) -> Tensor:
    """``out[n, j] = x[n, index[n, j]]``: (N, k, H, W)."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3]))


def fuse_channels(
    x: Tensor,
    z: Tensor,
    scores: Tensor,
    index: Tensor | None = None,
    position: str = "first",
    ending: str = "clone",
) -> Tensor:
    """``x`` with ``scores * z`` added to its first k channels, its last k, or those of ``index``."""
    k, c = z.shape[1], x.shape[1]
    scaled = scores[:, :, None, None].to(z.dtype) * z
    if position == "original":
        spread = index[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3])
        return x.scatter_add_(1, spread, scaled) if ending == "inplace" else x.scatter_add(1, spread, scaled)
    if ending == "cat":
        if position == "first":
            return torch.cat((x[:, :k] + scaled, x[:, k:]), dim=1)
        return torch.cat((x[:, : c - k], x[:, c - k :] + scaled), dim=1)
    y = x if ending == "inplace" else x.clone()
    if position == "first":
        y[:, :k] += scaled
    else:
        y[:, c - k :] += scaled
    return y


def mod_block(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    k: int,
    conv_block: Callable[[Tensor], Tensor],
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    pooled: Tensor | None = None,
    position: str = "first",
    ending: str = "clone",
) -> Tensor:
    """The block of arXiv 2409.17016, section 3, around any ``conv_block`` from (N, k, H, W) to the same."""
    scores, index = select_channels(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)
    z = conv_block(gather_channels(x, index))
    return fuse_channels(x, z, scores, index, position, ending)

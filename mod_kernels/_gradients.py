"""The backward ops composed of PyTorch ops, argument for argument as in :mod:`mod_kernels._library`.

They serve where an engine has no kernel of its own, and where a gradient is itself to be differentiated: raw ops
are not differentiable, these are. Everything is in the accumulation dtype and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import memory_format_of


def select_channels_backward(
    dscores: Tensor | None,
    scores: Tensor,
    index: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    pooled_needed: bool,
    fc1_needed: bool,
    fc2_needed: bool,
    fc1_bias_needed: bool,
    fc2_bias_needed: bool,
    dhidden: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """dpooled, dfc1_weight, dfc2_weight, dfc1_bias, dfc2_bias; None for what is not needed.

    ``dlogits[n, index[n, j]] = dscores * scores * (1 - scores)``, zero elsewhere; ``dfc2_weight = dlogits'
    hidden``; ``dhidden = dlogits fc2_weight`` where ``hidden > 0``; ``dfc1_weight = dhidden' pooled``; ``dpooled =
    dhidden fc1_weight``; the biases' are sums over the batch.

    Beside the raw op's arguments it takes a gradient of hidden, and no gradient of scores: what the second
    derivative may bring.
    """
    dpooled = dfc1 = dfc2 = db1 = db2 = None
    below_fc2 = pooled_needed or fc1_needed or fc1_bias_needed
    with torch.autocast(scores.device.type, enabled=False):
        if dscores is not None:
            dlogits = scores.new_zeros(pooled.shape).scatter(1, index, dscores * scores * (1 - scores))
            dfc2 = dlogits.t() @ hidden if fc2_needed else None
            db2 = dlogits.sum(0) if fc2_bias_needed else None
            if below_fc2:
                through = dlogits @ fc2_weight.to(scores.dtype)
                dhidden = through if dhidden is None else dhidden + through
        if dhidden is not None and below_fc2:
            # As torch's ReLU: a NaN is not <= 0, so its gradient passes.
            dhidden = dhidden.masked_fill(hidden <= 0, 0)
            dfc1 = dhidden.t() @ pooled if fc1_needed else None
            db1 = dhidden.sum(0) if fc1_bias_needed else None
            dpooled = dhidden @ fc1_weight.to(scores.dtype) if pooled_needed else None
    return dpooled, dfc1, dfc2, db1, db2


def fuse_channels_backward(
    dy: Tensor,
    z: Tensor,
    scores: Tensor,
    index: Tensor | None,
    position: str,
    z_needed: bool,
    scores_needed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``dz = scores * dy[:, P]``, ``dscores`` the sum of ``z * dy[:, P]`` over a plane."""
    at_target = channels_of(dy, z.shape[1], index, position).to(scores.dtype)
    dz = (at_target * scores[:, :, None, None]).to(z.dtype) if z_needed else None
    dscores = (at_target * z.to(scores.dtype)).sum((2, 3)) if scores_needed else None
    return dz, dscores


def input_gradient(
    dy: Tensor,
    dpooled: Tensor | None,
    dgathered: Tensor | None,
    index: Tensor | None,
    y: Tensor | None,
    overwritten: Tensor | None,
    position: str,
) -> Tensor:
    """``dy + dpooled / (H W) + dgathered at index``, then zero where the ReLU's output was not above zero."""
    _, _, h, w = dy.shape
    dtype = dy.dtype if dpooled is None else dpooled.dtype
    dx = dy.to(dtype)
    if dpooled is not None:
        dx = dx + (dpooled / (h * w))[:, :, None, None]
    if dgathered is not None:
        dx = dx.scatter_add(1, spread(index, dgathered), dgathered.to(dtype))
    if y is not None:
        dx = dx.masked_fill(_closed(y, overwritten, index, position), 0)
    return dx.to(dy.dtype).contiguous(memory_format=memory_format_of(dy))


def _closed(y: Tensor, overwritten: Tensor | None, index: Tensor | None, position: str) -> Tensor:
    """Where the ReLU's output, y but for the channels that were overwritten since, is not above zero."""
    closed = y <= 0
    if overwritten is None:
        return closed
    k, channels = overwritten.shape[1], y.shape[1]
    if position == "original":
        return closed.scatter(1, spread(index, overwritten), overwritten <= 0)
    first = 0 if position == "first" else channels - k
    closed[:, first : first + k] = overwritten <= 0
    return closed


def channels_of(x: Tensor, k: int, index: Tensor | None, position: str) -> Tensor:
    """The k channels P of ``position``, (N, k, H, W); a view except for ``"original"``."""
    if position == "original":
        return x.gather(1, spread(index, x))
    return x.narrow(1, 0 if position == "first" else x.shape[1] - k, k)


def spread(index: Tensor, x: Tensor) -> Tensor:
    """index (N, k) as (N, k, H, W)."""
    return index[:, :, None, None].expand(-1, -1, *x.shape[2:])

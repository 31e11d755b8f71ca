"""How a feature map lies in memory: the two layouts the engines know, and everything else.

``nchw`` and ``channels_last`` include batch-sliced views (``x[::2]``, ``x[3:]``): each sample dense, samples
any distance apart that does not overlap. Strides of dimensions of size 1 do not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

NCHW = "nchw"
CHANNELS_LAST = "channels_last"
OTHER = "other"


def layout_of(x: Tensor) -> str:
    """``"nchw"``, ``"channels_last"`` or ``"other"`` for a 4-dimensional tensor.

    A tensor that fits both (C = 1 or H*W = 1) counts as ``"nchw"``; csrc/common/layout.h says the same.
    """
    if x.is_contiguous():
        return NCHW
    n, c, h, w = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if n > 1 and stride_n < c * h * w:
        return OTHER
    if _fits((c, stride_c, h * w), (h, stride_h, w), (w, stride_w, 1)):
        return NCHW
    if _fits((c, stride_c, 1), (h, stride_h, w * c), (w, stride_w, c)):
        return CHANNELS_LAST
    return OTHER


def _fits(*size_stride_expected: tuple[int, int, int]) -> bool:
    return all(size == 1 or stride == expected for size, stride, expected in size_stride_expected)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format an op's fresh output takes: x's own, contiguous where x is neither of the two."""
    return torch.channels_last if layout_of(x) == CHANNELS_LAST else torch.contiguous_format

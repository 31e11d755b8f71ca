"""The activation that the selector and the conv blocks share."""

import triton
import triton.language as tl


@triton.jit
def relu(value):
    """max(value, 0) that keeps NaN, as torch's ReLU does (``tl.maximum`` would drop it)."""
    return tl.where(value <= 0.0, 0.0, value)

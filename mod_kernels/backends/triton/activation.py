"""The activations that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def relu(value):
    """max(value, 0) that keeps NaN, as torch's ReLU does (``tl.maximum`` would drop it)."""
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def sigmoid(value):
    """1 / (1 + exp(-value))."""
    return 1.0 / (1.0 + tl.exp(-value))

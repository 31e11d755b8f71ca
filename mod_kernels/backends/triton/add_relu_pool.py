"""The ending of the block before: add, ReLU and pooling in one pass."""

import triton
import triton.language as tl

from .arithmetic import relu


@triton.jit(do_not_specialize=["stride_an", "stride_bn", "stride_yn", "hw_units"])
def add_relu_pool_fwd_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    pooled_ptr,
    stride_an: tl.int64,
    stride_bn: tl.int64,
    stride_yn: tl.int64,
    hw_units,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    HAS_B: tl.constexpr,
    RELU: tl.constexpr,
):
    """``y = relu(a + b)``, ``pooled = mean_hw(y)`` of y as it is stored.

    a, b, y (N, C, H, W), planes dense, samples ``stride_?n * ALIGN`` elements apart, ``H*W = hw_units * ALIGN``; y
    may be a; pooled (N, C) float32. Sums are float32, rounded once. Grid: ``N * CHUNKS``, CHUNK_C channels a
    program. Without HAS_B nothing is added, without RELU nothing is cut off.
    """
    CHUNKS: tl.constexpr = (C + CHUNK_C - 1) // CHUNK_C
    program = tl.program_id(0)
    n = (program // CHUNKS).to(tl.int64)
    channel = program % CHUNKS * CHUNK_C + tl.arange(0, CHUNK_C)
    hw = hw_units * ALIGN
    a_sample = a_ptr + n * stride_an * ALIGN
    b_sample = b_ptr + n * stride_bn * ALIGN
    y_sample = y_ptr + n * stride_yn * ALIGN
    plane = channel[:, None] * hw  # int32: a sample has fewer than 2^31 elements (launch.py)
    total = tl.zeros((CHUNK_C, BLOCK_HW), tl.float32)
    for start in range(0, hw, BLOCK_HW):
        pixel = (start + tl.arange(0, BLOCK_HW))[None, :]
        mask = (channel < C)[:, None] & (pixel < hw)
        a = tl.load(a_sample + (plane + pixel), mask=mask, other=0.0)
        value = a.to(tl.float32)
        if HAS_B:
            value += tl.load(b_sample + (plane + pixel), mask=mask, other=0.0).to(tl.float32)
        if RELU:
            value = relu(value)
        y = value.to(a.dtype)
        tl.store(y_sample + (plane + pixel), y, mask=mask)
        total += y.to(tl.float32)
    tl.store(pooled_ptr + n * C + channel, tl.sum(total, axis=1) / hw, mask=channel < C)

"""The ending of the block before: add, ReLU and pooling in one pass."""

import triton
import triton.language as tl

from .arithmetic import channel_sums, relu
from .layout import offset_in_sample


@triton.jit
def _add_relu(a_ptr, b_ptr, y_ptr, mask, accumulator: tl.constexpr, HAS_B: tl.constexpr, RELU: tl.constexpr):
    """Write ``y = relu(a + b)`` and return it, as stored."""
    a = tl.load(a_ptr, mask=mask, other=0.0)
    value = a.to(accumulator)
    if HAS_B:
        value += tl.load(b_ptr, mask=mask, other=0.0).to(accumulator)
    if RELU:
        value = relu(value)
    y = value.to(a.dtype)
    tl.store(y_ptr, y, mask=mask)
    return y


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
    HW_ALIGN: tl.constexpr,
    CHUNK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_B: tl.constexpr,
    RELU: tl.constexpr,
):
    """``y = relu(a + b)``, ``pooled = mean_hw(y)`` of y as it is stored.

    a, b, y (N, C, H, W) in one layout, samples dense and ``stride_?n * ALIGN`` elements apart, ``H*W = hw_units *
    HW_ALIGN``; y may be a; pooled (N, C) float32 (float64 for float64), the type of the sums, each rounded once.
    Grid: ``N * CHUNKS``, CHUNK_C channels a program. Without HAS_B nothing is added, without RELU nothing is cut
    off.

    Two forms. A tile of channels x pixels walks over the pixels; its loads are as wide as a row's alignment
    allows, a row being a plane in NCHW and a pixel's channels in channels_last. With RUN (NCHW planes that do not
    begin at multiples of 16 bytes, as those of 7x7 and 14x14), the chunk's planes are one run of CHUNK_C * H*W <=
    RUN values that does begin there, taken flat and wide, and the sums read it in rows from shared memory. A
    product with a 0/1 table would make one channel's infinity a NaN in its neighbours; to read y again from the
    cache would bring the narrow loads back.
    """
    CHUNKS: tl.constexpr = (C + CHUNK_C - 1) // CHUNK_C
    accumulator: tl.constexpr = pooled_ptr.dtype.element_ty
    program = tl.program_id(0)
    n = (program // CHUNKS).to(tl.int64)
    first = program % CHUNKS * CHUNK_C
    channel = first + tl.arange(0, CHUNK_C)
    hw = hw_units * HW_ALIGN
    a_sample = a_ptr + n * stride_an * ALIGN
    b_sample = b_ptr + n * stride_bn * ALIGN
    y_sample = y_ptr + n * stride_yn * ALIGN
    # Offsets are int32: a sample has fewer than 2^31 elements (launch.py).
    if RUN > 0:
        element = tl.arange(0, RUN)
        mask = (element < CHUNK_C * hw) & (element < (C - first) * hw)
        offset = first * hw + element
        y = _add_relu(a_sample + offset, b_sample + offset, y_sample + offset, mask, accumulator, HAS_B, RELU)
        sums = channel_sums(y, hw, accumulator, CHUNK_C, BLOCK_HW, LANES)
    else:
        total = tl.zeros((CHUNK_C, BLOCK_HW), accumulator)
        for start in range(0, hw, BLOCK_HW):
            pixel = (start + tl.arange(0, BLOCK_HW))[None, :]
            mask = (channel < C)[:, None] & (pixel < hw)
            offset = offset_in_sample(channel[:, None], pixel, hw, C, CHANNELS_LAST)
            y = _add_relu(a_sample + offset, b_sample + offset, y_sample + offset, mask, accumulator, HAS_B, RELU)
            total += y.to(accumulator)
        sums = tl.sum(total, axis=1)
    tl.store(pooled_ptr + n * C + channel, sums / hw, mask=channel < C)

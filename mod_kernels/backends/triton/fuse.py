"""Fuse kernels: add the scaled branch to its channels, in place or in one pass into a fresh tensor."""

import triton
import triton.language as tl

from .layout import offset_in_sample


@triton.jit(do_not_specialize=["stride_xn", "stride_zn", "hw_units", "tiles"])
def fuse_channels_fwd_kernel(
    x_ptr,
    z_ptr,
    scores_ptr,
    index_ptr,
    y_ptr,
    stride_xn: tl.int64,
    stride_zn: tl.int64,
    hw_units,
    tiles,
    C: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    BLOCK_CH: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    Z_CHANNELS_LAST: tl.constexpr,
):
    """``y = x``, then ``y[:, P] += scores[:, :, None, None] * z``: one read of x, one write of y.

    x (N, C, H, W) and z (N, K, H, W), samples dense and ``stride_?n * ALIGN`` elements apart, each in a layout of
    its own, ``H*W = hw_units * HW_ALIGN``; scores (N, K) float32 (float64 for float64); index (N, K) int64, used
    by POSITION "original" alone; y (N, C, H, W) dense, in x's layout. Grid: ``N * ceil(C / BLOCK_CH) * tiles``.
    The sum is in the scores' type and rounded once, repeated channels included; a channel outside P is copied as
    it is.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_CH - 1) // BLOCK_CH
    accumulator: tl.constexpr = scores_ptr.dtype.element_ty
    program = tl.program_id(0)
    hw = hw_units * HW_ALIGN
    pixel = ((program % tiles) * BLOCK_HW + tl.arange(0, BLOCK_HW))[None, :]
    chunk = (program // tiles) % CHUNKS
    n = (program // tiles // CHUNKS).to(tl.int64)
    channel = chunk * BLOCK_CH + tl.arange(0, BLOCK_CH)
    mask = (channel < C)[:, None] & (pixel < hw)
    place = pixel.to(tl.int64)
    offset = offset_in_sample(channel.to(tl.int64)[:, None], place, hw, C, CHANNELS_LAST)
    z_sample = z_ptr + n * stride_zn * ALIGN
    x = tl.load(x_ptr + n * stride_xn * ALIGN + offset, mask=mask, other=0.0)
    total = x.to(accumulator)
    if POSITION == "original":
        touched = channel < 0
        for j in range(K):
            target = tl.load(index_ptr + n * K + j)
            tl.device_assert((target >= 0) & (target < C), "index out of range")
            hit = channel == target
            touched = touched | hit
            z_offset = offset_in_sample(j, place, hw.to(tl.int64), K, Z_CHANNELS_LAST)
            z = tl.load(z_sample + z_offset + tl.zeros_like(offset), mask=mask & hit[:, None], other=0.0)
            scaled = tl.load(scores_ptr + n * K + j) * z.to(accumulator)
            total = tl.where(hit[:, None], total + scaled, total)
    else:
        j = channel - (C - K) if POSITION == "last" else channel
        touched = (j >= 0) & (j < K)
        z_offset = offset_in_sample(j.to(tl.int64)[:, None], place, hw, K, Z_CHANNELS_LAST)
        z = tl.load(z_sample + z_offset, mask=mask & touched[:, None], other=0.0)
        score = tl.load(scores_ptr + n * K + j, mask=touched, other=0.0)
        total += score[:, None] * z.to(accumulator)
    y = tl.where(touched[:, None], total.to(x.dtype), x)
    tl.store(y_ptr + n * C * hw + offset, y, mask=mask)


@triton.jit(do_not_specialize=["stride_xn", "stride_zn", "hw_units", "tiles"])
def fuse_channels_inplace_fwd_kernel(
    x_ptr,
    z_ptr,
    scores_ptr,
    index_ptr,
    stride_xn: tl.int64,
    stride_zn: tl.int64,
    hw_units,
    tiles,
    C: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    Z_CHANNELS_LAST: tl.constexpr,
):
    """``x[:, P] += scores[:, :, None, None] * z`` in place; shapes as in ``fuse_channels_fwd_kernel``.

    Grid: ``N * ceil(K / BLOCK_K) * tiles``: a program owns BLOCK_HW pixels of the channels its BLOCK_K j are added
    to. Where several j name one channel ("original"), the first of them adds all and the others do nothing: no two
    programs write one place, and the sum is rounded once.
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    accumulator: tl.constexpr = scores_ptr.dtype.element_ty
    program = tl.program_id(0)
    n = (program // tiles // CHUNKS).to(tl.int64)
    j = (program // tiles % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    hw = hw_units * HW_ALIGN
    pixel = (program % tiles * BLOCK_HW + tl.arange(0, BLOCK_HW))[None, :]
    owner = j < K
    repeats = j < 0
    if POSITION == "original":
        target = tl.load(index_ptr + n * K + j, mask=owner, other=0)
        inside = (target >= 0) & (target < C)
        tl.device_assert(inside, "index out of range")
        other = tl.arange(0, K_PAD)[None, :]
        same = tl.load(index_ptr + n * K + other, mask=other < K, other=-1) == target[:, None]
        owner = owner & inside & (tl.sum((same & (other < j[:, None])).to(tl.int32), axis=1) == 0)
        repeats = owner & (tl.sum((same & (other > j[:, None])).to(tl.int32), axis=1) > 0)
    else:
        target = j + (C - K) if POSITION == "last" else j
    mask = owner[:, None] & (pixel < hw)
    place = pixel.to(tl.int64)
    x_offset = offset_in_sample(target[:, None], place, hw, C, CHANNELS_LAST)
    x_place = x_ptr + n * stride_xn * ALIGN + x_offset
    z_sample = z_ptr + n * stride_zn * ALIGN
    x = tl.load(x_place, mask=mask, other=0.0)
    z = tl.load(z_sample + offset_in_sample(j[:, None], place, hw, K, Z_CHANNELS_LAST), mask=mask, other=0.0)
    score = tl.load(scores_ptr + n * K + j, mask=j < K, other=0.0)
    total = x.to(accumulator) + score[:, None] * z.to(accumulator)
    if POSITION == "original":  # noqa: SIM102 (decided when the kernel is compiled)
        if tl.sum(repeats.to(tl.int32), axis=0) > 0:
            for later in range(K):
                hit = (later > j) & (tl.load(index_ptr + n * K + later) == target)
                z_offset = offset_in_sample(later, place, hw.to(tl.int64), K, Z_CHANNELS_LAST)
                z = tl.load(z_sample + z_offset + tl.zeros_like(x_offset), mask=mask & hit[:, None], other=0.0)
                scaled = tl.load(scores_ptr + n * K + later) * z.to(accumulator)
                total = tl.where(hit[:, None], total + scaled, total)
    tl.store(x_place, total.to(x.dtype), mask=mask)

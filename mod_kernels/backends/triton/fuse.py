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
    Z_ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    BLOCK_CH: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    Z_CHANNELS_LAST: tl.constexpr,
):
    """``y = x``, then ``y[:, P] += scores[:, :, None, None] * z``: one read of x, one write of y.

    x (N, C, H, W) and z (N, K, H, W), samples dense and ``stride_xn * ALIGN`` and ``stride_zn * Z_ALIGN`` elements
    apart, each in a layout of its own, ``H*W = hw_units * HW_ALIGN``; scores (N, K) float32 (float64 for float64);
    index (N, K) int64, used by POSITION "original" alone; y (N, C, H, W) dense, in x's layout. Grid: ``N *
    ceil(C / BLOCK_CH) * tiles``. The sum is in the scores' type and rounded once, repeated channels included; a
    channel outside P is copied as it is.
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
    z_sample = z_ptr + n * stride_zn * Z_ALIGN
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
    Z_ALIGN: tl.constexpr,
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
    z_sample = z_ptr + n * stride_zn * Z_ALIGN
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


@triton.jit(do_not_specialize=["stride_xn", "stride_zn", "hw_units", "tiles"])
def fuse_channels_flat_fwd_kernel(
    x_ptr,
    z_ptr,
    scores_ptr,
    y_ptr,
    stride_xn: tl.int64,
    stride_zn: tl.int64,
    hw_units,
    tiles,
    C: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    Z_ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Both of the above where x, z and y are NCHW and POSITION is "first" or "last": a sample's values in a row.

    ``y[e] = x[e] + scores[e // H*W - START] * z[e - START * H*W]`` for the values e in P, the channels START (0 or
    C - K) to START + K - 1; ``y[e] = x[e]`` for the others. Shapes, strides and rounding as above. IN_PLACE: y is
    x (``y_ptr`` is not used), and P alone is walked. Grid: ``N * tiles``, a program takes BLOCK values.

    Loads and stores are as wide as the alignment of samples allows, whatever H*W is: those of x and y follow from
    C * H*W, those of z, and of x in place, from K * H*W. A program that touches no channel of P works out no
    channels.
    """
    accumulator: tl.constexpr = scores_ptr.dtype.element_ty
    START: tl.constexpr = C - K if POSITION == "last" else 0
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    hw = hw_units * HW_ALIGN
    hw_wide = hw.to(tl.int64)
    p_first, p_end = START * hw_wide, (START + K) * hw_wide
    walk_first = p_first if IN_PLACE else 0
    walk_end = p_end if IN_PLACE else C * hw_wide
    first = walk_first + (program % tiles).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    element = first + lane
    mask = element < walk_end
    x_sample = x_ptr + n * stride_xn * ALIGN
    y_sample = x_sample if IN_PLACE else y_ptr + n * C * hw_wide
    x = tl.load(x_sample + element, mask=mask, other=0.0)
    y = x
    if (first < p_end) & (first + BLOCK > p_first):
        touched = (element >= p_first) & (element < p_end)
        z = tl.load(z_ptr + n * stride_zn * Z_ALIGN + (element - p_first), mask=touched, other=0.0)
        # The first value's channel by itself, so that 32 bits are enough to divide the others.
        first_channel = first // hw_wide
        past_channel = (first - first_channel * hw_wide).to(tl.int32)
        channel = first_channel.to(tl.int32) + (past_channel + lane) // hw
        score = tl.load(scores_ptr + n * K + (channel - START), mask=touched, other=0.0)
        total = x.to(accumulator) + score * z.to(accumulator)
        y = tl.where(touched, total.to(x.dtype), x)
    tl.store(y_sample + element, y, mask=mask)

"""Fuse kernels: add the scaled branch to its channels, in place or in one pass into a fresh tensor."""

import triton
import triton.language as tl


@triton.jit
def _z_offset(n, j, pixel, stride_zn, hw, K: tl.constexpr, Z_CHANNELS_LAST: tl.constexpr):
    """Offset of z[n, j, pixel] in either layout."""
    if Z_CHANNELS_LAST:
        return n * stride_zn + pixel * K + j
    return n * stride_zn + j * hw + pixel


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
    BLOCK_CH: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    POSITION: tl.constexpr,
    Z_CHANNELS_LAST: tl.constexpr,
):
    """``y = x``, then ``y[:, P] += scores[:, :, None, None] * z``: one read of x, one write of y.

    x (N, C, H, W), planes dense, samples ``stride_xn * ALIGN`` elements apart, ``H*W = hw_units * ALIGN``;
    z (N, K, H, W) dense per sample; scores (N, K) float32; index (N, K) int64, used by POSITION "original"
    alone; y (N, C, H, W) dense. Grid: ``N * ceil(C / BLOCK_CH) * tiles``. The sum is in float32 and rounded
    once, repeated channels included; a channel outside P is copied as it is.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_CH - 1) // BLOCK_CH
    program = tl.program_id(0)
    hw = hw_units * ALIGN
    pixel = ((program % tiles) * BLOCK_HW + tl.arange(0, BLOCK_HW))[None, :]
    chunk = (program // tiles) % CHUNKS
    n = (program // tiles // CHUNKS).to(tl.int64)
    channel = chunk * BLOCK_CH + tl.arange(0, BLOCK_CH)
    plane = channel.to(tl.int64)[:, None] * hw
    mask = (channel < C)[:, None] & (pixel < hw)
    x = tl.load(x_ptr + n * stride_xn * ALIGN + plane + pixel, mask=mask, other=0.0)
    total = x.to(tl.float32)
    if POSITION == "original":
        touched = channel < 0
        for j in range(K):
            target = tl.load(index_ptr + n * K + j)
            tl.device_assert((target >= 0) & (target < C), "index out of range")
            hit = channel == target
            touched = touched | hit
            offset = _z_offset(n, j, pixel, stride_zn, hw, K, Z_CHANNELS_LAST)
            z = tl.load(z_ptr + offset + tl.zeros_like(plane), mask=mask & hit[:, None], other=0.0)
            scaled = tl.load(scores_ptr + n * K + j) * z.to(tl.float32)
            total = tl.where(hit[:, None], total + scaled, total)
    else:
        j = channel - (C - K) if POSITION == "last" else channel
        touched = (j >= 0) & (j < K)
        offset = _z_offset(n, j.to(tl.int64)[:, None], pixel, stride_zn, hw, K, Z_CHANNELS_LAST)
        z = tl.load(z_ptr + offset, mask=mask & touched[:, None], other=0.0)
        score = tl.load(scores_ptr + n * K + j, mask=touched, other=0.0)
        total += score[:, None] * z.to(tl.float32)
    y = tl.where(touched[:, None], total.to(x.dtype), x)
    tl.store(y_ptr + n * C * hw + plane + pixel, y, mask=mask)


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
    BLOCK_HW: tl.constexpr,
    POSITION: tl.constexpr,
    Z_CHANNELS_LAST: tl.constexpr,
):
    """``x[:, P] += scores[:, :, None, None] * z`` in place; shapes as in ``fuse_channels_fwd_kernel``.

    Grid: ``N * K * tiles``: a program owns BLOCK_HW pixels of the channel its j is added to. Where several j
    name one channel ("original"), the first of them adds all and the others do nothing: no two programs write
    one place, and the sum is rounded once.
    """
    program = tl.program_id(0)
    plane = (program // tiles).to(tl.int64)  # n * K + j
    n = plane // K
    j = plane % K
    hw = hw_units * ALIGN
    pixel = (program % tiles) * BLOCK_HW + tl.arange(0, BLOCK_HW)
    if POSITION == "original":
        target = tl.load(index_ptr + plane)
        inside = (target >= 0) & (target < C)
        tl.device_assert(inside, "index out of range")
        other = tl.arange(0, K_PAD)
        same = tl.load(index_ptr + n * K + other, mask=other < K, other=-1) == target
        owner = inside & (tl.sum((same & (other < j)).to(tl.int32), axis=0) == 0)
        repeats = tl.sum((same & (other > j)).to(tl.int32), axis=0)
    else:
        target = j + (C - K) if POSITION == "last" else j
        owner = True
        repeats = 0
    mask = (pixel < hw) & owner
    x_plane = x_ptr + n * stride_xn * ALIGN + target * hw
    x = tl.load(x_plane + pixel, mask=mask, other=0.0)
    z = tl.load(z_ptr + _z_offset(n, j, pixel, stride_zn, hw, K, Z_CHANNELS_LAST), mask=mask, other=0.0)
    total = x.to(tl.float32) + tl.load(scores_ptr + plane) * z.to(tl.float32)
    if POSITION == "original":  # noqa: SIM102 (decided when the kernel is compiled)
        if owner & (repeats > 0):
            for later in range(K):
                hit = (later > j) & (tl.load(index_ptr + n * K + later) == target)
                offset = _z_offset(n, later, pixel, stride_zn, hw, K, Z_CHANNELS_LAST)
                z = tl.load(z_ptr + offset, mask=mask & hit, other=0.0)
                scaled = tl.load(scores_ptr + n * K + later) * z.to(tl.float32)
                total = tl.where(hit, total + scaled, total)
    tl.store(x_plane + pixel, total.to(x.dtype), mask=mask)

"""Gather kernel: selected channels into a dense tensor."""

import triton
import triton.language as tl

from .layout import offset_in_sample


@triton.jit(do_not_specialize=["stride_xn", "hw_units", "tiles"])
def gather_channels_fwd_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    stride_xn: tl.int64,
    hw_units,
    tiles,
    C: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """``out[n, j] = x[n, index[n, j]]``.

    x (N, C, H, W), samples dense and ``stride_xn * ALIGN`` elements apart, ``H*W = hw_units * HW_ALIGN``; index
    (N, K) int64; out (N, K, H, W) dense; x and out in the same layout. Grid: ``N * ceil(K / BLOCK_K) * tiles``, a
    tile is BLOCK_HW pixels. An index out of range gives zeros (and trips a device assertion where those are on).
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    n = (program // tiles // CHUNKS).to(tl.int64)
    hw = hw_units * HW_ALIGN
    j = program // tiles % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
    pixel = (program % tiles * BLOCK_HW + tl.arange(0, BLOCK_HW))[None, :]
    mask = (j < K)[:, None] & (pixel < hw)
    source = tl.load(index_ptr + n * K + j, mask=j < K, other=0)
    inside = (source >= 0) & (source < C)
    tl.device_assert(inside, "index out of range")
    place = pixel.to(tl.int64)
    x_offset = offset_in_sample(source[:, None], place, hw, C, CHANNELS_LAST)
    tile = tl.load(x_ptr + n * stride_xn * ALIGN + x_offset, mask=mask & inside[:, None], other=0.0)
    out_offset = offset_in_sample(j.to(tl.int64)[:, None], place, hw, K, CHANNELS_LAST)
    tl.store(out_ptr + n * K * hw + out_offset, tile, mask=mask)

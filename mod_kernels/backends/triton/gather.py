"""Gather kernel: selected planes into a dense tensor."""

import triton
import triton.language as tl


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
    BLOCK_HW: tl.constexpr,
):
    """``out[n, j] = x[n, index[n, j]]``.

    x (N, C, H, W), planes dense, samples ``stride_xn * ALIGN`` elements apart, ``H*W = hw_units * ALIGN``;
    index (N, K) int64; out (N, K, H, W) dense. Grid: ``N * K * tiles``, a tile is BLOCK_HW pixels of a plane.
    An index out of range gives zeros (and trips a device assertion where those are on).
    """
    program = tl.program_id(0)
    plane = (program // tiles).to(tl.int64)  # n * K + j
    hw = hw_units * ALIGN
    pixel = (program % tiles) * BLOCK_HW + tl.arange(0, BLOCK_HW)
    source = tl.load(index_ptr + plane)
    inside = (source >= 0) & (source < C)
    tl.device_assert(inside, "index out of range")
    x_plane = x_ptr + (plane // K) * stride_xn * ALIGN + source * hw
    tile = tl.load(x_plane + pixel, mask=inside & (pixel < hw), other=0.0)
    tl.store(out_ptr + plane * hw + pixel, tile, mask=pixel < hw)

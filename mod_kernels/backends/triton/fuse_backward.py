"""Backward of the fuse: what the scaled branch and its scores get from the gradient of the sum."""

import triton
import triton.language as tl

from .layout import offset_in_sample


@triton.jit(do_not_specialize=["stride_dyn", "stride_zn", "hw_units"])
def fuse_channels_bwd_kernel(
    dy_ptr,
    z_ptr,
    scores_ptr,
    index_ptr,
    dz_ptr,
    dscores_ptr,
    stride_dyn: tl.int64,
    stride_zn: tl.int64,
    hw_units,
    C: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    Z_NEEDED: tl.constexpr,
    SCORES_NEEDED: tl.constexpr,
):
    """``dz[n, j] = scores[n, j] * dy[n, P_j]``, ``dscores[n, j] = sum_hw(z[n, j] * dy[n, P_j])``.

    dy (N, C, H, W) and z (N, K, H, W) in one layout, samples dense and ``stride_?n * ALIGN`` elements apart,
    ``H*W = hw_units * HW_ALIGN``; scores (N, K) and dscores (N, K) float32 (float64 for float64), the type of the
    products and sums; index (N, K) int64, used by POSITION "original" alone, where it may repeat; dz (N, K, H, W)
    dense in the same layout, rounded once. Grid: ``N * ceil(K / BLOCK_K)``: a program walks over all pixels of its
    BLOCK_K j, so that a sum is one program's. An index out of range gives zeros.
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    accumulator: tl.constexpr = scores_ptr.dtype.element_ty
    program = tl.program_id(0)
    n = (program // CHUNKS).to(tl.int64)
    j = program % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
    hw = hw_units * HW_ALIGN
    in_z = j < K
    in_dy = in_z
    if POSITION == "original":
        target = tl.load(index_ptr + n * K + j, mask=in_z, other=0)
        inside = (target >= 0) & (target < C)
        tl.device_assert(inside, "index out of range")
        in_dy = in_z & inside
        target = target.to(tl.int32)
    else:
        target = j + (C - K) if POSITION == "last" else j
    score = tl.load(scores_ptr + n * K + j, mask=in_z, other=0.0)
    dy_sample = dy_ptr + n * stride_dyn * ALIGN
    z_sample = z_ptr + n * stride_zn * ALIGN
    total = tl.zeros((BLOCK_K, BLOCK_HW), accumulator)
    # Offsets are int32: a sample has fewer than 2^31 elements (launch.py).
    for start in range(0, hw, BLOCK_HW):
        pixel = (start + tl.arange(0, BLOCK_HW))[None, :]
        mask = in_z[:, None] & (pixel < hw)
        dy_offset = offset_in_sample(target[:, None], pixel, hw, C, CHANNELS_LAST)
        dy = tl.load(dy_sample + dy_offset, mask=mask & in_dy[:, None], other=0.0).to(accumulator)
        offset = offset_in_sample(j[:, None], pixel, hw, K, CHANNELS_LAST)
        if SCORES_NEEDED:
            z = tl.load(z_sample + offset, mask=mask, other=0.0).to(accumulator)
            total = tl.fma(z, dy, total)
        if Z_NEEDED:
            dz = (score[:, None] * dy).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + n * K * hw + offset, dz, mask=mask)
    if SCORES_NEEDED:
        tl.store(dscores_ptr + n * K + j, tl.sum(total, axis=1), mask=in_z)

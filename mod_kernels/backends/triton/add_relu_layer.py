"""The ending of the block before, and its share of the selector's first layer in the block after it: one launch.

What a program has pooled is all that its share needs, so the block after it begins with the second layer: fed with
slots instead of pooled vectors it saves the launch that would fill them.
"""

import triton
import triton.language as tl

from .add_relu_pool import add_relu_pool_fwd_kernel
from .select import pool_share


@triton.jit(do_not_specialize=["stride_an", "stride_bn", "stride_yn", "hw_units"])
def add_relu_layer_fwd_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    pooled_ptr,
    fc1_weight_ptr,
    slots_ptr,
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
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``y = relu(a + b)``, ``pooled = mean_hw(y)``, ``slots[n, share, r] = sum_c fc1[r, c] * pooled[n, c]``.

    Over the CHUNK_C channels of each share. fc1 (R, C); slots (N, CHUNKS, R) float32; the rest, and the grid, as
    in :func:`.add_relu_pool.add_relu_pool_fwd_kernel`. The barrier: pooled is read back by other threads than
    stored it.
    """
    CHUNKS: tl.constexpr = (C + CHUNK_C - 1) // CHUNK_C
    add_relu_pool_fwd_kernel(
        a_ptr, b_ptr, y_ptr, pooled_ptr, stride_an, stride_bn, stride_yn, hw_units, C, ALIGN, HW_ALIGN, CHUNK_C,
        BLOCK_HW, RUN, LANES, CHANNELS_LAST, HAS_B, RELU,
    )  # fmt: skip
    tl.debug_barrier()
    program = tl.program_id(0)
    n = (program // CHUNKS).to(tl.int64)
    pool_share(
        y_ptr, y_ptr, pooled_ptr + n * C, fc1_weight_ptr, slots_ptr + n * CHUNKS * R, program % CHUNKS,
        hw_units * HW_ALIGN, C, R, CHUNK_C, 1, BLOCK_HW, RUN, LANES, BLOCK_R, True, False, False, CHANNELS_LAST,
    )  # fmt: skip

"""Tail: gather, narrowed conv block, scale and add, in place. Steps for block.py, and the kernel of ``tail_``."""

import triton
import triton.language as tl

from ...spec import LAYER_NORM_EPS
from .arithmetic import relu
from .convolutions import (
    add_plane_3x3,
    channel_vector,
    depthwise_3x3_and_1x1,
    expand_1x1,
    gather_1x1,
    gather_1x1_in_blocks,
    gather_3x3,
    gather_depthwise_7x7,
    load_planes,
    norm_and_two_1x1,
)
from .layout import offset_in_sample

EPS = tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def _add_to_channels(
    x_sample, z, score, index_row, pixel, hw,
    C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, POSITION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``x[P_j, p] += score[j] * z[j, p]`` for one tile of pixels; the P_j are distinct."""
    j = tl.arange(0, K_PAD)
    mask = j < K
    if POSITION == "original":
        target = tl.load(index_row + j, mask=mask, other=0)
        mask = mask & (target >= 0) & (target < C)
    else:
        target = (j + (C - K) if POSITION == "last" else j).to(tl.int64)
    places = x_sample + offset_in_sample(target[:, None], pixel[None, :], hw, C, CHANNELS_LAST)
    mask = mask[:, None] & (pixel < hw)[None, :]
    x = tl.load(places, mask=mask, other=0.0)
    tl.store(places, (x.to(tl.float32) + score[:, None] * z).to(x.dtype), mask=mask)


@triton.jit
def first_convolution(
    x_sample, index_row, conv_ptr, mid_sample, part, parts, hw, width,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_HW: tl.constexpr, KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``mid = act(w1 * x[index] + b1)``, of every ``parts``-th block of pixels; mid (PLANES, H, W) float32."""
    IS_3X3: tl.constexpr = KIND == "basic" or KIND == "conv"
    bias_ptr = conv_ptr + (K * 49 if KIND == "convnext" else M * K * (9 if IS_3X3 else 1))
    for start in range(part * BLOCK_HW, hw, parts * BLOCK_HW):
        pixel = start + tl.arange(0, BLOCK_HW)
        if KIND == "bottleneck":
            gather_1x1(
                x_sample, index_row, conv_ptr, bias_ptr, mid_sample, pixel, hw, C, K, M, K_PAD, CHANNELS_LAST
            )
        elif KIND == "inverted_residual":
            gather_1x1_in_blocks(
                x_sample, index_row, conv_ptr, bias_ptr, mid_sample, pixel, hw, C, K, M, BLOCK_M, BLOCK_HW,
                CHANNELS_LAST,
            )  # fmt: skip
        elif KIND == "convnext":
            gather_depthwise_7x7(
                x_sample, index_row, conv_ptr, bias_ptr, mid_sample, pixel, hw, width, C, K, K_PAD,
                BLOCK_HW, CHANNELS_LAST,
            )  # fmt: skip
        else:
            gather_3x3(
                x_sample, index_row, conv_ptr, bias_ptr, mid_sample, pixel, hw, width, C, K, K_PAD,
                BLOCK_HW, KIND == "basic", CHANNELS_LAST,
            )  # fmt: skip


@triton.jit
def rest_of_block(
    x_sample, index_row, score, conv_ptr, mid_sample, part, parts, hw, width,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_HW: tl.constexpr, KIND: tl.constexpr, FINAL_RELU: tl.constexpr, POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``x[P] += score * rest(mid)``, of every ``parts``-th block of pixels; score (K_PAD,)."""
    lane = tl.arange(0, BLOCK_M)
    weight2_ptr = conv_ptr + (K * 49 + K if KIND == "convnext" else M * K * (9 if KIND == "basic" else 1) + M)
    bias2_ptr = weight2_ptr + M * (K if KIND == "convnext" else 9 if KIND == "inverted_residual" else M * 9)
    weight3_ptr = bias2_ptr + M
    bias3_ptr = weight3_ptr + K * M
    for start in range(part * BLOCK_HW, hw, parts * BLOCK_HW):
        pixel = start + tl.arange(0, BLOCK_HW)
        if KIND == "inverted_residual":
            acc = depthwise_3x3_and_1x1(
                mid_sample, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, pixel, hw, width, K, M, K_PAD, BLOCK_HW
            )
        elif KIND == "convnext":
            acc = norm_and_two_1x1(
                mid_sample, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, pixel, hw, K, M, K_PAD, BLOCK_HW, EPS
            )
        elif KIND == "conv":
            acc = load_planes(mid_sample, pixel, hw, K, K_PAD)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_HW), tl.float32) + channel_vector(bias2_ptr, lane, M)[:, None]
            for m in range(M):
                plane = mid_sample + m * hw
                acc = add_plane_3x3(acc, plane, weight2_ptr + m * 9, lane, pixel, hw, width, True, M, M, 1)
            if KIND == "bottleneck":
                acc = expand_1x1(relu(acc), weight3_ptr, bias3_ptr, K, M, K_PAD, BLOCK_M)
        if FINAL_RELU:
            acc = relu(acc)
        _add_to_channels(x_sample, acc, score, index_row, pixel, hw, C, K, K_PAD, POSITION, CHANNELS_LAST)


@triton.jit(do_not_specialize=["stride_xn", "hw_units", "width", "programs"])
def tail_fwd_kernel(
    x_ptr,
    index_ptr,
    scores_ptr,
    conv_ptr,
    mid_ptr,
    stride_xn: tl.int64,
    hw_units,
    width,
    programs,
    C: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    K_PAD: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    KIND: tl.constexpr,
    FINAL_RELU: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """``x[:, P] += scores * conv_block(x[index])``, in place.

    conv_block, norms folded, g = x[index], M channels inside, weights OIHW:

    - "bottleneck": ``w3 * relu(w2 * relu(w1 * g + b1) + b2) + b3``, 1x1, 3x3, 1x1
    - "basic": ``w2 * relu(w1 * g + b1) + b2``, both 3x3, M = K
    - "inverted_residual": ``w3 * relu6(w2 * relu6(w1 * g + b1) + b2) + b3``, 1x1, depthwise 3x3, 1x1
    - "conv": ``w1 * g + b1``, 3x3, M = K
    - "convnext": ``w3 * gelu(w2 * layer_norm(w1 * g + b1) + b2) + b3``, depthwise 7x7, 1x1, 1x1

    conv: w1, b1, w2, b2 ... one after the other, float32. x (N, C, H, W), samples ``stride_xn * ALIGN`` elements
    apart, ``H*W = hw_units * HW_ALIGN``; index (N, K) int64, no channel twice in a sample; scores (N, K) and mid
    (N, PLANES, H, W), what the first convolution and its ReLU give, float32. Nothing is rounded before the sum.

    In place, a gathered channel may be one that is written: all of a sample's first convolution (FIRST) is done
    before any of the rest (REST), which takes nothing of the gathered channels but from mid. Either both in one
    program per sample, a barrier between (``programs = 1``), or a launch of each, ``programs`` per sample. Spatial
    tiles that did both would be wrong.
    """
    program = tl.program_id(0)
    n = (program // programs).to(tl.int64)
    part = program % programs
    hw = hw_units * HW_ALIGN
    x_sample = x_ptr + n * stride_xn * ALIGN
    index_row = index_ptr + n * K
    mid_sample = mid_ptr + n * PLANES * hw
    if FIRST:
        first_convolution(
            x_sample, index_row, conv_ptr, mid_sample, part, programs, hw, width, C, K, M, K_PAD, BLOCK_M,
            BLOCK_HW, KIND, CHANNELS_LAST,
        )  # fmt: skip
    if FIRST and REST:
        tl.debug_barrier()
    if REST:
        j = tl.arange(0, K_PAD)
        score = tl.load(scores_ptr + n * K + j, mask=j < K, other=0.0)
        rest_of_block(
            x_sample, index_row, score, conv_ptr, mid_sample, part, programs, hw, width, C, K, M, K_PAD,
            BLOCK_M, BLOCK_HW, KIND, FINAL_RELU, POSITION, CHANNELS_LAST,
        )  # fmt: skip

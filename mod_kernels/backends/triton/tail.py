"""Tail: gather, narrowed conv block, scale and add, in place. Steps for block.py, and the kernel of ``tail_``."""

import triton
import triton.language as tl

from .arithmetic import relu, sum_of_products
from .layout import offset_in_sample


@triton.jit
def _channel_vector(ptr, channel, COUNT: tl.constexpr):
    """Vector of one value per channel, zero in the padding lanes."""
    return tl.load(ptr + channel, mask=channel < COUNT, other=0.0)


@triton.jit
def _add_plane_3x3(
    acc, plane_ptr, weight_ptr, out, pixel, hw, width, inside,
    OUT: tl.constexpr, IN: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
):  # fmt: skip
    """``acc[o, p] += sum over the nine taps of weight[o, tap] * plane[p + tap]``, zero padding 1.

    acc (OUT padded, BLOCK_HW) float32; the plane's pixels lie PIXEL_STRIDE apart; weight_ptr is at [0, i, 0, 0] of
    weights (OUT, IN, 3, 3); inside False stands for a plane of zeros.
    """
    row = pixel // width
    column = pixel % width
    height = hw // width
    for tap in tl.static_range(9):
        near_row = row + (tap // 3 - 1)
        near_column = column + (tap % 3 - 1)
        mask = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
        place = (near_row * width + near_column) * PIXEL_STRIDE
        value = tl.load(plane_ptr + place, mask=mask & (pixel < hw) & inside, other=0.0)
        weight = tl.load(weight_ptr + out * (IN * 9) + tap, mask=out < OUT, other=0.0)
        acc += weight[:, None] * value.to(tl.float32)[None, :]
    return acc


@triton.jit
def _gather_1x1(
    x_sample, index_row, weight_ptr, bias_ptr, mid_sample, pixel, hw,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``mid[m, p] = relu(b1[m] + sum_j w1[m, j] * x[index[j], p])`` for one tile of pixels."""
    j = tl.arange(0, K_PAD)
    source = tl.load(index_row + j, mask=j < K, other=0)
    inside = (source >= 0) & (source < C)
    tl.device_assert(inside, "index out of range")
    mask = ((j < K) & inside)[:, None] & (pixel < hw)[None, :]
    place = offset_in_sample(source[:, None], pixel[None, :], hw, C, CHANNELS_LAST)
    gathered = tl.load(x_sample + place, mask=mask, other=0.0).to(tl.float32)
    for m in range(M):
        weight = _channel_vector(weight_ptr + m * K, j, K)
        weights, values = tl.broadcast(weight[:, None], gathered)
        mid = sum_of_products(weights, values, 0) + tl.load(bias_ptr + m)
        tl.store(mid_sample + m * hw + pixel, relu(mid), mask=pixel < hw)


@triton.jit
def _gather_3x3(
    x_sample, index_row, weight_ptr, bias_ptr, mid_sample, pixel, hw, width,
    C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_HW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``mid[o, p] = relu(b1[o] + sum_j (w1[o, j] * x[index[j]])[p])``, 3x3, for one tile of pixels."""
    out = tl.arange(0, K_PAD)
    acc = tl.zeros((K_PAD, BLOCK_HW), tl.float32) + _channel_vector(bias_ptr, out, K)[:, None]
    for j in range(K):
        source = tl.load(index_row + j)
        inside = (source >= 0) & (source < C)
        tl.device_assert(inside, "index out of range")
        plane = x_sample + offset_in_sample(source, 0, hw, C, CHANNELS_LAST)
        stride: tl.constexpr = C if CHANNELS_LAST else 1
        acc = _add_plane_3x3(acc, plane, weight_ptr + j * 9, out, pixel, hw, width, inside, K, K, stride)
    mask = (out < K)[:, None] & (pixel < hw)[None, :]
    tl.store(mid_sample + out[:, None] * hw + pixel[None, :], relu(acc), mask=mask)


@triton.jit
def _expand_1x1(
    acc, weight_ptr, bias_ptr, K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, M_PAD: tl.constexpr
):
    """``z[j, p] = b3[j] + sum_m w3[j, m] * acc[m, p]``; acc (M_PAD, BLOCK_HW), z (K_PAD, BLOCK_HW)."""
    j = tl.arange(0, K_PAD)
    lane = tl.arange(0, M_PAD)
    z = tl.zeros((K_PAD, acc.shape[1]), tl.float32) + _channel_vector(bias_ptr, j, K)[:, None]
    for m in range(M):
        # The select takes row m out of registers; a NaN in another row stays there.
        plane = tl.sum(tl.where((lane == m)[:, None], acc, 0.0), axis=0)
        weight = tl.load(weight_ptr + j * M + m, mask=j < K, other=0.0)
        z += weight[:, None] * plane[None, :]
    return z


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
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, BLOCK_HW: tl.constexpr,
    BOTTLENECK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``mid = relu(w1 * x[index] + b1)``, of every ``parts``-th block of pixels; mid (M, H, W) float32."""
    bias_ptr = conv_ptr + M * K * (1 if BOTTLENECK else 9)
    for start in range(part * BLOCK_HW, hw, parts * BLOCK_HW):
        pixel = start + tl.arange(0, BLOCK_HW)
        if BOTTLENECK:
            _gather_1x1(
                x_sample, index_row, conv_ptr, bias_ptr, mid_sample, pixel, hw, C, K, M, K_PAD, CHANNELS_LAST
            )
        else:
            _gather_3x3(
                x_sample, index_row, conv_ptr, bias_ptr, mid_sample, pixel, hw, width, C, K, K_PAD,
                BLOCK_HW, CHANNELS_LAST,
            )  # fmt: skip


@triton.jit
def rest_of_block(
    x_sample, index_row, score, conv_ptr, mid_sample, part, parts, hw, width,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, M_PAD: tl.constexpr,
    BLOCK_HW: tl.constexpr, BOTTLENECK: tl.constexpr, FINAL_RELU: tl.constexpr, POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``x[P] += score * rest(mid)``, of every ``parts``-th block of pixels; score (K_PAD,)."""
    weight2_ptr = conv_ptr + M * K * (1 if BOTTLENECK else 9) + M
    bias2_ptr = weight2_ptr + M * M * 9
    weight3_ptr = bias2_ptr + M
    bias3_ptr = weight3_ptr + K * M
    lane = tl.arange(0, M_PAD)
    for start in range(part * BLOCK_HW, hw, parts * BLOCK_HW):
        pixel = start + tl.arange(0, BLOCK_HW)
        acc = tl.zeros((M_PAD, BLOCK_HW), tl.float32) + _channel_vector(bias2_ptr, lane, M)[:, None]
        for m in range(M):
            plane = mid_sample + m * hw
            acc = _add_plane_3x3(acc, plane, weight2_ptr + m * 9, lane, pixel, hw, width, True, M, M, 1)
        if BOTTLENECK:
            acc = _expand_1x1(relu(acc), weight3_ptr, bias3_ptr, K, M, K_PAD, M_PAD)
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
    M_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    FINAL_RELU: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """``x[:, P] += scores * conv_block(x[index])``, in place.

    conv_block, BN folded: BOTTLENECK ``w3 * relu(w2 * relu(w1 * g + b1) + b2) + b3`` with w1 (M, K, 1, 1),
    w2 (M, M, 3, 3), w3 (K, M, 1, 1); else ``w2 * relu(w1 * g + b1) + b2`` with w1, w2 (K, K, 3, 3), M = K; conv:
    w1, b1, w2, b2 (, w3, b3) one after the other, float32. x (N, C, H, W), samples ``stride_xn * ALIGN`` elements
    apart, ``H*W = hw_units * HW_ALIGN``; index (N, K) int64, no channel twice in a
    sample; scores (N, K), mid (N, M, H, W), what the first convolution gives, float32. Nothing is rounded before
    the sum.

    In place, a gathered channel may be one that is written: all of a sample's first convolution (FIRST) is
    done before any of the rest (REST). Either both in one program per sample, a barrier between
    (``programs = 1``), or a launch of each, ``programs`` per sample. Spatial tiles that did both would be wrong.
    """
    program = tl.program_id(0)
    n = (program // programs).to(tl.int64)
    part = program % programs
    hw = hw_units * HW_ALIGN
    x_sample = x_ptr + n * stride_xn * ALIGN
    index_row = index_ptr + n * K
    mid_sample = mid_ptr + n * M * hw
    if FIRST:
        first_convolution(
            x_sample, index_row, conv_ptr, mid_sample, part, programs, hw, width, C, K, M, K_PAD, BLOCK_HW,
            BOTTLENECK, CHANNELS_LAST,
        )  # fmt: skip
    if FIRST and REST:
        tl.debug_barrier()
    if REST:
        j = tl.arange(0, K_PAD)
        score = tl.load(scores_ptr + n * K + j, mask=j < K, other=0.0)
        rest_of_block(
            x_sample, index_row, score, conv_ptr, mid_sample, part, programs, hw, width, C, K, M, K_PAD,
            M_PAD, BLOCK_HW, BOTTLENECK, FINAL_RELU, POSITION, CHANNELS_LAST,
        )  # fmt: skip

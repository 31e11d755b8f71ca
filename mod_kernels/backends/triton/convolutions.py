"""Convolutions of the narrowed blocks, for one tile of pixels at a time: steps for tail.py."""

import triton
import triton.language as tl

from .arithmetic import gelu, relu, relu6, sum_of_products
from .layout import offset_in_sample


@triton.jit
def channel_vector(ptr, channel, COUNT: tl.constexpr):
    """Vector of one value per channel, zero in the padding lanes."""
    return tl.load(ptr + channel, mask=channel < COUNT, other=0.0)


@triton.jit
def add_plane_3x3(
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
def gather_1x1(
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
        weight = channel_vector(weight_ptr + m * K, j, K)
        weights, values = tl.broadcast(weight[:, None], gathered)
        mid = sum_of_products(weights, values, 0) + tl.load(bias_ptr + m)
        tl.store(mid_sample + m * hw + pixel, relu(mid), mask=pixel < hw)


@triton.jit
def gather_3x3(
    x_sample, index_row, weight_ptr, bias_ptr, mid_sample, pixel, hw, width,
    C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_HW: tl.constexpr, RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``mid[o, p] = b1[o] + sum_j (w1[o, j] * x[index[j]])[p]``, 3x3, then RELU, for one tile of pixels."""
    out = tl.arange(0, K_PAD)
    acc = tl.zeros((K_PAD, BLOCK_HW), tl.float32) + channel_vector(bias_ptr, out, K)[:, None]
    for j in range(K):
        source = tl.load(index_row + j)
        inside = (source >= 0) & (source < C)
        tl.device_assert(inside, "index out of range")
        plane = x_sample + offset_in_sample(source, 0, hw, C, CHANNELS_LAST)
        stride: tl.constexpr = C if CHANNELS_LAST else 1
        acc = add_plane_3x3(acc, plane, weight_ptr + j * 9, out, pixel, hw, width, inside, K, K, stride)
    mask = (out < K)[:, None] & (pixel < hw)[None, :]
    tl.store(mid_sample + out[:, None] * hw + pixel[None, :], relu(acc) if RELU else acc, mask=mask)


@triton.jit
def expand_1x1(
    acc, weight_ptr, bias_ptr, K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, BLOCK_M: tl.constexpr
):
    """``z[j, p] = b3[j] + sum_m w3[j, m] * acc[m, p]``; acc (BLOCK_M, BLOCK_HW), z (K_PAD, BLOCK_HW)."""
    j = tl.arange(0, K_PAD)
    lane = tl.arange(0, BLOCK_M)
    z = tl.zeros((K_PAD, acc.shape[1]), tl.float32) + channel_vector(bias_ptr, j, K)[:, None]
    for m in range(M):
        # The select takes row m out of registers; a NaN in another row stays there.
        plane = tl.sum(tl.where((lane == m)[:, None], acc, 0.0), axis=0)
        weight = tl.load(weight_ptr + j * M + m, mask=j < K, other=0.0)
        z += weight[:, None] * plane[None, :]
    return z


@triton.jit
def gather_1x1_in_blocks(
    x_sample, index_row, weight_ptr, bias_ptr, mid_sample, pixel, hw,
    C: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """:func:`gather_1x1` with ReLU6, BLOCK_M outputs at a time: for more of them than gathered channels.

    Every sum is a thread's own; :func:`gather_1x1` adds over threads, once for every output.
    """
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_HW), tl.float32) + channel_vector(bias_ptr, m, M)[:, None]
        for j in range(K):
            source = tl.load(index_row + j)
            inside = (source >= 0) & (source < C)
            tl.device_assert(inside, "index out of range")
            place = offset_in_sample(source, pixel, hw, C, CHANNELS_LAST)
            value = tl.load(x_sample + place, mask=(pixel < hw) & inside, other=0.0)
            weight = tl.load(weight_ptr + m * K + j, mask=m < M, other=0.0)
            acc += weight[:, None] * value.to(tl.float32)[None, :]
        mask = (m < M)[:, None] & (pixel < hw)[None, :]
        tl.store(mid_sample + m[:, None] * hw + pixel[None, :], relu6(acc), mask=mask)


@triton.jit
def depthwise_3x3_and_1x1(
    mid_sample, weight_ptr, bias_ptr, weight3_ptr, bias3_ptr, pixel, hw, width,
    K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """``z[j, p] = b3[j] + sum_m w3[j, m] * relu6(b2[m] + sum over the taps of w2[m, tap] * mid[m, p + tap])``.

    Nine taps. A plane of mid at a time, so that M may be as large as it likes; z (K_PAD, BLOCK_HW).
    """
    j = tl.arange(0, K_PAD)
    row = pixel // width
    column = pixel % width
    height = hw // width
    z = tl.zeros((K_PAD, BLOCK_HW), tl.float32) + channel_vector(bias3_ptr, j, K)[:, None]
    for m in range(M):
        plane = tl.zeros((BLOCK_HW,), tl.float32) + tl.load(bias_ptr + m)
        for tap in tl.static_range(9):
            near_row = row + (tap // 3 - 1)
            near_column = column + (tap % 3 - 1)
            mask = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
            place = m * hw + near_row * width + near_column
            value = tl.load(mid_sample + place, mask=mask & (pixel < hw), other=0.0)
            plane += tl.load(weight_ptr + m * 9 + tap) * value
        weight = tl.load(weight3_ptr + j * M + m, mask=j < K, other=0.0)
        z += weight[:, None] * relu6(plane)[None, :]
    return z


@triton.jit
def gather_depthwise_7x7(
    x_sample, index_row, weight_ptr, bias_ptr, mid_sample, pixel, hw, width,
    C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_HW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """``mid[j, p] = b1[j] + sum over the taps of w1[j, tap] * x[index[j], p + tap]``, for one tile of pixels."""
    j = tl.arange(0, K_PAD)
    source = tl.load(index_row + j, mask=j < K, other=0)
    inside = (j < K) & (source >= 0) & (source < C)
    tl.device_assert((source >= 0) & (source < C), "index out of range")
    row = pixel // width
    column = pixel % width
    height = hw // width
    acc = tl.zeros((K_PAD, BLOCK_HW), tl.float32) + channel_vector(bias_ptr, j, K)[:, None]
    for tap_row in range(7):
        near_row = row + (tap_row - 3)
        row_inside = (near_row >= 0) & (near_row < height) & (pixel < hw)
        for tap_column in tl.static_range(7):
            near_column = column + (tap_column - 3)
            mask = row_inside & (near_column >= 0) & (near_column < width)
            near = near_row * width + near_column
            place = offset_in_sample(source[:, None], near[None, :], hw, C, CHANNELS_LAST)
            value = tl.load(x_sample + place, mask=inside[:, None] & mask[None, :], other=0.0)
            weight = tl.load(weight_ptr + j * 49 + tap_row * 7 + tap_column, mask=j < K, other=0.0)
            acc += weight[:, None] * value.to(tl.float32)
    mask = (j < K)[:, None] & (pixel < hw)[None, :]
    tl.store(mid_sample + j[:, None] * hw + pixel[None, :], acc, mask=mask)


@triton.jit
def load_planes(mid_sample, pixel, hw, K: tl.constexpr, K_PAD: tl.constexpr):
    """``mid[j, p]`` (K_PAD, BLOCK_HW) for one tile of pixels, zero in the padding lanes."""
    j = tl.arange(0, K_PAD)
    mask = (j < K)[:, None] & (pixel < hw)[None, :]
    return tl.load(mid_sample + j[:, None] * hw + pixel[None, :], mask=mask, other=0.0)


@triton.jit
def norm_and_two_1x1(
    mid_sample, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, pixel, hw,
    K: tl.constexpr, M: tl.constexpr, K_PAD: tl.constexpr, BLOCK_HW: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """``z[j, p] = b3[j] + sum_m w3[j, m] * gelu(b2[m] + sum_i w2[m, i] * normed[i, p])``; z (K_PAD, BLOCK_HW).

    normed is mid with mean 0 and variance 1 (EPS added to it) over the K channels of every pixel.
    """
    j = tl.arange(0, K_PAD)
    mid = load_planes(mid_sample, pixel, hw, K, K_PAD)
    mean = tl.sum(mid, axis=0) / K
    centred = tl.where((j < K)[:, None], mid - mean[None, :], 0.0)
    variance = sum_of_products(centred, centred, 0) / K
    normed = centred * tl.rsqrt(variance + EPS)[None, :]
    z = tl.zeros((K_PAD, BLOCK_HW), tl.float32) + channel_vector(bias3_ptr, j, K)[:, None]
    for m in range(M):
        weight2 = channel_vector(weight2_ptr + m * K, j, K)
        weights, values = tl.broadcast(weight2[:, None], normed)
        hidden = gelu(sum_of_products(weights, values, 0) + tl.load(bias2_ptr + m))
        weight3 = tl.load(weight3_ptr + j * M + m, mask=j < K, other=0.0)
        z += weight3[:, None] * hidden[None, :]
    return z

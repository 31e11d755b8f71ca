"""Arithmetic that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def sum_of_products(a, b, axis: tl.constexpr):
    """``sum(a * b, axis)``, the same bits in every thread that holds a copy of the result.

    Written plainly the compiler contracts each thread's own product into the addition of another's rounded one,
    so that threads end up with different last bits, and which of them is stored is a race (compute-sanitizer's
    racecheck found it). A fused multiply-add with zero rounds like a product and can't be contracted.
    """
    return tl.sum(tl.fma(a, b, tl.zeros_like(a)), axis=axis)


@triton.jit
def relu(value):
    """max(value, 0) that keeps NaN, as torch's ReLU does (``tl.maximum`` would drop it)."""
    return tl.where(value <= 0.0, 0.0, value)


@triton.jit
def relu6(value):
    """min(max(value, 0), 6) that keeps NaN."""
    return tl.where(value >= 6.0, 6.0, relu(value))


@triton.jit
def gelu(value):
    """``value * Phi(value)``, Phi the normal distribution's: the exact GELU."""
    return 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))


@triton.jit
def sigmoid(value):
    """1 / (1 + exp(-value))."""
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def channel_sums(
    run, hw, accumulator: tl.constexpr, CHUNK_C: tl.constexpr, BLOCK_HW: tl.constexpr, LANES: tl.constexpr
):
    """Sums over CHUNK_C planes of hw <= BLOCK_HW values that lie one after the other in ``run``.

    The run is read again as (steps, channels, LANES), LANES threads to a channel, so that nearly all additions are
    a thread's own.
    """
    step = tl.arange(0, BLOCK_HW // LANES)[:, None, None]
    channel = tl.arange(0, CHUNK_C)[None, :, None]
    pixel = step * LANES + tl.arange(0, LANES)[None, None, :]
    inside = pixel < hw
    place = tl.where(inside, channel * hw + pixel, 0)
    values = tl.gather(run, tl.reshape(place, (CHUNK_C * BLOCK_HW,)), axis=0)
    values = tl.reshape(values, (BLOCK_HW // LANES, CHUNK_C, LANES)).to(accumulator)
    return tl.sum(tl.sum(tl.where(inside, values, 0.0), axis=0), axis=1)

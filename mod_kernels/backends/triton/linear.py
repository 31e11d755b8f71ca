"""A layer of the selector over a whole batch: for many samples, whose weights are then read once for all."""

import triton
import triton.language as tl

from .arithmetic import relu


@triton.jit(do_not_specialize=["samples"])
def linear_fwd_kernel(
    in_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    samples,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
):
    """``out = in @ weight.T + bias``, then the ReLU; products and sums in float32.

    in (N, INPUTS), out (N, OUTPUTS) float32, weight (OUTPUTS, INPUTS). Grid: ``ceil(N / BLOCK_N) *
    ceil(OUTPUTS / BLOCK_OUT)``, the programs that share weights side by side.
    """
    row_blocks = (samples + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    row = (program % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = (program // row_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask, out_mask = (row < samples)[:, None], (out < OUTPUTS)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    for first in range(0, INPUTS, BLOCK_IN):
        i = (first + tl.arange(0, BLOCK_IN))[None, :]
        values = tl.load(in_ptr + row[:, None].to(tl.int64) * INPUTS + i, mask=row_mask & (i < INPUTS), other=0.0)
        weight = tl.load(weight_ptr + out[:, None] * INPUTS + i, mask=out_mask & (i < INPUTS), other=0.0)
        # Not TF32, which tl.dot takes by default: the logits are to be right to 2e-4 of the largest.
        total = tl.dot(values, tl.trans(weight.to(tl.float32)), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=out < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = relu(total)
    place = row[:, None].to(tl.int64) * OUTPUTS + out[None, :]
    tl.store(out_ptr + place, total, mask=row_mask & (out < OUTPUTS)[None, :])

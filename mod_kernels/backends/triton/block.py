"""The whole block: what can be shared out is, and the last program of a sample to finish its share does the rest.

So a block takes one launch where the selector's weights are few, and two where its second layer is shared out as
well; configs.py has the rule. The steps are those of select.py and tail.py.
"""

import triton
import triton.language as tl

from .arithmetic import sigmoid
from .select import layers_share, pool_share, select_sample
from .tail import first_convolution, rest_of_block


@triton.jit
def _is_last(counter_ptr, PROGRAMS: tl.constexpr):
    """Whether this program is the last of PROGRAMS to come here; what the others stored before is then visible.

    The counter goes back to 0, for the next launch. The barrier: the addition is one thread's, and up to Triton
    3.8 nothing makes it wait for the stores of the others.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == PROGRAMS - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit(do_not_specialize=["keys_units", "mid_units", "stride_xn", "hw_units", "width"])
def block_fwd_kernel(
    x_ptr,
    y_ptr,
    pooled_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    conv_ptr,
    logits_ptr,
    index_ptr,
    scratch_ptr,
    counters_ptr,
    keys_units: tl.int64,
    mid_units: tl.int64,
    stride_xn: tl.int64,
    hw_units,
    width,
    C: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    C_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    CHUNK_C: tl.constexpr,
    PARTS: tl.constexpr,
    POOL_HW: tl.constexpr,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICE_C: tl.constexpr,
    KEEP: tl.constexpr,
    TAIL_HW: tl.constexpr,
    POOLED: tl.constexpr,
    COPY: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    FINAL_RELU: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SHARED_OUT: tl.constexpr,
):
    """``y = x``, then ``y[:, P] += sigmoid(logits[index]) * conv_block(y[index])``, index the k best channels.

    SHARED_OUT says what the programs of a sample have shares of: "pool": pooling (and the copy) and the first
    layer, SHARES of them; "layers": the second layer, a slice of channels each, the slots having been filled by a
    launch before; "nothing": logits are there, and a sample is one program's.

    x (N, C, H, W), samples ``stride_xn * ALIGN`` elements apart, ``H*W = hw_units * HW_ALIGN``; y is x, or (COPY)
    dense in x's layout; pooled (N, C) float32, read where POOLED; fc1 (R, C), fc2 (C, R); conv as in tail.py;
    logits (N, C) float32, written but for "nothing"; index (N, K) int64; scratch: slots (N, SHARES, R) float32, at
    16 * keys_units keys (N, SLICES, KEEP) int64, at 16 * mid_units mid (N, PLANES, H, W) float32; counters (N,)
    int32, zero before and after.

    Hazards: a gathered channel may be one that is written, and is read for pooling by other programs. A sample is
    written by its last program alone, after all of them have read it, and there the first convolution is done, and
    a barrier passed, before the rest. What a program reads of the others' stores it reads after its addition to
    the counter, which acquires what each of theirs released.
    """
    SLICES: tl.constexpr = (C + SLICE_C - 1) // SLICE_C
    PROGRAMS: tl.constexpr = SHARES if SHARED_OUT == "pool" else SLICES if SHARED_OUT == "layers" else 1
    SELECTION: tl.constexpr = "slots" if SHARED_OUT == "pool" else "keys" if SHARED_OUT == "layers" else "logits"
    program = tl.program_id(0)
    n = (program // PROGRAMS).to(tl.int64)
    share = program % PROGRAMS
    hw = hw_units * HW_ALIGN
    y_sample = y_ptr + (n * C * hw if COPY else n * stride_xn * ALIGN)
    if SHARED_OUT == "pool":
        x_sample = x_ptr + n * stride_xn * ALIGN
        slots = scratch_ptr + n * SHARES * R
        pool_share(
            x_sample, y_sample, pooled_ptr + n * C, fc1_weight_ptr, slots, share, hw, C, R, CHUNK_C, PARTS,
            POOL_HW, RUN, LANES, BLOCK_R, POOLED, COPY, False, CHANNELS_LAST,
        )  # fmt: skip
    elif SHARED_OUT == "layers":
        layers_share(
            scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, logits_ptr, logits_ptr, keys_units, n, share,
            C, R, C_PAD, R_PAD, SHARES, BLOCK_SLOTS, BLOCK_C, SLICE_C, KEEP, HAS_FC1_BIAS, HAS_FC2_BIAS, False,
        )  # fmt: skip
    if PROGRAMS > 1:
        last = _is_last(counters_ptr + n, PROGRAMS)
    else:
        last = True
        tl.debug_barrier()  # its own slots are read back in another distribution over the threads
    if last:
        select_sample(
            scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, logits_ptr, logits_ptr, index_ptr, keys_units,
            n, C, R, K, C_PAD, R_PAD, K_PAD, SHARES, BLOCK_SLOTS, BLOCK_C, SLICE_C, KEEP, HAS_FC1_BIAS,
            HAS_FC2_BIAS, SELECTION, False,
        )  # fmt: skip
        index_row = index_ptr + n * K
        mid_sample = scratch_ptr + mid_units * 16 + n * PLANES * hw
        first_convolution(
            y_sample, index_row, conv_ptr, mid_sample, 0, 1, hw, width, C, K, M, K_PAD, BLOCK_M,
            TAIL_HW, KIND, CHANNELS_LAST,
        )  # fmt: skip
        tl.debug_barrier()
        j = tl.arange(0, K_PAD)
        chosen = tl.load(index_row + j, mask=j < K, other=0)
        score = sigmoid(tl.load(logits_ptr + n * C + chosen, mask=j < K, other=0.0))
        rest_of_block(
            y_sample, index_row, score, conv_ptr, mid_sample, 0, 1, hw, width, C, K, M, K_PAD, BLOCK_M,
            TAIL_HW, KIND, FINAL_RELU, POSITION, CHANNELS_LAST,
        )  # fmt: skip

"""Selector kernels: pooling with the first layer, the second layer with a first ranking, the ranking.

A launch ends where every program of the next needs what all of this one's have written, so there are no
counters, no atomics, and nothing that depends on the order of programs:

1. ``pool_fwd_kernel``: a program pools a chunk of channels and writes what they give to the first layer's sums
   into its own slot;
2. ``layers_fwd_kernel``: hidden layer from the slots, logits of a slice of channels, the best of the slice; left
   out where the second layer is small enough for whoever ranks to do it (SELECTION "slots", else "keys");
3. ``rank_fwd_kernel``, or the tail's first launch, which begins with the same :func:`select_sample`.
"""

import triton
import triton.language as tl

from .arithmetic import relu, sigmoid, sum_of_products

LOWEST_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below that of any logit


@triton.jit
def _layer(weight, vector):
    """``weight @ vector`` in float32, weight (rows, columns)."""
    weight, vector = tl.broadcast(weight.to(tl.float32), vector[None, :])
    return sum_of_products(weight, vector, 1)


@triton.jit(do_not_specialize=["stride_xn", "hw_units"])
def pool_fwd_kernel(
    x_ptr,
    y_ptr,
    pooled_ptr,
    fc1_weight_ptr,
    partial_ptr,
    stride_xn: tl.int64,
    hw_units,
    C: tl.constexpr,
    R: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    POOLED: tl.constexpr,
    COPY: tl.constexpr,
):
    """``pooled = mean_hw(x)``; ``partial[n, chunk, r]``: the sum over the chunk of ``fc1[r, c] * pooled[n, c]``.

    x (N, C, H, W), planes dense, samples ``stride_xn * ALIGN`` elements apart, ``H*W = hw_units * ALIGN``: the
    factor tells the compiler how wide its loads may be. fc1 (R, C); pooled (N, C), partial (N, CHUNKS, R) float32.

    Grid: ``N * CHUNKS``, CHUNK_C channels a program. POOLED: pooled is given and x is not read for pooling. COPY:
    x is written to y (dense) on the way.
    """
    CHUNKS: tl.constexpr = (C + CHUNK_C - 1) // CHUNK_C
    program = tl.program_id(0)
    n = (program // CHUNKS).to(tl.int64)
    chunk = program % CHUNKS
    hw = hw_units * ALIGN

    channel = chunk * CHUNK_C + tl.arange(0, CHUNK_C)
    channel_mask = channel < C
    if COPY or not POOLED:
        plane = channel[:, None] * hw  # int32: a sample has fewer than 2^31 elements (launch.py)
        x_sample = x_ptr + n * stride_xn * ALIGN
        y_sample = y_ptr + n * C * hw
        total = tl.zeros((CHUNK_C, BLOCK_HW), tl.float32)
        for start in range(0, hw, BLOCK_HW):
            pixel = (start + tl.arange(0, BLOCK_HW))[None, :]
            mask = channel_mask[:, None] & (pixel < hw)
            tile = tl.load(x_sample + (plane + pixel), mask=mask, other=0.0)  # (CHUNK_C, BLOCK_HW)
            if COPY:
                tl.store(y_sample + (plane + pixel), tile, mask=mask)
            if not POOLED:
                total += tile.to(tl.float32)
    if POOLED:
        pooled = tl.load(pooled_ptr + n * C + channel, mask=channel_mask, other=0.0)
    else:
        pooled = tl.sum(total, axis=1) / hw  # (CHUNK_C,)
        tl.store(pooled_ptr + n * C + channel, pooled, mask=channel_mask)

    for first in range(0, R, BLOCK_R):
        unit = first + tl.arange(0, BLOCK_R)
        mask = (unit < R)[:, None] & channel_mask[None, :]
        weight = tl.load(fc1_weight_ptr + unit[:, None] * C + channel[None, :], mask=mask, other=0.0)
        part = _layer(weight, pooled)  # (BLOCK_R,)
        tl.store(partial_ptr + (n * CHUNKS + chunk) * R + unit, part, mask=unit < R)


@triton.jit
def _hidden(
    partial_ptr, bias_ptr, n, R: tl.constexpr, R_PAD: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``relu(sum over the slots of partial[n] + b1)``, (R_PAD,), the slots in their order."""
    unit = tl.arange(0, R_PAD)
    unit_mask = unit < R
    slots = tl.zeros((BLOCK_SLOTS, R_PAD), tl.float32)
    for first in range(0, CHUNKS, BLOCK_SLOTS):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        mask = (slot < CHUNKS)[:, None] & unit_mask[None, :]
        slots += tl.load(partial_ptr + (n * CHUNKS + slot)[:, None] * R + unit[None, :], mask=mask, other=0.0)
    hidden = tl.sum(slots, axis=0)
    if HAS_BIAS:
        hidden += tl.load(bias_ptr + unit, mask=unit_mask, other=0.0).to(tl.float32)
    return relu(hidden)


@triton.jit
def _rank_keys(logits, channel, C: tl.constexpr, C_PAD: tl.constexpr):
    """int64 keys whose descending order is the ranking: larger logit, then lower channel; NaN before all.

    High half: the logit's bits as an int32 in the order of the floats. -0.0 becomes +0.0 first, every NaN the
    positive quiet one, which lies above +inf. Low half: ``C_PAD - 1 - channel``. Lanes beyond C get a key
    below that of any logit (-inf's high half is -0x7f800001, not the smallest int32).
    """
    logits = tl.where(logits != logits, float("nan"), logits + 0.0)
    bits = logits.to(tl.int32, bitcast=True)
    ordered = tl.where(logits != logits, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = (ordered.to(tl.int64) << 32) | (C_PAD - 1 - channel).to(tl.int64)
    return tl.where(channel < C, keys, LOWEST_KEY)


@triton.jit
def _logit_keys(
    partial_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, n, lowest,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_C: tl.constexpr, SLICE_C: tl.constexpr, HAS_FC1_BIAS: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr, STORE_HIDDEN: tl.constexpr,
):  # fmt: skip
    """``logits[n, c] = fc2[c] . hidden[n] + b2[c]`` of SLICE_C channels from ``lowest`` on; returns their keys."""
    hidden = _hidden(partial_ptr, fc1_bias_ptr, n, R, R_PAD, CHUNKS, BLOCK_SLOTS, HAS_FC1_BIAS)
    unit = tl.arange(0, R_PAD)
    if STORE_HIDDEN:
        tl.store(hidden_ptr + n * R + unit, hidden, mask=(unit < R) & (lowest == 0))
    for first in range(0, SLICE_C, BLOCK_C):
        out = lowest + first + tl.arange(0, BLOCK_C)
        mask = (out < C)[:, None] & (unit < R)[None, :]
        weight = tl.load(fc2_weight_ptr + out[:, None] * R + unit[None, :], mask=mask, other=0.0)
        logits = _layer(weight, hidden)  # (BLOCK_C,)
        if HAS_FC2_BIAS:
            logits += tl.load(fc2_bias_ptr + out, mask=out < C, other=0.0).to(tl.float32)
        tl.store(logits_ptr + n * C + out, logits, mask=out < C)
    tl.debug_barrier()  # read back in another distribution over the threads
    channel = lowest + tl.arange(0, SLICE_C)
    row = tl.load(logits_ptr + n * C + channel, mask=channel < C, other=0.0)
    return _rank_keys(row, channel, C, C_PAD)


@triton.jit
def _int64_at(scratch_ptr, units):
    """Pointer to the int64 section of float32 scratch that begins 16 * units elements in."""
    return (scratch_ptr + units * 16).to(tl.pointer_type(tl.int64))


@triton.jit(do_not_specialize=["keys_units"])
def layers_fwd_kernel(
    scratch_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    hidden_ptr,
    logits_ptr,
    keys_units: tl.int64,
    C: tl.constexpr,
    R: tl.constexpr,
    C_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICE_C: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
):
    """``logits = relu(sum of slots + b1) @ fc2.T + b2``, and the KEEP largest keys of every slice of SLICE_C.

    partial (N, CHUNKS, R) float32 at scratch, keys (N, SLICES, KEEP) int64 at scratch + 16 * keys_units; fc2
    (C, R); hidden (N, R), logits (N, C) float32. Grid: ``N * SLICES``.
    """
    SLICES: tl.constexpr = (C + SLICE_C - 1) // SLICE_C
    program = tl.program_id(0)
    n = (program // SLICES).to(tl.int64)
    keys = _logit_keys(
        scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, n,
        program % SLICES * SLICE_C, C, R, C_PAD, R_PAD, CHUNKS, BLOCK_SLOTS, BLOCK_C, SLICE_C, HAS_FC1_BIAS,
        HAS_FC2_BIAS, STORE_HIDDEN,
    )  # fmt: skip
    keys_ptr = _int64_at(scratch_ptr, keys_units) + program.to(tl.int64) * KEEP
    if KEEP == 1:  # tl.topk with k = 1 does not compile on Triton 3.6 and 3.8
        tl.store(keys_ptr, tl.max(keys, axis=0))
    else:
        tl.store(keys_ptr + tl.arange(0, KEEP), tl.topk(keys, KEEP) if KEEP < SLICE_C else keys)


@triton.jit
def select_sample(
    scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, index_ptr, keys_units, n,
    C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    K_PAD: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
    SLICE_C: tl.constexpr, KEEP: tl.constexpr, HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr,
    SELECTION: tl.constexpr, STORE_HIDDEN: tl.constexpr,
):  # fmt: skip
    """``index[n] = top k of logits[n]``, from the best keys of its slices (SELECTION "keys") or from the slots.

    From the slots the logits are worked out, and written, first. Several programs may do this for one sample:
    they write the same values.
    """
    if SELECTION == "slots":
        keys = _logit_keys(
            scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, n, 0,
            C, R, C_PAD, R_PAD, CHUNKS, BLOCK_SLOTS, BLOCK_C, SLICE_C, HAS_FC1_BIAS, HAS_FC2_BIAS, STORE_HIDDEN,
        )  # fmt: skip
    else:
        KEYS: tl.constexpr = (C + SLICE_C - 1) // SLICE_C * KEEP
        KEYS_PAD: tl.constexpr = (C_PAD // SLICE_C) * KEEP
        lane = tl.arange(0, KEYS_PAD)
        kept = _int64_at(scratch_ptr, keys_units) + n * KEYS
        keys = tl.load(kept + lane, mask=lane < KEYS, other=LOWEST_KEY)
    if K == 1:  # as in layers_fwd_kernel
        tl.store(index_ptr + n, C_PAD - 1 - (tl.max(keys, axis=0) & (C_PAD - 1)))
    else:
        rank = tl.arange(0, K_PAD)
        chosen = C_PAD - 1 - (tl.topk(keys, K_PAD) & (C_PAD - 1))
        tl.store(index_ptr + n * K + rank, chosen, mask=rank < K)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["keys_units"])
def rank_fwd_kernel(
    scratch_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    hidden_ptr,
    logits_ptr,
    index_ptr,
    scores_ptr,
    keys_units: tl.int64,
    C: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    C_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICE_C: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr,
    SELECTION: tl.constexpr,
):
    """``index = top k of logits``, ``scores = sigmoid(logits[index])``; grid: N. Shapes as in the kernels above.

    index (N, K) int64, scores (N, K) float32.
    """
    n = tl.program_id(0).to(tl.int64)
    select_sample(
        scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, index_ptr, keys_units, n,
        C, R, K, C_PAD, R_PAD, K_PAD, CHUNKS, BLOCK_SLOTS, BLOCK_C, SLICE_C, KEEP, HAS_FC1_BIAS, HAS_FC2_BIAS,
        SELECTION, True,
    )  # fmt: skip
    rank = tl.arange(0, K_PAD)
    index = tl.load(index_ptr + n * K + rank, mask=rank < K, other=0)
    logit = tl.load(logits_ptr + n * C + index, mask=rank < K, other=0.0)
    tl.store(scores_ptr + n * K + rank, sigmoid(logit), mask=rank < K)

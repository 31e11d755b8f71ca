"""Selector kernels: pooling with the first layer, the second layer with a first ranking, the ranking.

Each step is a function that a program runs for its share of a sample, so that the whole block (block.py) is made
of the same ones. Here a launch ends where every program of the next needs what all of this one's have written: no
counters, no atomics, nothing that depends on the order of programs:

1. ``pool_fwd_kernel``: a program pools a chunk of channels and writes what they give to the first layer's sums
   into its own slot;
2. ``layers_fwd_kernel``: hidden layer from the slots, logits of a slice of channels, the best of the slice; left
   out where the second layer is small enough for whoever ranks to do it (SELECTION "slots", else "keys");
3. ``rank_fwd_kernel``.
"""

import triton
import triton.language as tl

from .arithmetic import channel_sums, relu, sigmoid, sum_of_products
from .layout import offset_in_sample

LOWEST_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below that of any logit


@triton.jit
def _layer(weight, vector):
    """``weight @ vector`` in float32, weight (rows, columns)."""
    weight, vector = tl.broadcast(weight.to(tl.float32), vector[None, :])
    return sum_of_products(weight, vector, 1)


@triton.jit
def pool_share(
    x_sample, y_sample, pooled_row, fc1_weight_ptr, slots, share, hw,
    C: tl.constexpr, R: tl.constexpr, CHUNK_C: tl.constexpr, PARTS: tl.constexpr, BLOCK_HW: tl.constexpr,
    RUN: tl.constexpr, LANES: tl.constexpr, BLOCK_R: tl.constexpr, POOLED: tl.constexpr, COPY: tl.constexpr,
    STORE_POOLED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """A program's share of a sample's pooling and first layer: ``slots[share, r] = sum_c fc1[r, c] * pooled[c]``.

    Over CHUNK_C channels; of their pixels every PARTS-th block, so that the slots of a chunk add up. POOLED:
    pooled (C,) is given and x is not read for pooling. COPY: x is written to y on the way. STORE_POOLED: what was
    pooled is kept (PARTS = 1). R = 0: no layer. RUN: the chunk's planes are read as one run (add_relu_pool.py).
    """
    lowest = share // PARTS * CHUNK_C
    channel = lowest + tl.arange(0, CHUNK_C)
    part = share % PARTS
    channel_mask = channel < C
    if RUN > 0:
        if COPY or not POOLED:
            element = tl.arange(0, RUN)
            in_run = (element < CHUNK_C * hw) & (element < (C - lowest) * hw)
            run = tl.load(x_sample + lowest * hw + element, mask=in_run, other=0.0)
            if COPY:
                tl.store(y_sample + lowest * hw + element, run, mask=in_run)
            if not POOLED:
                sums = channel_sums(run, hw, tl.float32, CHUNK_C, BLOCK_HW, LANES)
    elif COPY or not POOLED:
        total = tl.zeros((CHUNK_C, BLOCK_HW), tl.float32)
        for start in range(part * BLOCK_HW, hw, PARTS * BLOCK_HW):
            pixel = start + tl.arange(0, BLOCK_HW)
            mask = channel_mask[:, None] & (pixel < hw)[None, :]
            place = offset_in_sample(channel[:, None], pixel[None, :], hw, C, CHANNELS_LAST)
            tile = tl.load(x_sample + place, mask=mask, other=0.0)  # (CHUNK_C, BLOCK_HW)
            if COPY:
                tl.store(y_sample + place, tile, mask=mask)
            if not POOLED:
                total += tile.to(tl.float32)
        sums = tl.sum(total, axis=1)
    if POOLED:
        pooled = tl.load(pooled_row + channel, mask=channel_mask & (part == 0), other=0.0)
    else:
        pooled = sums / hw  # (CHUNK_C,)
        if STORE_POOLED:
            tl.store(pooled_row + channel, pooled, mask=channel_mask)
    for first in range(0, R, BLOCK_R):
        unit = first + tl.arange(0, BLOCK_R)
        mask = (unit < R)[:, None] & channel_mask[None, :]
        weight = tl.load(fc1_weight_ptr + unit[:, None] * C + channel[None, :], mask=mask, other=0.0)
        tl.store(slots + share * R + unit, _layer(weight, pooled), mask=unit < R)


@triton.jit(do_not_specialize=["stride_xn", "hw_units"])
def pool_fwd_kernel(
    x_ptr,
    y_ptr,
    pooled_ptr,
    fc1_weight_ptr,
    slots_ptr,
    stride_xn: tl.int64,
    hw_units,
    C: tl.constexpr,
    R: tl.constexpr,
    ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    CHUNK_C: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    RUN: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    POOLED: tl.constexpr,
    COPY: tl.constexpr,
    STORE_POOLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """``pooled = mean_hw(x)``, and what each share of a sample gives to the first layer (:func:`pool_share`).

    x (N, C, H, W), samples ``stride_xn * ALIGN`` elements apart, ``H*W = hw_units * HW_ALIGN``: the factors tell
    the compiler how wide its loads may be; y dense, in x's layout; fc1 (R, C); pooled (N, C), slots
    (N, SHARES, R) float32. Grid: ``N * SHARES``.
    """
    SHARES: tl.constexpr = (C + CHUNK_C - 1) // CHUNK_C * PARTS
    program = tl.program_id(0)
    n = (program // SHARES).to(tl.int64)
    hw = hw_units * HW_ALIGN
    pool_share(
        x_ptr + n * stride_xn * ALIGN, y_ptr + n * C * hw, pooled_ptr + n * C, fc1_weight_ptr,
        slots_ptr + n * SHARES * R, program % SHARES, hw, C, R, CHUNK_C, PARTS, BLOCK_HW, RUN, LANES, BLOCK_R,
        POOLED, COPY, STORE_POOLED, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def _hidden(
    slots_ptr, bias_ptr, n, R: tl.constexpr, R_PAD: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``relu(sum over the slots of sample n + b1)``, (R_PAD,), the slots in their order."""
    unit = tl.arange(0, R_PAD)
    unit_mask = unit < R
    total = tl.zeros((BLOCK_SLOTS, R_PAD), tl.float32)
    for first in range(0, SHARES, BLOCK_SLOTS):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        mask = (slot < SHARES)[:, None] & unit_mask[None, :]
        total += tl.load(slots_ptr + (n * SHARES + slot)[:, None] * R + unit[None, :], mask=mask, other=0.0)
    hidden = tl.sum(total, axis=0)
    if HAS_BIAS:
        hidden += tl.load(bias_ptr + unit, mask=unit_mask, other=0.0).to(tl.float32)
    return relu(hidden)


@triton.jit
def _logits(
    slots_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, n, lowest,
    C: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, SHARES: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr, SLICE_C: tl.constexpr, HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
):  # fmt: skip
    """``logits[n, c] = fc2[c] . hidden[n] + b2[c]`` of SLICE_C channels from ``lowest`` on."""
    hidden = _hidden(slots_ptr, fc1_bias_ptr, n, R, R_PAD, SHARES, BLOCK_SLOTS, HAS_FC1_BIAS)
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
def _keys_of_slice(logits_ptr, n, lowest, C: tl.constexpr, C_PAD: tl.constexpr, SLICE_C: tl.constexpr):
    """The keys of SLICE_C channels from ``lowest`` on."""
    channel = lowest + tl.arange(0, SLICE_C)
    logits = tl.load(logits_ptr + n * C + channel, mask=channel < C, other=0.0)
    return _rank_keys(logits, channel, C, C_PAD)


@triton.jit
def _int64_at(scratch_ptr, units):
    """Pointer to the int64 section of float32 scratch that begins 16 * units elements in."""
    return (scratch_ptr + units * 16).to(tl.pointer_type(tl.int64))


@triton.jit
def layers_share(
    scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, keys_units, n, share,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_C: tl.constexpr, SLICE_C: tl.constexpr, KEEP: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, STORE_HIDDEN: tl.constexpr,
):  # fmt: skip
    """A program's share of a sample's second layer: a slice's logits, and the KEEP largest of their keys."""
    SLICES: tl.constexpr = (C + SLICE_C - 1) // SLICE_C
    lowest = share * SLICE_C
    _logits(
        scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, n, lowest, C, R, R_PAD,
        SHARES, BLOCK_SLOTS, BLOCK_C, SLICE_C, HAS_FC1_BIAS, HAS_FC2_BIAS, STORE_HIDDEN,
    )  # fmt: skip
    keys = _keys_of_slice(logits_ptr, n, lowest, C, C_PAD, SLICE_C)
    keys_ptr = _int64_at(scratch_ptr, keys_units) + (n * SLICES + share) * KEEP
    if KEEP == 1:  # tl.topk with k = 1 does not compile on Triton 3.6 and 3.8
        tl.store(keys_ptr, tl.max(keys, axis=0))
    else:
        tl.store(keys_ptr + tl.arange(0, KEEP), tl.topk(keys, KEEP) if KEEP < SLICE_C else keys)


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
    SHARES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICE_C: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr,
):
    """``logits = relu(sum of slots + b1) @ fc2.T + b2``, and the KEEP largest keys of every slice of SLICE_C.

    slots (N, SHARES, R) float32 at scratch, keys (N, SLICES, KEEP) int64 at scratch + 16 * keys_units; fc2
    (C, R); hidden (N, R), logits (N, C) float32. Grid: ``N * SLICES``.
    """
    SLICES: tl.constexpr = (C + SLICE_C - 1) // SLICE_C
    program = tl.program_id(0)
    layers_share(
        scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, keys_units,
        (program // SLICES).to(tl.int64), program % SLICES, C, R, C_PAD, R_PAD, SHARES, BLOCK_SLOTS, BLOCK_C,
        SLICE_C, KEEP, HAS_FC1_BIAS, HAS_FC2_BIAS, True,
    )  # fmt: skip


@triton.jit
def select_sample(
    scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, index_ptr, keys_units, n,
    C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
    K_PAD: tl.constexpr, SHARES: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
    SLICE_C: tl.constexpr, KEEP: tl.constexpr, HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr,
    SELECTION: tl.constexpr, STORE_HIDDEN: tl.constexpr,
):  # fmt: skip
    """``index[n] = top k of logits[n]``: SELECTION "slots": the logits are worked out, and written, first;
    "keys": from the best keys of their slices; "logits": they are there.
    """
    if SELECTION == "keys":
        KEYS: tl.constexpr = (C + SLICE_C - 1) // SLICE_C * KEEP
        KEYS_PAD: tl.constexpr = (C_PAD // SLICE_C) * KEEP
        lane = tl.arange(0, KEYS_PAD)
        kept = _int64_at(scratch_ptr, keys_units) + n * KEYS
        keys = tl.load(kept + lane, mask=lane < KEYS, other=LOWEST_KEY)
    else:
        if SELECTION == "slots":
            _logits(
                scratch_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, hidden_ptr, logits_ptr, n, 0, C, R, R_PAD,
                SHARES, BLOCK_SLOTS, BLOCK_C, C_PAD, HAS_FC1_BIAS, HAS_FC2_BIAS, STORE_HIDDEN,
            )  # fmt: skip
        keys = _keys_of_slice(logits_ptr, n, 0, C, C_PAD, C_PAD)
    if K == 1:  # as in layers_share
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
    SHARES: tl.constexpr,
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
        C, R, K, C_PAD, R_PAD, K_PAD, SHARES, BLOCK_SLOTS, BLOCK_C, SLICE_C, KEEP, HAS_FC1_BIAS, HAS_FC2_BIAS,
        SELECTION, True,
    )  # fmt: skip
    rank = tl.arange(0, K_PAD)
    index = tl.load(index_ptr + n * K + rank, mask=rank < K, other=0)
    logit = tl.load(logits_ptr + n * C + index, mask=rank < K, other=0.0)
    tl.store(scores_ptr + n * K + rank, sigmoid(logit), mask=rank < K)

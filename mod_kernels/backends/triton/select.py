"""Selector kernel: pooling, both layers and the top-k in one launch."""

import triton
import triton.language as tl

from .activation import relu


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
    return tl.where(channel < C, keys, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _store_selection(keys, scores_ptr, index_ptr, rank, mask, C_PAD: tl.constexpr):
    """Take channel and logit back out of the keys; ``score = 1 / (1 + exp(-logit))``."""
    channel = C_PAD - 1 - (keys & (C_PAD - 1))
    ordered = (keys >> 32).to(tl.int32)
    logit = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(scores_ptr + rank, 1.0 / (1.0 + tl.exp(-logit)), mask=mask)
    tl.store(index_ptr + rank, channel, mask=mask)


@triton.jit(do_not_specialize=["stride_xn", "hw_units"])
def select_channels_fwd_kernel(
    x_ptr,
    y_ptr,
    pooled_ptr,
    fc1_weight_ptr,
    fc2_weight_ptr,
    fc1_bias_ptr,
    fc2_bias_ptr,
    partial_ptr,
    counter_ptr,
    scores_ptr,
    index_ptr,
    logits_ptr,
    hidden_ptr,
    stride_xn: tl.int64,
    hw_units,
    C: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    C_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr,
    POOLED: tl.constexpr,
    COPY: tl.constexpr,
):
    """``logits = relu(mean_hw(x) @ fc1.T + b1) @ fc2.T + b2``, their k largest, ``scores = sigmoid`` of those.

    x (N, C, H, W), planes dense, samples ``stride_xn * ALIGN`` elements apart, ``H*W = hw_units * ALIGN``:
    the factor tells the compiler how wide its loads may be. fc1 (R, C), fc2 (C, R); pooled, logits (N, C),
    hidden (N, R), scores (N, K) float32, index (N, K) int64.

    Grid: ``N * CHUNKS``. A program pools CHUNK_C channels and writes what they give to the R sums of the first
    layer into its own slot of partial (N, CHUNKS, R); the program of a sample that arrives last adds the slots
    in their order and does the rest. No floating-point atomics, so results repeat bit for bit. counter (N):
    zero at entry, zero again at exit. POOLED: pooled is given and x is not read for pooling. COPY: x is
    written to y (dense) on the way.
    """
    CHUNKS: tl.constexpr = (C + CHUNK_C - 1) // CHUNK_C
    program = tl.program_id(0)
    n = (program // CHUNKS).to(tl.int64)
    chunk = program % CHUNKS
    hw = hw_units * ALIGN

    channel = chunk * CHUNK_C + tl.arange(0, CHUNK_C)
    channel_mask = channel < C
    if COPY or not POOLED:
        plane = channel.to(tl.int64)[:, None] * hw
        x_planes = x_ptr + n * stride_xn * ALIGN + plane
        y_planes = y_ptr + n * C * hw + plane
        total = tl.zeros((CHUNK_C, BLOCK_HW), tl.float32)
        for start in range(0, hw, BLOCK_HW):
            pixel = (start + tl.arange(0, BLOCK_HW))[None, :]
            mask = channel_mask[:, None] & (pixel < hw)
            tile = tl.load(x_planes + pixel, mask=mask, other=0.0)  # (CHUNK_C, BLOCK_HW)
            if COPY:
                tl.store(y_planes + pixel, tile, mask=mask)
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
        part = tl.sum(weight.to(tl.float32) * pooled[None, :], axis=1)  # (BLOCK_R,)
        tl.store(partial_ptr + (n * CHUNKS + chunk) * R + unit, part, mask=unit < R)

    # One thread issues the atomic (up to Triton 3.8 without a block barrier of its own): the barrier puts all
    # threads' slots before it.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + n, 1, sem="acq_rel")
    if arrived == CHUNKS - 1:
        unit = tl.arange(0, R_PAD)
        unit_mask = unit < R
        slots = tl.zeros((BLOCK_SLOTS, R_PAD), tl.float32)
        for first in range(0, CHUNKS, BLOCK_SLOTS):
            slot = first + tl.arange(0, BLOCK_SLOTS)
            mask = (slot < CHUNKS)[:, None] & unit_mask[None, :]
            offset = (n * CHUNKS + slot)[:, None] * R + unit[None, :]
            # .cg: other multiprocessors wrote these, so not from this one's L1.
            slots += tl.load(partial_ptr + offset, mask=mask, other=0.0, cache_modifier=".cg")
        hidden = tl.sum(slots, axis=0)  # (R_PAD,)
        if HAS_FC1_BIAS:
            hidden += tl.load(fc1_bias_ptr + unit, mask=unit_mask, other=0.0).to(tl.float32)
        hidden = relu(hidden)
        tl.store(hidden_ptr + n * R + unit, hidden, mask=unit_mask)

        for first in range(0, C, BLOCK_C):
            out = first + tl.arange(0, BLOCK_C)
            mask = (out < C)[:, None] & unit_mask[None, :]
            weight = tl.load(fc2_weight_ptr + out[:, None] * R + unit[None, :], mask=mask, other=0.0)
            logits = tl.sum(weight.to(tl.float32) * hidden[None, :], axis=1)  # (BLOCK_C,)
            if HAS_FC2_BIAS:
                logits += tl.load(fc2_bias_ptr + out, mask=out < C, other=0.0).to(tl.float32)
            tl.store(logits_ptr + n * C + out, logits, mask=out < C)

        # The whole row is read back in another distribution over the threads.
        tl.debug_barrier()
        everyone = tl.arange(0, C_PAD)
        row = tl.load(logits_ptr + n * C + everyone, mask=everyone < C, other=0.0)
        keys = _rank_keys(row, everyone, C, C_PAD)
        if K == 1:  # tl.topk with k = 1 does not compile on Triton 3.6 and 3.8
            _store_selection(tl.max(keys, axis=0), scores_ptr, index_ptr, n, True, C_PAD)
        else:
            rank = tl.arange(0, K_PAD)
            _store_selection(tl.topk(keys, K_PAD), scores_ptr, index_ptr, n * K + rank, rank < K, C_PAD)
        tl.store(counter_ptr + n, 0)  # everyone of this sample has arrived: a plain store will do

"""Backward of the selector: two launches, small matrix products over the batch.

A launch ends between them because a gradient of the weights takes a part from every sample.
"""

import triton
import triton.language as tl


@triton.jit
def _selected_gradients(dscores_row, scores_row, index_row, j, C: tl.constexpr, K: tl.constexpr):
    """Of the j-th selected channels: which they are, whether they are any, and their logits' gradients."""
    mask = j < K
    score = tl.load(scores_row + j, mask=mask, other=0.0)
    gradient = tl.load(dscores_row + j, mask=mask, other=0.0) * score * (1.0 - score)
    target = tl.load(index_row + j, mask=mask, other=0)
    inside = (target >= 0) & (target < C)
    tl.device_assert(inside, "index out of range")
    return target, mask & inside, gradient


@triton.jit
def select_hidden_bwd_kernel(
    dscores_ptr,
    scores_ptr,
    index_ptr,
    hidden_ptr,
    fc2_weight_ptr,
    dlogits_ptr,
    dhidden_ptr,
    C: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOGITS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """``dlogits[n, index[n, j]] = dscores * s * (1 - s)``, zero elsewhere; ``dhidden = dlogits @ fc2``.

    dhidden is zero where hidden <= 0; a NaN passes, as torch's ReLU has it.

    dscores, scores (N, K), hidden, dhidden (N, R), dlogits (N, C), all float32; index (N, K) int64 without repeats
    in a row; fc2 (C, R), of which only the selected rows are read. Without LOGITS or HIDDEN that output is not
    needed. Grid: ``N * ceil(R / BLOCK_R)``; the first program of a sample writes its row of dlogits.
    """
    PARTS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    n = (program // PARTS).to(tl.int64)
    part = program % PARTS
    dscores_row = dscores_ptr + n * K
    scores_row = scores_ptr + n * K
    index_row = index_ptr + n * K
    if LOGITS:  # noqa: SIM102 (decided when the kernel is compiled)
        if part == 0:
            row = dlogits_ptr + n * C
            for first in range(0, C, BLOCK_C):
                channel = first + tl.arange(0, BLOCK_C)
                tl.store(row + channel, tl.zeros((BLOCK_C,), tl.float32), mask=channel < C)
            tl.debug_barrier()  # zeros and gradients of a channel are stored by different threads
            for first in range(0, K, BLOCK_K):
                j = first + tl.arange(0, BLOCK_K)
                target, mask, gradient = _selected_gradients(dscores_row, scores_row, index_row, j, C, K)
                tl.store(row + target, gradient, mask=mask)
    if HIDDEN:
        unit = part * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
        for first in range(0, K, BLOCK_K):
            j = first + tl.arange(0, BLOCK_K)
            target, mask, gradient = _selected_gradients(dscores_row, scores_row, index_row, j, C, K)
            place = target[:, None] * R + unit[None, :]
            weight = tl.load(fc2_weight_ptr + place, mask=mask[:, None] & (unit < R)[None, :], other=0.0)
            weight, gradient = tl.broadcast(weight.to(tl.float32), gradient[:, None])
            total = tl.fma(weight, gradient, total)
        hidden = tl.load(hidden_ptr + n * R + unit, mask=unit < R, other=0.0)
        dhidden = tl.where(hidden <= 0.0, 0.0, tl.sum(total, axis=0))
        tl.store(dhidden_ptr + n * R + unit, dhidden, mask=unit < R)


@triton.jit
def _load_tile(ptr, row, column, rows, COLUMNS: tl.constexpr):
    """The tile (row, column) of a matrix (rows, COLUMNS); zeros outside."""
    mask = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(ptr + row[:, None].to(tl.int64) * COLUMNS + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, row, column, rows, COLUMNS: tl.constexpr, tile):
    mask = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    tl.store(ptr + row[:, None].to(tl.int64) * COLUMNS + column[None, :], tile, mask=mask)


@triton.jit
def _layer_gradient(
    dout_ptr, in_ptr, weight_ptr, bias_ptr, row, column, samples,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The tile (row, column) of ``weight = dout.T @ in``; with the first columns, ``bias``, the sum of dout."""
    weight = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    bias = tl.zeros((BLOCK_N, row.shape[0]), tl.float32)
    for first in range(0, samples, BLOCK_N):
        sample = first + tl.arange(0, BLOCK_N)
        dout = _load_tile(dout_ptr, sample, row, samples, ROWS)
        bias += dout
        if WEIGHT:
            values = _load_tile(in_ptr, sample, column, samples, COLUMNS)
            weight = tl.dot(tl.trans(dout), values, weight, input_precision="ieee")  # not TF32
    if WEIGHT:
        _store_tile(weight_ptr, row, column, ROWS, COLUMNS, weight)
    if BIAS:
        tl.store(bias_ptr + row, tl.sum(bias, axis=0), mask=(row < ROWS) & (tl.min(column) == 0))


@triton.jit
def _pooled_tile(
    dhidden_ptr, fc1_weight_ptr, dpooled_ptr, sample, channel, samples,
    C: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of dpooled."""
    dpooled = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, R, BLOCK_R):
        unit = first + tl.arange(0, BLOCK_R)
        dhidden = _load_tile(dhidden_ptr, sample, unit, samples, R)
        fc1 = _load_tile(fc1_weight_ptr, unit, channel, R, C).to(tl.float32)
        dpooled = tl.dot(dhidden, fc1, dpooled, input_precision="ieee")
    _store_tile(dpooled_ptr, sample, channel, samples, C, dpooled)


@triton.jit(do_not_specialize=["samples"])
def select_weights_bwd_kernel(
    dlogits_ptr,
    dhidden_ptr,
    hidden_ptr,
    pooled_ptr,
    fc1_weight_ptr,
    dpooled_ptr,
    dfc1_weight_ptr,
    dfc2_weight_ptr,
    dfc1_bias_ptr,
    dfc2_bias_ptr,
    samples,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    POOLED: tl.constexpr,
    FC1: tl.constexpr,
    FC2: tl.constexpr,
    FC1_BIAS: tl.constexpr,
    FC2_BIAS: tl.constexpr,
):
    """``dfc2 = dlogits.T @ hidden``, ``dfc1 = dhidden.T @ pooled``, ``dpooled = dhidden @ fc1``, and the biases'.

    Those are the sums of dlogits and dhidden over the batch. Products and sums in float32, samples in their order.

    dlogits, pooled, dpooled (N, C), dhidden, hidden (N, R), all outputs float32; fc1, dfc1 (R, C); dfc2 (C, R). Of
    the outputs only those are written whose flag is set. Grid: with any gradient of the selector's parameters
    ``ceil(C / BLOCK_C) * ceil(R / BLOCK_R)`` programs, a tile of dfc1 and of dfc2 each; then with POOLED
    ``ceil(N / BLOCK_N) * ceil(C / BLOCK_C)``, those that share weights side by side.
    """
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PARAMETERS: tl.constexpr = FC1 or FC2 or FC1_BIAS or FC2_BIAS
    OF_PARAMETERS: tl.constexpr = C_BLOCKS * R_BLOCKS if PARAMETERS else 0
    program = tl.program_id(0)
    if program < OF_PARAMETERS:
        channel = program // R_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        unit = program % R_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
        if FC1 or FC1_BIAS:
            _layer_gradient(
                dhidden_ptr, pooled_ptr, dfc1_weight_ptr, dfc1_bias_ptr, unit, channel, samples,
                R, C, BLOCK_N, FC1, FC1_BIAS,
            )  # fmt: skip
        if FC2 or FC2_BIAS:
            _layer_gradient(
                dlogits_ptr, hidden_ptr, dfc2_weight_ptr, dfc2_bias_ptr, channel, unit, samples,
                C, R, BLOCK_N, FC2, FC2_BIAS,
            )  # fmt: skip
    elif POOLED:
        row_blocks = (samples + BLOCK_N - 1) // BLOCK_N
        tile = program - OF_PARAMETERS
        sample = tile % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        channel = tile // row_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        _pooled_tile(
            dhidden_ptr, fc1_weight_ptr, dpooled_ptr, sample, channel, samples, C, R, BLOCK_N, BLOCK_C, BLOCK_R
        )

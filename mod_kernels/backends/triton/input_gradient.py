"""The gradient of a block's input: one pass over a whole map that adds all parts of it up."""

import triton
import triton.language as tl

from .layout import offset_in_sample


@triton.jit
def _selected(index_row, channel, C: tl.constexpr, K: tl.constexpr, CHUNK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The j with ``index[j] == channel`` for each of CHUNK_C channels, -1 where there is none."""
    selected = tl.full((CHUNK_C,), -1, tl.int32)
    for first in range(0, K, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        target = tl.load(index_row + j, mask=j < K, other=-1)
        tl.device_assert((target >= 0) & (target < C) | (j >= K), "index out of range")
        found = tl.where(target[None, :] == channel[:, None], j[None, :], -1)
        selected = tl.maximum(selected, tl.max(found, axis=1))
    return selected


@triton.jit
def _add_up(
    dy_ptr, shift, dgathered_ptr, gathered, y_ptr, overwritten_ptr, overwritten, dx_ptr, mask,
    accumulator: tl.constexpr, HAS_DPOOLED: tl.constexpr, HAS_DGATHERED: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_OVERWRITTEN: tl.constexpr,
):  # fmt: skip
    """The kernel's formula for one tile; ``gathered`` and ``overwritten``: where those maps have a value."""
    dy = tl.load(dy_ptr, mask=mask, other=0.0)
    total = dy.to(accumulator)
    if HAS_DPOOLED:
        total += shift
    if HAS_DGATHERED:
        total += tl.load(dgathered_ptr, mask=mask & gathered, other=0.0).to(accumulator)
    if HAS_Y:
        y = tl.load(y_ptr, mask=mask, other=0.0).to(accumulator)
        if HAS_OVERWRITTEN:
            before = tl.load(overwritten_ptr, mask=mask & overwritten, other=0.0).to(accumulator)
            y = tl.where(overwritten, before, y)
        total = tl.where(y <= 0.0, 0.0, total)  # a NaN passes, as torch's ReLU has it
    tl.store(dx_ptr, total.to(dy.dtype), mask=mask)


@triton.jit(
    do_not_specialize=["stride_dyn", "stride_yn", "stride_gathered", "stride_overwritten", "hw_units", "tiles"]
)
def input_gradient_bwd_kernel(
    dy_ptr,
    dpooled_ptr,
    dgathered_ptr,
    index_ptr,
    y_ptr,
    overwritten_ptr,
    dx_ptr,
    stride_dyn: tl.int64,
    stride_yn: tl.int64,
    stride_gathered: tl.int64,
    stride_overwritten: tl.int64,
    hw_units,
    tiles,
    C: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    HW_ALIGN: tl.constexpr,
    CHUNK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    STEPS: tl.constexpr,
    RUN: tl.constexpr,
    POSITION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_DPOOLED: tl.constexpr,
    HAS_DGATHERED: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_OVERWRITTEN: tl.constexpr,
):
    """``dx = dy + dpooled / (H*W)``, plus ``dgathered[n, j]`` at channel ``index[n, j]``; zero where ``y <= 0``.

    On the channels P of POSITION, with HAS_OVERWRITTEN, the value of overwritten stands for that of y. Every part
    but dy may be left out. dy, y (N, C, H, W), dgathered, overwritten (N, K, H, W) in one layout and type, samples
    dense, those of the first two ``stride_?n * ALIGN`` elements apart, of the others ``stride_? * K_ALIGN``,
    ``H*W = hw_units * HW_ALIGN``; dpooled (N, C) float32 (float64 for float64), the type of the sum, which is
    rounded once; index (N, K) int64 without repeats in a row; dx (N, C, H, W) dense, in dy's layout. Grid:
    ``N * ceil(C / CHUNK_C) * tiles``, STEPS times BLOCK_HW pixels of CHUNK_C channels a program.

    A program looks its channels up in the sample's row of index, so nothing is scattered and each place of dx is
    written once. RUN: planes that do not begin at multiples of 16 bytes are taken as in add_relu_pool.py, as one
    run of CHUNK_C * H*W <= RUN values, to which their channels' part of dpooled and their j are brought through
    shared memory.
    """
    CHUNKS: tl.constexpr = (C + CHUNK_C - 1) // CHUNK_C
    WIDE: tl.constexpr = dy_ptr.dtype.element_ty == tl.float64
    accumulator: tl.constexpr = tl.float64 if WIDE else tl.float32
    START: tl.constexpr = C - K if POSITION == "last" else 0  # the first channel of P
    ORIGINAL: tl.constexpr = HAS_OVERWRITTEN and POSITION == "original"
    program = tl.program_id(0)
    n = (program // tiles // CHUNKS).to(tl.int64)
    first = program // tiles % CHUNKS * CHUNK_C
    channel = first + tl.arange(0, CHUNK_C)
    hw = hw_units * HW_ALIGN
    dy_sample = dy_ptr + n * stride_dyn * ALIGN
    y_sample = y_ptr + n * stride_yn * ALIGN
    dgathered_sample = dgathered_ptr + n * stride_gathered * K_ALIGN
    overwritten_sample = overwritten_ptr + n * stride_overwritten * K_ALIGN
    dx_sample = dx_ptr + n * C * hw
    selected = channel
    if HAS_DGATHERED or ORIGINAL:
        selected = _selected(index_ptr + n * K, channel, C, K, CHUNK_C, BLOCK_K)
    shift = tl.zeros((CHUNK_C,), accumulator)
    if HAS_DPOOLED:
        shift = tl.load(dpooled_ptr + n * C + channel, mask=channel < C, other=0.0) / hw
    # Offsets are int32: a sample has fewer than 2^31 elements (launch.py).
    if RUN > 0:
        element = tl.arange(0, RUN)
        mask = (element < CHUNK_C * hw) & (element < (C - first) * hw)
        # element // hw in two instructions in place of twenty, exact as long as element * hw < 2^BITS.
        BITS: tl.constexpr = 20
        tl.static_assert(RUN * BLOCK_HW <= 1 << BITS)
        row = tl.minimum((element * ((1 << BITS) // hw + 1)) >> BITS, CHUNK_C - 1)
        shift = tl.gather(shift, row, axis=0)
        # From a value's place in the run to its place in dgathered; negative everywhere where there is none.
        to_gathered = tl.where(selected >= 0, (selected - tl.arange(0, CHUNK_C)) * hw, -RUN)
        in_gathered = element + tl.gather(to_gathered, row, axis=0)
        gathered = in_gathered >= 0
        overwritten = gathered
        in_overwritten = in_gathered
        if not ORIGINAL:
            overwritten = (element >= (START - first) * hw) & (element < (START + K - first) * hw)
            in_overwritten = (first - START) * hw + element
        offset = first * hw + element
        _add_up(
            dy_sample + offset, shift, dgathered_sample + in_gathered, gathered, y_sample + offset,
            overwritten_sample + in_overwritten, overwritten, dx_sample + offset, mask,
            accumulator, HAS_DPOOLED, HAS_DGATHERED, HAS_Y, HAS_OVERWRITTEN,
        )  # fmt: skip
    else:
        kept = selected if ORIGINAL else channel - START
        overwritten = (kept >= 0) & (kept < K)
        for step in range(STEPS):
            pixel = ((program % tiles * STEPS + step) * BLOCK_HW + tl.arange(0, BLOCK_HW))[None, :]
            mask = (channel < C)[:, None] & (pixel < hw)
            offset = offset_in_sample(channel[:, None], pixel, hw, C, CHANNELS_LAST)
            in_gathered = offset_in_sample(selected[:, None], pixel, hw, K, CHANNELS_LAST)
            in_overwritten = offset_in_sample(kept[:, None], pixel, hw, K, CHANNELS_LAST)
            _add_up(
                dy_sample + offset, shift[:, None], dgathered_sample + in_gathered, (selected >= 0)[:, None],
                y_sample + offset, overwritten_sample + in_overwritten, overwritten[:, None], dx_sample + offset,
                mask, accumulator, HAS_DPOOLED, HAS_DGATHERED, HAS_Y, HAS_OVERWRITTEN,
            )  # fmt: skip

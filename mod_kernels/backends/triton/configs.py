"""The rules by which plans, block sizes and warps follow from a call's sizes and a GPU's :class:`.tuning.Tuning`.

Batch, height and width are run-time values: other image sizes reuse a variant as long as they fall into the same
block sizes and the same alignment. ``test_ahead_of_time.py`` holds the registers and shared memory it takes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import gcd

from .tuning import Tuning

# Widest factor of the row length told to the compiler: 16 elements are 32 bytes in float16, more than one load.
MAX_ALIGN = 16
# torch's names to Triton's, for the dtypes this engine serves.
SCALAR_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
SCALAR_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
WIDEST_LOAD = 16  # bytes a thread


@dataclass(frozen=True)
class PoolConfig:
    """A program pools ``chunk_channels``, one of ``parts`` of their pixels, ``block_hw`` at a time.

    With ``run``, the chunk's planes at once as so many values in a row, of which ``lanes`` threads sum a channel.
    """

    chunk_channels: int
    parts: int
    shares: int  # programs of a sample
    block_hw: int
    run: int
    lanes: int
    tile: int  # values a program may keep
    num_warps: int

    def units(self, hidden: int) -> int:
        """Units of the first layer that it then takes at a time."""
        return min(power_of_two(hidden), max(1, self.tile // self.chunk_channels))


@dataclass(frozen=True)
class LayersConfig:
    """``slice_channels`` a program, ``block_slots`` x R slots and ``block_channels`` x R weights at a time."""

    slice_channels: int
    block_slots: int
    block_channels: int
    num_warps: int


@dataclass(frozen=True)
class TailConfig:
    """Pixels a program holds at a time, for all k (or ``block_mid``) channels; ``split``: two launches."""

    block_hw: int
    block_mid: int
    num_warps: int
    split: bool


@dataclass(frozen=True)
class PlaneConfig:
    """``block_channels`` x ``block_hw`` pixels a program, in one pass; ``chunks`` and ``tiles`` of them.

    With ``flat`` the channels of a sample count as one, whose pixels are all of their values in a row.
    """

    block_channels: int
    chunks: int
    block_hw: int
    tiles: int
    num_warps: int
    flat: bool = False


def power_of_two(value: int) -> int:
    """The smallest power of two that is no smaller than ``value``."""
    return 1 << (value - 1).bit_length()


def align_of(*lengths: int) -> int:
    """The largest power of two, at most MAX_ALIGN, that divides every length."""
    return gcd(MAX_ALIGN, *lengths)


def accumulator(x: str) -> str:
    """Triton's name of the type that values of type ``x`` are summed in."""
    return "fp64" if x == "fp64" else "fp32"


@functools.lru_cache
def pool_config(
    tuning: Tuning, x: str, channels: int, hw: int, hw_align: int, channels_last: bool, fused: bool = False
) -> PoolConfig:
    """Block sizes of the pooling, add_relu_pool's too, for x's type.

    In a run where the planes' own alignment gives narrow loads and at least 16 planes fit a tile: 16 planes begin
    at a multiple of 16 elements whatever H*W is. ``fused``: inside a block, where no program needs the whole of a
    channel, and a tile is shared out to up to ``block_warps`` warps, each thread of which is to load 16 bytes.
    """
    tile, warps, parts, run = tuning.tile, tuning.pool_warps, 1, 0
    channels_pad, hw_pad = power_of_two(channels), power_of_two(hw)
    narrow = not channels_last and hw_align * SCALAR_BYTES[x] < WIDEST_LOAD
    if narrow and 16 * hw <= tile:
        chunk = min(channels_pad, 64, power_of_two(tile // hw + 1) // 2)
        run, block_hw = power_of_two(chunk * hw), hw_pad
    elif channels_last and fused:
        chunk = min(tuning.split_chunk, channels_pad)
        block_hw = min(2 * tile // chunk, hw_pad)
        parts = min(-(-hw // block_hw), max(1, tuning.pool_shares // -(-channels // chunk)))
    else:
        blocks = tuning.pool_blocks_channels_last if channels_last else tuning.pool_blocks
        _, block_hw, chunk = next(row for row in blocks if row[0] is None or hw <= row[0])
        block_hw = block_hw // 2 if x == "fp64" else block_hw  # two registers a value
        block_hw, chunk = min(block_hw, hw_pad), min(chunk, channels_pad)
        least = 32 * tuning.block_warps * WIDEST_LOAD if fused else 0
        while block_hw < hw_pad and chunk * block_hw * SCALAR_BYTES[x] < least:
            block_hw *= 2
    lanes = min(block_hw, 32 * warps // chunk) if run else 0
    return PoolConfig(chunk, parts, -(-channels // chunk) * parts, block_hw, run, lanes, tile, warps)


@functools.lru_cache
def layers_config(tuning: Tuning, channels: int, hidden: int, shares: int, apart: bool) -> LayersConfig:
    """Tiles of the layers after pooling.

    Weights are loaded four tiles at a time, 64 values a thread, all in flight at once: a program does little
    else but wait for them.
    """
    hidden_pad, channels_pad = power_of_two(hidden), power_of_two(channels)
    slice_channels = min(channels_pad, tuning.slice_channels) if apart else channels_pad
    return LayersConfig(
        slice_channels=slice_channels,
        block_slots=min(power_of_two(shares), max(1, tuning.tile // hidden_pad)),
        block_channels=min(slice_channels, max(1, 4 * tuning.tile // hidden_pad)),
        num_warps=tuning.layer_warps,
    )


# Kinds whose inner width is larger than k: they go through it by blocks, or a plane at a time.
WIDE_KINDS = ("inverted_residual", "convnext")


@functools.lru_cache
def tail_config(tuning: Tuning, kind: str, k: int, mid: int, hw: int, num_warps: int) -> TailConfig:
    """Block sizes of the tail: ``tail_values`` a thread of the k (or m) x block_hw float32 values.

    At least 16 pixels, and 2 pixels a thread at most, 1 where both convolutions are 3x3 (mid = k). A sample that
    fits one block takes one program of ``tail_``, which then needs no second launch.
    """
    wide = kind in WIDE_KINDS
    rows, threads = power_of_two(k if wide else max(k, mid)), 32 * num_warps
    values = next(values for most, values in dict(tuning.tail_values)[num_warps] if most is None or rows <= most)
    pixels = threads if mid == k else 2 * threads
    block_hw = max(16, min(power_of_two(hw), pixels, values * threads // rows))
    block_mid = min(power_of_two(mid), max(1, values * threads // block_hw)) if wide else power_of_two(mid)
    return TailConfig(block_hw, block_mid, num_warps, split=hw > block_hw)


def own_tail_config(tuning: Tuning, kind: str, k: int, mid: int, hw: int) -> TailConfig:
    """That of ``tail_``: half as many warps for planes of 7 x 7."""
    num_warps = tuning.tail_warps // 2 if hw <= 64 else tuning.tail_warps
    return tail_config(tuning, kind, k, mid, hw, num_warps)


def plane_values(tuning: Tuning, x: str, channels_last: bool, mixed: bool = False) -> int:
    """Values that a program of gather or fuse takes at most: half as many where ptxas spilled some.

    That was float64 in channels_last, and x and z in different layouts (``mixed``). Half as many float64 in NCHW
    would spill where all do not.
    """
    return tuning.max_block_hw * (1 if mixed or (x == "fp64" and channels_last) else 2)


@functools.lru_cache
def plane_config(
    tuning: Tuning, channels: int, hw: int, values: int, most: int, channels_last: bool
) -> PlaneConfig:
    """Block sizes of gather and fuse, a pass over memory: ``values`` of ``most`` channels a program.

    The block is long where the layout is dense: in NCHW along the pixels, in channels_last along the channels.
    """
    block_hw, block_channels = min(power_of_two(hw), tuning.max_block_hw), min(power_of_two(channels), most)
    if channels_last:
        block_hw = min(block_hw, values // block_channels)
    else:
        block_channels = min(block_channels, values // block_hw)
    warps = 4 if block_channels * block_hw > 512 else 1
    return PlaneConfig(block_channels, -(-channels // block_channels), block_hw, -(-hw // block_hw), warps)


def gather_config(tuning: Tuning, x: str, k: int, hw: int, channels_last: bool) -> PlaneConfig:
    return plane_config(
        tuning,
        k,
        hw,
        plane_values(tuning, x, channels_last),
        tuning.plane_k if channels_last else 1,
        channels_last,
    )


def fuse_is_flat(x: str, hw_align: int, position: str, channels_last: bool, z_channels_last: bool) -> bool:
    """Whether fuse takes a sample's values in a row, whatever channel they are of.

    In NCHW, where planes do not begin at multiples of 16 bytes but samples may: those of 7x7, and of 14x14 in half
    precision. Elsewhere tiles load 16 bytes too and work out no channel for each value. Channels of "original"
    lie anywhere.
    """
    in_rows = position != "original" and not channels_last and not z_channels_last
    return in_rows and hw_align * SCALAR_BYTES[x] < WIDEST_LOAD


@functools.lru_cache
def fuse_config(
    tuning: Tuning, x: str, channels: int, k: int, hw: int, hw_align: int, position: str, channels_last: bool,
    z_channels_last: bool, in_place: bool,
) -> PlaneConfig:  # fmt: skip
    if fuse_is_flat(x, hw_align, position, channels_last, z_channels_last):
        # As many values a program as a tile has.
        values, most = (k * hw, tuning.max_block_hw) if in_place else (channels * hw, 2 * tuning.max_block_hw)
        block = min(power_of_two(values), most)
        return PlaneConfig(1, 1, block, -(-values // block), 4 if block > 512 else 1, flat=True)
    values = plane_values(tuning, x, channels_last, mixed=channels_last != z_channels_last)
    if not in_place:
        most = tuning.plane_channels if channels_last else tuning.max_block_hw
        return plane_config(tuning, channels, hw, values, most, channels_last)
    # "original" compares a program's channels with all k, and they lie anywhere: one at a time.
    together = channels_last and position != "original"
    return plane_config(tuning, k, hw, values, tuning.plane_k if together else 1, channels_last)


def second_layer_apart(tuning: Tuning, channels: int, hidden: int) -> bool:
    """Of select_channels: whether the second layer is a launch of its own."""
    return channels * hidden > tuning.max_layer_weights


def shared_out(tuning: Tuning, channels: int, hidden: int, samples: int) -> str:
    """What the programs of a block's last launch have shares of (``SHARED_OUT`` in block.py).

    "pool": one launch for the whole block; "layers": two; "nothing": the layers go over the batch, four launches.
    """
    if channels * hidden <= tuning.one_launch_weights:
        return "pool"
    return "layers" if samples <= tuning.batch_samples else "nothing"


def tail_apart(tuning: Tuning, kind: str, k: int, mid: int, hw: int) -> bool:
    """Whether a block is the launches of ``select_channels``, which copy as they pool, and those of ``tail_``."""
    block_hw = tail_config(tuning, kind, k, mid, hw, block_warps(tuning, "pool", hw)).block_hw
    return hw > tuning.tail_passes * block_hw


def block_warps(tuning: Tuning, shared_out: str, hw: int) -> int:
    """Warps of the launch that finishes a block."""
    return tuning.block_warps // 2 if shared_out == "pool" and hw <= 64 else tuning.block_warps

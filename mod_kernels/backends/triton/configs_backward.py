"""Sizes of the backward kernels, as :mod:`.configs` has those of the forward. Nothing of them was timed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .configs import SCALAR_BYTES, plane_config, plane_values, pool_config, power_of_two
from .tuning import Tuning

# Values that a program of fuse_channels_backward takes at a time, 16 a thread with 8 warps, and how many a warp is
# to have at least: it walks over the pixels of its channels alone, for the sake of their sums.
FUSE_BACKWARD_TILE = 4096
FUSE_BACKWARD_WARP = 256
# In channels_last it takes as many channels as fill a sector of memory, which is read in any case.
SECTOR_BYTES = 32
# Units of the hidden layer that a program of the selector's backward takes: all of the paper's. A sample of more
# is shared out.
BACKWARD_UNITS = 128
# (samples, channels, units) of a tile of the selector's weights: small, so that C = 256 still makes 8 programs,
# and that nothing spills whatever C and R are.
SELECT_BACKWARD_TILE = (16, 32, 32)
# tl.dot's smallest side.
SMALLEST_DOT = 16
# In channels_last a program of input_gradient looks up its channels once for so many pixels.
LOOKUP_PIXELS = 64


@dataclass(frozen=True)
class FuseBackwardConfig:
    """A program takes all pixels of ``block_k`` channels, ``block_hw`` at a time."""

    block_k: int
    block_hw: int
    chunks: int  # programs of a sample
    num_warps: int


@dataclass(frozen=True)
class SelectBackwardConfig:
    """Of a sample ``parts`` programs take ``block_k`` x ``block_units`` weights at a time; then come tiles.

    ``tile``: their samples, channels and units.
    """

    block_k: int
    block_units: int
    parts: int
    block_channels: int  # of a sample's row of logits
    tile: tuple[int, int, int]
    num_warps: int


@dataclass(frozen=True)
class InputGradientConfig:
    """``chunk_channels`` x ``block_hw`` pixels a program, ``steps`` times; with ``run`` whole planes in a row.

    ``block_k`` places of the index are compared with the channels at a time.
    """

    chunk_channels: int
    chunks: int
    block_hw: int
    steps: int
    tiles: int
    run: int
    block_k: int
    num_warps: int


@functools.lru_cache
def fuse_backward_config(x: str, k: int, hw: int, channels_last: bool) -> FuseBackwardConfig:
    k_pad, hw_pad = power_of_two(k), power_of_two(hw)
    if channels_last:
        block_k = min(k_pad, SECTOR_BYTES // SCALAR_BYTES[x])
        block_hw = min(hw_pad, FUSE_BACKWARD_TILE // block_k)
    else:
        block_hw = min(hw_pad, FUSE_BACKWARD_TILE)
        block_k = min(k_pad, max(1, FUSE_BACKWARD_WARP // block_hw))
    warps = min(8, max(1, block_k * block_hw // FUSE_BACKWARD_WARP))
    return FuseBackwardConfig(block_k, block_hw, -(-k // block_k), warps)


@functools.lru_cache
def select_backward_config(tuning: Tuning, channels: int, hidden: int, k: int) -> SelectBackwardConfig:
    channels_pad, hidden_pad = power_of_two(channels), power_of_two(hidden)
    units = min(hidden_pad, BACKWARD_UNITS)
    samples, block_channels, block_units = SELECT_BACKWARD_TILE
    return SelectBackwardConfig(
        block_k=min(power_of_two(k), max(1, tuning.tile // 2 // units)),  # its addresses lie apart where R is odd
        block_units=units,
        parts=-(-hidden // units),
        block_channels=min(channels_pad, tuning.max_block_hw),
        tile=(
            samples,
            max(SMALLEST_DOT, min(channels_pad, block_channels)),
            max(SMALLEST_DOT, min(hidden_pad, block_units)),
        ),
        num_warps=4,
    )


@functools.lru_cache
def input_gradient_config(
    tuning: Tuning, x: str, channels: int, k: int, hw: int, hw_align: int, channels_last: bool
) -> InputGradientConfig:
    """In a run where the pooling takes one (:func:`pool_config`), else in the tiles of the fuse out of place.

    In channels_last with twice the warps: places in dgathered differ in every value, and with 16 of them a thread
    takes 108 to 124 registers on 9.0.
    """
    pool = pool_config(tuning, x, channels, hw, hw_align, channels_last)
    if pool.run:
        chunk, chunks, block_hw, steps, tiles = pool.chunk_channels, pool.shares, pool.block_hw, 1, 1
        # A float64 takes two registers: with 16 of them a thread some are spilled on 8.0.
        warps = pool.num_warps * (2 if x == "fp64" else 1)
    else:
        most = tuning.plane_channels if channels_last else tuning.max_block_hw
        plane = plane_config(tuning, channels, hw, plane_values(tuning, x, channels_last), most, channels_last)
        chunk, chunks, block_hw, warps = plane.block_channels, plane.chunks, plane.block_hw, plane.num_warps
        steps = max(1, min(plane.tiles, LOOKUP_PIXELS // block_hw)) if channels_last else 1
        warps = 2 * warps if channels_last else warps
        tiles = -(-hw // (block_hw * steps))
    block_k = min(power_of_two(k), max(1, tuning.tile // 2 // chunk))
    return InputGradientConfig(chunk, chunks, block_hw, steps, tiles, pool.run, block_k, warps)

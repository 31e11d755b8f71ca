"""The numbers that are a GPU's to choose: block sizes, warps and limits between plans, one set per architecture.

The rules that use them are in :mod:`.configs`. None of them decides whether a result is right, but other sizes add
in another order: two tunings may differ in the last bits of a sum. Which of a GPU's is in force: :mod:`.in_force`.

What was timed: in NCHW the blocks of pooling, gather and fuse, and ``max_layer_weights``, came out best over the
paper's shapes in float16 at N = 1 to 256, in a sweep on an H100 whose figures were not kept. What was not: all
else. Those of channels_last, the runs of short planes and the tail were chosen by the width of loads, registers
and spills, the plans of a block by estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

# Rows of (up to so many, ...), the last of them for all above.
Rows = tuple[tuple[int | None, ...], ...]


# Compared and hashed by identity: it is a part of what a call's plan is remembered by, looked up at each call.
@dataclass(frozen=True, eq=False)
class Tuning:
    """One GPU's numbers.

    Raises:
        ValueError: a number that no kernel can be built with, named.
    """

    # float32 values a program keeps per tile: 32 registers a thread at 128 threads.
    tile: int = 4096
    pool_warps: int = 8
    # (planes up to so many pixels, pixels at a time, channels a program). Longer planes take more passes over
    # their block.
    pool_blocks: Rows = ((64, 64, 64), (256, 64, 32), (1024, 256, 8), (None, 2048, 4))
    # In channels_last a program takes fewer channels the more pixels they have, down to 32 bytes of float16, one
    # sector: else small batches would have few programs.
    pool_blocks_channels_last: Rows = ((64, 64, 64), (256, 128, 32), (None, 256, 16))
    # Inside a block the pixels of a sample in channels_last are shared out too, to about as many programs as in
    # NCHW: then a program takes 64 channels, 128 bytes of each pixel in float16, so that a warp's loads take whole
    # lines.
    split_chunk: int = 64
    pool_shares: int = 64
    # Pixels that a program of gather or fuse takes at most, and channels that it takes at most in channels_last:
    # of C, where all of it is copied, and of the k, which in every pixel lie apart from the next pixel's.
    max_block_hw: int = 1024
    plane_channels: int = 128
    plane_k: int = 32
    # Weights of the second layer, C * R, that one program of select_channels reads for a sample; more are shared
    # out over programs by a launch of their own. 16384 is C = 512 at the paper's R: above, one program takes
    # longer than a launch.
    max_layer_weights: int = 16384
    # Channels whose logits and first ranking one program of that launch makes.
    slice_channels: int = 256
    layer_warps: int = 8
    # Weights of the second layer up to which a block is one launch, whose last program of a sample reads them
    # all: C = 1024 at the paper's R. At C = 2048 that program would read 0.5 MB by itself (estimated before
    # anything was built: 18 us against 11 for two launches, float16, N = 1, H100; no GPU has run it).
    one_launch_weights: int = 65536
    # Warps of a block's last launch: the last program of a sample does the whole tail, faster the more threads it
    # has. Half of them for planes of 7 x 7, there and in ``tail_``.
    block_warps: int = 16
    tail_warps: int = 4
    # Registers a thread of a block's only launch, for planes of 28 x 28 or so; None: ptxas decides.
    block_registers: int | None = None
    # (warps, rows of (channels up to so many, values of the tail a thread)). With more, ptxas spills a few
    # registers on one architecture or another, though far from its limit: each value has an address and a place
    # in x beside it.
    tail_values: tuple[tuple[int, Rows], ...] = (
        (2, ((None, 8),)),
        (4, ((4, 8), (None, 4))),
        (8, ((8, 1), (16, 2), (None, 4))),
        (16, ((4, 8), (16, 4), (None, 2))),
    )
    # Blocks of pixels up to which the last program of a sample goes through its tail by itself, twice. Above, the
    # tail is launched apart and shared out: two or three launches more, some 2 us each, against more than 0.5 us a
    # block (estimated). The ResNets' blocks have up to 7, VGG's first two 25 and more.
    tail_passes: int = 8
    # Above so many samples the layers of a larger selector go over the batch: to read its weights for each sample
    # would cost more than to read x (estimated, too: from 60 to 100 samples on).
    batch_samples: int = 64
    # (samples, inputs, outputs) of a program's tile there. The first layer has few outputs: small tiles, for
    # enough programs; the second many.
    first_layer_tile: tuple[int, int, int] = (16, 64, 16)
    second_layer_tile: tuple[int, int, int] = (32, 32, 64)
    linear_warps: int = 4

    def __post_init__(self) -> None:
        for name in ("one_launch_weights", "max_layer_weights", "tail_passes", "batch_samples"):
            _check(name, _whole(getattr(self, name)), "a whole number, 0 or more", getattr(self, name))
        _check("pool_shares", _whole(self.pool_shares) and self.pool_shares > 0, "1 or more", self.pool_shares)
        held = self.block_registers
        _check("block_registers", held is None or (_whole(held) and 16 <= held <= 255), "None or 16 to 255", held)
        blocks = ("tile", "split_chunk", "max_block_hw", "plane_channels", "plane_k", "slice_channels")
        for name in blocks:
            _check(name, _power(getattr(self, name)), "a power of two", getattr(self, name))
        # What a tile holds, or half of that, is divided by these: a pixel at least must be left.
        for name, most in (
            ("split_chunk", 2 * self.tile),
            ("plane_channels", self.max_block_hw),
            ("plane_k", self.max_block_hw),
        ):
            _check(name, getattr(self, name) <= most, f"at most {most}", getattr(self, name))
        for name in ("pool_warps", "layer_warps", "block_warps", "tail_warps", "linear_warps"):
            warps = getattr(self, name)
            # Half of them must be warps too.
            _check(name, _power(warps) and 2 <= warps <= 32, "2, 4, 8, 16 or 32", warps)
        for name in ("pool_blocks", "pool_blocks_channels_last"):
            _check(name, _rows(getattr(self, name), 3), "rows of (up to, pixels, channels)", getattr(self, name))
        for name in ("first_layer_tile", "second_layer_tile"):
            tile = getattr(self, name)
            # tl.dot takes no shorter sides.
            good = isinstance(tile, tuple) and len(tile) == 3 and all(_power(side) and side >= 16 for side in tile)
            _check(name, good, "three powers of two, 16 or more", tile)
        self._check_tail_values()

    def _check_tail_values(self) -> None:
        values = self.tail_values
        good = isinstance(values, tuple) and all(isinstance(one, tuple) and len(one) == 2 for one in values)
        good = good and all(_whole(warps) and _rows(rows, 2) for warps, rows in values)
        _check("tail_values", good, "pairs of warps and rows of (up to, values)", values)
        needed = {self.block_warps, self.block_warps // 2, self.tail_warps, self.tail_warps // 2}
        missing = needed - {warps for warps, _ in values}
        _check("tail_values", not missing, f"given for {', '.join(map(str, sorted(needed)))} warps", values)


def _check(name: str, good: bool, rule: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name} must be {rule}, got {got!r}")


def _whole(value: object) -> bool:
    return type(value) is int and value >= 0


def _power(value: object) -> bool:
    """Whether it is a power of two, as Triton's block sizes are, and no larger than its largest tensor."""
    return _whole(value) and 0 < value <= 1 << 20 and value & (value - 1) == 0


def _rows(rows: object, length: int) -> bool:
    """Whether these are rows of so many numbers: first limits that rise and end in None, then powers of two."""
    if not isinstance(rows, tuple) or not rows:
        return False
    if not all(isinstance(row, tuple) and len(row) == length and all(map(_power, row[1:])) for row in rows):
        return False
    *limits, last = (row[0] for row in rows)
    return last is None and all(map(_whole, limits)) and limits == sorted(set(limits))


# By the capability that an architecture class begins at: GPUs of a class share the limits of a multiprocessor and
# the instructions that Triton compiles to. The sizes are equal, because nothing was measured that would tell them
# apart: the little that was timed was timed on an H100. A class gets its own when a GPU of it has shown them.
# Registers are what ptxas shows: for 12.0 it spills 8 to 16 bytes of some blocks of 28 x 28 to have three programs
# on a multiprocessor (40 registers a thread); with 48 there are two, and no spills.
BY_CLASS = {
    80: Tuning(),  # A100
    86: Tuning(),  # A10, RTX 3090; 8.9 with it: L4, RTX 4090
    90: Tuning(),  # H100
    100: Tuning(),  # B200
    120: Tuning(block_registers=48),  # RTX 5090
}
# Where no GPU is asked: the interpreter's, whose results are then the same on every machine.
DEFAULT = BY_CLASS[90]


def of_capability(capability: int) -> Tuning:
    """The tuning of a compute capability (89 for 8.9): that of the newest class that is not above it.

    So 8.9 goes with 8.6 and 10.3 with 10.0; what is newer than the table is likest to its newest class.

    Raises:
        ValueError: it is older than every class.
    """
    found = [one for one in BY_CLASS if one <= capability]
    if not found:
        raise ValueError(f"compute capability must be {min(BY_CLASS)} or newer, got {capability}")
    return BY_CLASS[max(found)]

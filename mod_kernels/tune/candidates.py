"""What ``mod-kernels tune`` tries: a few values for each field of the tuning, with the reason to expect anything.

Fields stand in the order they are searched in, the ones that most time hangs on first: where the time is up, the
rest keeps its values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..backends.triton.tuning import Tuning


@dataclass(frozen=True)
class Candidates:
    """Values for a field or, of a field that is a table, for its row number ``row``."""

    field: str
    values: tuple
    reason: str
    row: int | None = None

    @property
    def name(self) -> str:
        return self.field if self.row is None else f"{self.field}[{self.row}]"

    def of(self, tuning: Tuning) -> object:
        """The value that ``tuning`` has."""
        value = getattr(tuning, self.field)
        return value if self.row is None else value[self.row]

    def with_value(self, tuning: Tuning, value: object) -> Tuning:
        if self.row is not None:
            rows = getattr(tuning, self.field)
            value = (*rows[: self.row], value, *rows[self.row + 1 :])
        return replace(tuning, **{self.field: value})


_MORE_PROGRAMS = "fewer channels a program: more programs for a small batch; more channels: more loads in flight"

CANDIDATES = (
    Candidates("pool_blocks", ((None, 1024, 4), (None, 2048, 2), (None, 1024, 8)), _MORE_PROGRAMS, row=3),
    Candidates("pool_blocks", ((1024, 256, 4), (1024, 512, 8), (1024, 256, 16)), _MORE_PROGRAMS, row=2),
    # Planes of 196 pixels in float32; in float16, and those of 49, they are pooled as runs, which ``tile`` bounds.
    Candidates("pool_blocks", ((256, 64, 16), (256, 128, 16), (256, 64, 64)), _MORE_PROGRAMS, row=1),
    Candidates("pool_warps", (4, 16), "loads in flight against programs on a multiprocessor"),
    Candidates("block_warps", (8, 4), "more programs on a multiprocessor, against a slower last program"),
    Candidates("block_registers", (48, 64), "no spills in blocks of 28 x 28, against a program less there"),
    Candidates(
        "one_launch_weights",
        (16384, 32768, 262144),
        "what a launch costs against one program reading the second layer's weights: by clock and by memory",
    ),
    Candidates("batch_samples", (16, 128), "two launches more, against the weights read for each sample again"),
    Candidates("tile", (2048, 8192), "registers a thread against loads in flight; planes of 196 pixels in a run"),
    Candidates("split_chunk", (32, 128), "how much of a pixel a program reads in channels_last"),
    Candidates("pool_shares", (16, 32, 128), "programs a sample in channels_last, against slots to be added up"),
    Candidates(
        "pool_blocks_channels_last", ((None, 128, 16), (None, 256, 32), (None, 512, 16)), _MORE_PROGRAMS, 2
    ),
    Candidates("pool_blocks_channels_last", ((256, 128, 16), (256, 64, 32), (256, 128, 64)), _MORE_PROGRAMS, 1),
    Candidates("pool_blocks_channels_last", ((64, 64, 32), (64, 32, 64)), _MORE_PROGRAMS, 0),
    Candidates(
        "slice_channels", (64, 128, 512), "programs that share a sample's second layer, against keys to merge"
    ),
    Candidates("layer_warps", (4, 16), "loads of the second layer's weights in flight"),
    Candidates(
        "tail_values",
        ((16, ((4, 4), (16, 2), (None, 1))), (16, ((4, 16), (16, 8), (None, 4)))),
        "pixels at a time: fewer passes against registers",
        row=3,
    ),
    Candidates(
        "tail_values",
        ((8, ((8, 2), (16, 4), (None, 8))),),
        "the same for planes of 7 x 7, by half the warps",
        row=2,
    ),
    Candidates("tail_passes", (2, 4), "a tail shared out, against two or three launches more"),
    Candidates("first_layer_tile", ((16, 128, 16), (32, 64, 16)), "steps over C, and how often weights are read"),
    Candidates("second_layer_tile", ((16, 32, 64), (32, 64, 64), (64, 32, 64)), "how often weights are read"),
    Candidates("linear_warps", (2, 8), "small products: few warps have little to do each"),
    Candidates("max_block_hw", (512, 2048), "elements a thread of gather and fuse"),
    Candidates("plane_channels", (64, 256), "how much of a pixel a program copies in channels_last"),
    Candidates("plane_k", (16,), "channels of a pixel that a program of gather takes in channels_last"),
    Candidates("max_layer_weights", (4096, 65536), "what a launch costs against one program reading the weights"),
    Candidates("tail_warps", (8,), "threads a program of `tail_`"),
)

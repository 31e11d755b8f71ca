"""How a bottleneck block scales: one of batch, map, channels and k at a time, the others as at a base point.

Without torch.compile, which would take longer than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from . import blocks, sweep, table
from .cells import OnCell, run_cells
from .compiled import Compiler
from .providers import ENGINES, IN_PLACE, PLAIN
from .shapes import Shape
from .store import Results, Row

CHANNELS, SIDE, BATCH = 256, 14, 8  # the base point; k = 4 there, as C // 64 is
# A cell whose x is larger is left out: each in-place provider has a copy of it.
MOST_BYTES = 1 << 30
ROUNDS, QUICK_ROUNDS = 40, 15
CELL_S, QUICK_CELL_S = 4.0, 1.0  # rounds end early past this


@dataclass(frozen=True)
class ShapeOfK(Shape):
    """A block of a given k."""

    processed: int = 4

    @property
    def k(self) -> int:
        return self.processed


@dataclass(frozen=True)
class Cell(blocks.Cell):
    """A block's cell whose label says k."""

    def __str__(self) -> str:
        return super().__str__().replace(" N=", f" k={self.shape.k} N=")


def points(quick: bool = False) -> list[tuple[ShapeOfK, int]]:
    """Shapes and batches of all axes, each once; ``quick``: every other batch."""

    def at(channels: int = CHANNELS, side: int = SIDE, batch: int = BATCH, k: int | None = None) -> tuple:
        return ShapeOfK("bottleneck", channels, side, side, k or channels // 64), batch

    batches = [2**power for power in range(0, 11, 2 if quick else 1)]
    found = [at(batch=batch) for batch in batches]
    found += [at(side=side) for side in (1, 2, 4, 7, 14, 28, 56, 112)]
    found += [at(channels=2**power) for power in range(6, 13)]
    found += [at(k=2**power) for power in range(9)]
    return list(dict.fromkeys(found))


def run(
    threads: tuple[int, ...],
    results: Results,
    on_cell: OnCell,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
) -> None:
    """Measure every point into ``results``; ``threads`` is ignored on a GPU."""
    rounds, cell_s = (QUICK_ROUNDS, QUICK_CELL_S) if quick else (ROUNDS, CELL_S)
    plan = blocks.Plan(threads=threads, device=device, dtype=dtype, rounds=rounds, cell_s=cell_s)
    runs = [(count, "eager") for count in threads] if device == "cpu" else [(None, "eager"), (None, "graph")]
    planned, too_large = [], []
    for how in runs:
        for shape, batch in points(quick):
            cell = Cell(shape, batch, *how)
            size = batch * shape.channels * shape.height * shape.width * dtype.itemsize
            (planned if size <= MOST_BYTES else too_large).append(cell)
    note = f"x would take more than 1 GiB, left out: {', '.join(map(str, too_large))}"
    if too_large and note not in results.notes:
        results.notes.append(note)

    def measured(cell: Cell) -> list[Row]:
        bandwidth = blocks.bandwidth_of(cell.threads, device, results)
        rows = blocks.run_cell(cell, plan, bandwidth, Compiler({}), sweep._make_x)
        k = cell.shape.k
        return rows if k == cell.shape.channels // 64 else [replace(row, k=k) for row in rows]

    run_cells(planned, results, on_cell, measured)


@dataclass(frozen=True)
class Axis:
    """What became of the ratio (the best plain form over ours, both may write into x) along one axis."""

    name: str  # "N", "H=W", "C" or "k"
    where: str
    points: tuple[tuple[int, float], ...]  # (value, ratio), by value

    def __str__(self) -> str:
        ahead = [point for point in self.points if point[1] > 1]
        low, high = (choose(ratio for _, ratio in self.points) for choose in (min, max))
        said = f"{self.name}, {self.where}: "
        if len(ahead) in (0, len(self.points)):
            which = "ahead" if ahead else "behind"
            ends = f"{self.name} = {self.points[0][0]} to {self.points[-1][0]}"
            return f"{said}{which} everywhere, {ends} (plain / ours {low:.2f} to {high:.2f})"
        turns = [
            f"{self.name} = {before[0]} ({before[1]:.2f}) and {after[0]} ({after[1]:.2f})"
            for before, after in zip(self.points, self.points[1:], strict=False)
            if (before[1] > 1) != (after[1] > 1)
        ]
        return f"{said}ahead at {len(ahead)} of {len(self.points)} points, even between {', '.join(turns)}"


def break_even(rows: Iterable[Row]) -> list[Axis]:
    """The axes of each way of running; ``str`` of one says where ours stops being faster than plain PyTorch."""
    groups: dict[tuple, list[tuple[Row, float]]] = {}
    for cell in table.by_cell(rows).values():
        first = next(iter(cell.values()))
        ratio = ratio_of(cell)
        if ratio is not None:
            run = (first.device, first.dtype, first.threads, first.mode)
            groups.setdefault(run, []).append((first, ratio))
    found = []
    for (_, dtype, threads, mode), measured in groups.items():
        where = f"{dtype}, " + (mode if threads is None else f"{threads} thread(s)")
        for name, (value, others) in _AXES.items():
            on_axis = [(value(row), ratio) for row, ratio in measured if others(row)]
            if len(on_axis) > 1:
                found.append(Axis(name, where, tuple(sorted(on_axis))))
    return found


def ratio_of(cell: dict[str, Row]) -> float | None:
    """The fastest plain form over ours in place; None where a time is missing."""
    engine = ENGINES[next(iter(cell.values())).device]
    return table.ratio(cell, PLAIN, engine + IN_PLACE)


def place(row: Row) -> tuple[int, int, int, int]:
    """N, H, C and k of a row."""
    channels, height, _ = map(int, row.name.split("x"))
    return row.batch, height, channels, row.k or channels // 64


def _axis(position: int) -> tuple[Callable[[Row], int], Callable[[Row], bool]]:
    """What reads a row's place on an axis, and what says whether it is on it."""

    def others(row: Row) -> bool:
        n, side, channels, k = place(row)
        # Along the channels k follows them.
        base = (BATCH, SIDE, CHANNELS, (channels if position == 2 else CHANNELS) // 64)
        differs = [one for one in range(4) if (n, side, channels, k)[one] != base[one]]
        return differs in ([], [position])

    return (lambda row: place(row)[position]), others


_AXES = {"N": _axis(0), "H=W": _axis(1), "C": _axis(2), "k": _axis(3)}

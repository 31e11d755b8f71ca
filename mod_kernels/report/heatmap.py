"""How much faster ours is than the fastest plain form, for each shape and batch size, as coloured cells."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bench.store import Row
from ..bench.table import geometric_mean
from .collect import Group
from .pairs import Pair, pairs, three
from .picture import INK, OURS, PLAIN, WIDTH, Picture

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

# A cell is coloured in full from this ratio on, and from its inverse.
FULL = 8.0
# Of the colour over the ground, in full: text stays readable on it, dark on white as light on black.
MOST_OPAQUE = 0.6


@dataclass(frozen=True)
class Heat:
    rows: tuple[str, ...]  # shapes, networks, or an op and a shape; with k or c where that differs
    columns: tuple[int, ...]  # batch sizes
    cells: dict[tuple[str, int], Pair]

    @property
    def mean(self) -> float | None:
        return geometric_mean(pair.ratio for pair in self.cells.values())


def data(rows: Iterable[Row]) -> Heat:
    """Only cells that both sides were timed in; empty where there is none."""
    cells = {(_label(pair.ours), pair.ours.batch): pair for pair in pairs(rows)}
    names = tuple(dict.fromkeys(name for name, _ in cells))
    return Heat(names, tuple(sorted({batch for _, batch in cells})), cells)


def shade(ratio: float) -> tuple[str, float]:
    """The colour of a ratio and how opaque it is, 0 at 1: ours where it is faster, else the plain form's."""
    share = min(1.0, abs(math.log(ratio)) / math.log(FULL))
    return (OURS if ratio >= 1 else PLAIN), round(share * MOST_OPAQUE, 3)


def said(pair: Pair) -> str:
    return ", ".join(f"{row.provider} {three(row.median_ms)} ms" for row in (pair.plain, pair.ours))


def picture(group: Group) -> Picture | None:
    heat = data(group.rows)
    if not heat.cells:
        return None
    what = f"Fastest plain form's time over ours: {group.first.kind}, {group.where}"
    size = (2.0 + 0.8 * len(heat.columns), 0.7 + 0.32 * len(heat.rows))
    alt = f"{what}. Geometric mean {heat.mean:.2f}."
    return Picture("heat", what, alt, group.run.machine, (max(size[0], WIDTH), size[1]), lambda f: draw(f, heat))


def draw(figure: FigureBase, heat: Heat) -> None:
    from matplotlib.patches import Rectangle

    axis = figure.subplots()
    for y, name in enumerate(heat.rows):
        for x, batch in enumerate(heat.columns):
            pair = heat.cells.get((name, batch))
            colour, opaque = shade(pair.ratio) if pair else (INK, 0.05)
            axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour, alpha=opaque, linewidth=0))
            axis.text(x, y, f"{pair.ratio:.2f}" if pair else "-", ha="center", va="center")
    axis.set_xlim(-0.5, len(heat.columns) - 0.5)
    axis.set_ylim(len(heat.rows) - 0.5, -0.5)
    axis.set_xticks(range(len(heat.columns)), [f"N = {batch}" for batch in heat.columns])
    axis.set_yticks(range(len(heat.rows)), heat.rows)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _label(row: Row) -> str:
    parts = [row.name, *(f"{name}={value}" for name, value in (("k", row.k), ("c", row.c)) if value)]
    return " ".join(parts)

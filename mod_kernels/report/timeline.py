"""Where the time of a network's MoD blocks goes, part by part: written plainly against fused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bench.store import Row
from .collect import Group
from .pairs import three
from .picture import INK, WIDTH, Picture, grid

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

KIND, REST = "part", "other blocks"
# By part: neighbours differ in lightness as well as in hue, and from the eighth on by hatches.
_COLOURS = ("#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#f0e442", "#009e73", "#cc79a7")
_HATCHES = ("", "///", "...")


@dataclass(frozen=True)
class Side:
    """One way to run one network: (part, ms in one forward) in the order they were measured."""

    network: str
    batch: int
    way: str  # "plain" or "fused"
    parts: tuple[tuple[str, float], ...]
    rest_ms: float | None  # blocks that are no MoD blocks

    @property
    def total_ms(self) -> float:
        return sum(time for _, time in self.parts)


def data(rows: Iterable[Row]) -> list[Side]:
    """Network by network, plain before fused."""
    found: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        way, slash, part = row.provider.partition("/")
        if row.timed and slash:
            found.setdefault((row.name, row.batch), {}).setdefault(way, {})[part] = row.median_ms
    sides = []
    for (network, batch), ways in found.items():
        for way in sorted(ways, key=lambda way: (way != "plain", way)):
            rest = ways[way].pop(REST, None)
            sides.append(Side(network, batch, way, tuple(ways[way].items()), rest))
    return sides


def pictures(group: Group) -> list[Picture]:
    sides = [side for side in data(group.rows) if side.parts]
    if not sides:
        return []
    title = f"Where a forward's time in MoD blocks goes, {group.where}"
    alt = title + ": " + "; ".join(f"{s.network} N={s.batch} {s.way} {three(s.total_ms)} ms" for s in sides)
    size = (WIDTH, 1.3 + 0.42 * len(sides))
    return [Picture("parts", title, alt, group.run.machine, size, lambda figure: draw(figure, sides))]


def draw(figure: FigureBase, sides: list[Side]) -> None:
    from matplotlib.patches import Patch

    axis = figure.subplots()
    names = list(dict.fromkeys(name for side in sides for name, _ in side.parts))
    looks = {name: (_COLOURS[i % len(_COLOURS)], _HATCHES[i // len(_COLOURS) % 3]) for i, name in enumerate(names)}
    longest = max(side.total_ms for side in sides)
    for y, side in enumerate(sides):
        left = 0.0
        for name, time in side.parts:
            colour, hatch = looks[name]
            axis.barh(y, time, 0.72, left, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.4)
            left += time
        rest = "" if side.rest_ms is None else f" (+ {three(side.rest_ms)} in other blocks)"
        axis.text(left + longest * 0.01, y, f"{three(left)} ms{rest}", va="center", fontsize=8)
    axis.set_yticks(
        range(len(sides)), [f"{side.network}\nN={side.batch} {side.way}" for side in sides], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.5)  # room for what stands behind the bars
    axis.set_xlabel("ms in one forward")
    grid(axis, "x")
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor=INK, linewidth=0.4) for colour, hatch in looks.values()
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=5)

"""How the time grows with batch, map, channels and k, plain against ours, and where the two break even."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bench.shapes import CHANNELS_PER_PROCESSED
from ..bench.store import Row
from .collect import Group
from .pairs import pairs, size_of, three
from .picture import INK, OURS, PLAIN, WIDTH, Picture, grid, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

# What the axes go through: the third of a ResNet's stages but for its fewer channels.
BASE_C, BASE_PLANE, BASE_N, BASE_K = 256, 14 * 14, 8, 4
AXES = ("N", "H*W", "C", "k")


@dataclass(frozen=True)
class Curve:
    """Points are (where on the axis, the fastest plain form's ms, ours), rising."""

    axis: str
    points: tuple[tuple[int, float, float], ...]

    @property
    def break_even(self) -> tuple[float, ...]:
        """Where ours takes as long as plain, between points on a line through their logarithms."""
        logs = [(math.log(x), math.log(ours / plain)) for x, plain, ours in self.points]
        found = []
        for (x0, y0), (x1, y1) in itertools.pairwise(logs):
            if y0 < 0 <= y1 or y1 < 0 <= y0:
                found.append(math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))
        return tuple(found)

    @property
    def verdict(self) -> str:
        if self.break_even:
            return "break-even at " + ", ".join(f"{self.axis} = {three(x)}" for x in self.break_even)
        faster = self.points[0][2] < self.points[0][1]
        return f"{'ours' if faster else 'plain'} faster all along"


def data(rows: Iterable[Row]) -> list[Curve]:
    """A curve for each axis with two points or more; a cell that differs from the base in two is on none."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for pair in pairs(rows):
        size = size_of(pair.ours.name)
        if size is None:
            continue
        c, plane = size[0], size[1] * size[2]
        usual = max(1, c // CHANNELS_PER_PROCESSED.get(pair.ours.kind, 64))
        k = pair.ours.k or usual
        at = {"N": pair.ours.batch, "H*W": plane, "C": c, "k": k}
        base = {"N": BASE_N, "H*W": BASE_PLANE, "C": BASE_C, "k": k if c != BASE_C and k == usual else BASE_K}
        off = [axis for axis in AXES if at[axis] != base[axis]]
        for axis in off or AXES:
            if len(off) <= 1:
                found.setdefault(axis, {})[at[axis]] = (pair.plain.median_ms, pair.ours.median_ms)
    curves = [
        Curve(axis, tuple((x, *found[axis][x]) for x in sorted(found[axis]))) for axis in AXES if axis in found
    ]
    return [curve for curve in curves if len(curve.points) > 1]


def pictures(group: Group) -> list[Picture]:
    curves = data(group.rows)
    if not curves:
        return []
    title = f"Time over N, H*W, C and k around C = {BASE_C}, 14x14, N = {BASE_N}, k = {BASE_K}: {group.where}"
    alt = title + ". " + "; ".join(f"{curve.axis}: {curve.verdict}" for curve in curves)
    size = (WIDTH, 0.6 + 2.6 * -(-len(curves) // 2))
    return [Picture("curves", title, alt, group.run.machine, size, lambda figure: draw(figure, curves))]


def draw(figure: FigureBase, curves: list[Curve]) -> None:
    axes = figure.subplots(-(-len(curves) // 2), 2, squeeze=False).flatten()
    for axis, curve in zip(axes, curves, strict=False):
        xs, plain, ours = zip(*curve.points, strict=True)
        axis.plot(xs, plain, "^-", color=PLAIN, markersize=4, label="plain PyTorch, the fastest form")
        axis.plot(xs, ours, "o-", color=OURS, markersize=4, label="mod_kernels, in place")
        for x in curve.break_even:
            axis.axvline(x, color=INK, linestyle=":", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(xs, [str(x) for x in xs], fontsize=7, rotation=0 if len(xs) < 7 else 45)
        axis.minorticks_off()
        axis.yaxis.set_minor_locator(_minor())
        plain_numbers(axis.yaxis)
        axis.set_title(curve.verdict, fontsize=8)
        axis.set_xlabel(curve.axis)
        axis.set_ylabel("ms")
        grid(axis)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _minor():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(2, 5))

"""Memory: what a training step holds over its time, and the peaks of blocks and networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..bench.store import Results, Row
from ..bench.table import by_cell
from .collect import Group, Machine
from .picture import OURS, PLAIN, WIDTH, Picture, grid

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

_WAYS = {"plain": (PLAIN, "--", "plain PyTorch"), "fused": (OURS, "-", "mod_kernels")}


def peaks(rows: Iterable[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Cells, providers, and MiB held at the peak by (cell, provider)."""
    found: dict[tuple[str, str], float] = {}
    for cell in by_cell(row for row in rows if row.peak_mib is not None).values():
        for row in cell.values():
            found[f"{row.name} N={row.batch}", row.provider] = row.peak_mib
    cells, providers = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    return cells, providers, found


def picture(group: Group) -> Picture | None:
    """Peaks as bars; None of a group without."""
    cells, providers, found = peaks(group.rows)
    if not cells:
        return None
    title = f"MiB held at the peak beyond what was held before, {group.first.kind}, {group.where}"
    least = min(found, key=found.get)
    alt = f"{title}: least {found[least]:.3g} MiB, {least[1]} in {least[0]}."
    size = (WIDTH, 1.0 + 0.16 * len(cells) * (len(providers) + 1))
    return Picture("peaks", title, alt, group.run.machine, size, lambda f: draw_peaks(f, cells, providers, found))


def draw_peaks(
    figure: FigureBase, cells: list[str], providers: list[str], found: dict[tuple[str, str], float]
) -> None:
    axis = figure.subplots()
    width = 0.84 / len(providers)
    plain = 0
    for place, name in enumerate(providers):
        known = [(y, found[cell, name]) for y, cell in enumerate(cells) if (cell, name) in found]
        colour = PLAIN if name.startswith("plain") else OURS
        # Those of one colour differ by how opaque they are.
        rank = plain if colour == PLAIN else place - plain
        plain += colour == PLAIN
        at = [y - 0.42 + (place + 0.5) * width for y, _ in known]
        axis.barh(at, [mib for _, mib in known], width, color=colour, alpha=max(0.3, 1 - 0.25 * rank), label=name)
        for y, (_, mib) in zip(at, known, strict=True):
            axis.text(mib, y, f" {mib:.3g}", va="center", fontsize=6)
    axis.set_yticks(range(len(cells)), cells)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("MiB")
    grid(axis, "x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def steps(machine: Machine, suite: str) -> list[Picture]:
    """One picture for each network whose memory over a training step was recorded."""
    found = []
    for cell, run in machine.memory.get(suite, {}).items():
        points = step(run, cell)
        if points:
            title = f"{cell}: memory over a training step"
            said = ", ".join(f"{_WAYS[way][2]} {_peak(points[way]):.0f} MiB" for way in points)
            name = f"{cell.replace(' N=', '-n')}-memory"
            draw = lambda figure, points=points: draw_step(figure, points)  # noqa: E731
            found.append(Picture(name, title, f"{title}. Peaks: {said}.", run.machine, (WIDTH, 3.6), draw))
    return found


def step(run: Results, cell: str) -> dict[str, list[tuple[float, float]]]:
    """(share of the step's time, MiB) of "plain" and "fused", where they were recorded."""
    points = {way: run.memory.get(f"{cell} {way}", []) for way in _WAYS}
    return {way: each for way, each in points.items() if each}


def draw_step(figure: FigureBase, points: dict[str, list[tuple[float, float]]]) -> None:
    axis = figure.subplots()
    for way, each in points.items():
        colour, style, label = _WAYS[way]
        label = f"{label}, peak {_peak(each):.0f} MiB"
        axis.step(*zip(*each, strict=True), where="post", color=colour, linestyle=style, label=label)
    axis.set_xlabel("share of the step's time: forward, then backward")
    axis.set_ylabel("MiB beyond the weights")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower center")
    grid(axis, "y")


def _peak(points: list[tuple[float, float]]) -> float:
    return max(held for _, held in points)

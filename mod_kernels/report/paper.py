"""The paper's speed-ups over the dense networks beside ours; and its accuracies over the times measured here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..bench.paper_table import DENSE, DENSE_OPTIMIZED, OPTIMIZED
from ..bench.store import Row
from ..bench.table import by_cell
from ..bench.table_paper import best_plain
from .collect import Group, spelled_threads
from .picture import INK, OTHER, OURS, PLAIN, THIRD, WIDTH, Picture, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Speedup = tuple[float, float, float]  # and the ends of its 95% confidence interval


@dataclass(frozen=True)
class Line:
    """A network's speed-ups over its dense peer; None where there is none."""

    network: str
    printed: float | None
    plain: Speedup | None
    fused: Speedup | None
    optimized: Speedup | None
    identity: Speedup | None  # the MoD blocks left out: the limit


def data(rows: Iterable[Row], networks: dict[str, dict[str, Any]]) -> list[Line]:
    """A line for each network in the order they came; ``rows`` of one batch size, run alike."""
    lines = []
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        printed = networks.get(first.name, {}).get("paper") or {}
        plain = best_plain(cell)
        rest = [cell[name].speedup if name in cell else None for name in ("fused", OPTIMIZED, "identity")]
        said = printed.get("gpu_speedup" if first.device == "cuda" else "cpu_speedup")
        lines.append(Line(first.name, said, plain.speedup if plain else None, *rest))
    return lines


def how(row: Row) -> tuple[int, str, str]:
    """What one table holds, and what its file's name and its title call it."""
    spelled = spelled_threads(row.threads) if row.threads else row.mode
    return row.batch, f"threads{row.threads}" if row.threads else row.mode, f"N = {row.batch}, {spelled}"


def pictures(group: Group) -> list[Picture]:
    """Accuracy against time, and the speed-ups, for each batch size."""
    found, networks, machine = [], group.run.networks, group.run.machine
    for batch, name, where in dict.fromkeys(map(how, group.rows)):
        rows = [row for row in group.rows if row.batch == batch]
        lines = [line for line in data(rows, networks) if line.plain or line.fused or line.optimized]
        if lines:
            title = f"Speed-up over the dense network, {where}"
            alt = f"{title}: " + "; ".join(map(_spoken, lines))
            size = (WIDTH, 1.1 + 0.36 * len(lines))
            draw = lambda figure, lines=lines: draw_speedups(figure, lines)  # noqa: E731
            found.append(Picture(f"n{batch}-{name}-speedups", title, alt, machine, size, draw))
        points = [accuracy(rows, networks, optimized) for optimized in (False, True)]
        if any(known for panel in points for known in panel.values()):
            title = f"Accuracy against time, {where}"
            draw = lambda figure, points=points: draw_accuracy(figure, points)  # noqa: E731
            alt = f"{title}: the paper's ImageNet top-1 of each network over its median time here."
            found.append(Picture(f"n{batch}-{name}", title, alt, machine, (WIDTH, 6.6), draw))
    return found


def accuracy(
    rows: Iterable[Row], networks: dict[str, dict[str, Any]], optimized: bool
) -> dict[str, list[tuple[float, float, str]]]:
    """(ms, top-1, network) by the way a network is run, eagerly or through ``optimize_for_inference``."""
    dense = DENSE_OPTIMIZED if optimized else DENSE
    times: dict[str, list[float]] = {}  # of a dense network: it stands in several cells
    found: dict[str, list[tuple[float, float, str]]] = {"dense": []}
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        known = networks.get(first.name, {})
        if dense in cell and cell[dense].timed and "dense" in known:
            times.setdefault(known["dense"], []).append(cell[dense].median_ms)
        plain = None if optimized else best_plain(cell)
        ours = cell.get(OPTIMIZED if optimized else "fused")
        for label, row in (("MoD, plain PyTorch", plain), ("MoD, mod_kernels", ours)):
            top1 = (known.get("paper") or {}).get("top1")
            if row is not None and row.timed and top1 is not None:
                found.setdefault(label, []).append((row.median_ms, top1, row.name))
    for name, each in times.items():
        top1 = (networks.get(name, {}).get("paper") or {}).get("top1")
        if top1 is not None:
            found["dense"].append((statistics.median(each), top1, name))
    return found


def draw_speedups(figure: FigureBase, lines: list[Line]) -> None:
    axis = figure.subplots()
    ways = (
        ("plain", "MoD, plain PyTorch", PLAIN, "^", -0.2),
        ("fused", "MoD, mod_kernels", OURS, "o", 0.0),
        ("optimized", "both optimized for inference", THIRD, "s", 0.2),
    )
    for name, label, colour, marker, shift in ways:
        known = [(y + shift, getattr(line, name)) for y, line in enumerate(lines) if getattr(line, name)]
        if known:
            middle = [speedup[0] for _, speedup in known]
            ends = [[max(0.0, s[0] - s[1]) for _, s in known], [max(0.0, s[2] - s[0]) for _, s in known]]
            look = {"fmt": marker, "color": colour, "markersize": 5, "elinewidth": 1}
            axis.errorbar(middle, [y for y, _ in known], xerr=ends, label=label, **look)
    printed = [(line.printed, y) for y, line in enumerate(lines) if line.printed is not None]
    if printed:
        xs, ys = zip(*printed, strict=True)
        axis.scatter(xs, ys, marker="|", s=260, color=INK, linewidths=1.6, label="the paper's, on its machine")
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(lines)), [line.network for line in lines])
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as the dense network; bars: 95% interval")
    grid(axis, "x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_accuracy(figure: FigureBase, panels: list[dict[str, list[tuple[float, float, str]]]]) -> None:
    axes = figure.subplots(2, 1, sharey=True)
    colours = {"dense": (OTHER, "s"), "MoD, plain PyTorch": (PLAIN, "^"), "MoD, mod_kernels": (OURS, "o")}
    for axis, title, panel in zip(axes, ("eager", "optimize_for_inference"), panels, strict=True):
        for label, points in panel.items():
            _families(axis, sorted(points), label, *colours[label])
        axis.set_title(title)
        axis.set_xlabel("time, ms")
        axis.set_ylabel("ImageNet top-1, % (the paper's)")
        grid(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower right")


def _families(axis: Axes, points: list[tuple[float, float, str]], label: str, colour: str, marker: str) -> None:
    """MobileNetV2s are a family of their own: no line leads from them to a ResNet."""
    for family in (False, True):
        members = [point for point in points if point[2].startswith("mobilenet") == family]
        if not members:
            continue
        xs, ys, names = zip(*members, strict=True)
        axis.plot(xs, ys, f"{marker}-", color=colour, markersize=4, label=label)
        label = None
        for x, y, name in zip(xs, ys, names, strict=True):
            if colour == PLAIN:  # near ours, whose names stand there
                continue
            short = name.removesuffix("_mod").replace("_mod_", "-").removeprefix("resnet")
            axis.annotate(short, (x, y), (3, -9), textcoords="offset points", fontsize=7, color=colour)


def _spoken(line: Line) -> str:
    ours = f"{line.fused[0]:.2f}" if line.fused else "not measured"
    return f"{line.network} {ours}, the paper's {line.printed or 'not printed'}"

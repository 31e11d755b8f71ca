"""Times of every shape as bars, a panel for each batch size: plain, compiled, ours and the floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bench.store import Row
from ..bench.table import TRAIN, by_cell, geometric_mean
from ..spec import CONV_KINDS
from .collect import Group
from .pairs import our_row, pairs
from .picture import INK, OTHER, OURS, PLAIN, PLAIN_TOO, THIRD, WIDTH, Picture, grid, plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

LABELS = {
    "plain-clone": "plain PyTorch, clone + add",
    "plain-inplace": "plain PyTorch, in place",
    "compile": "torch.compile of the plain block",
    "ours": "mod_kernels, in place",
    "floor": "floor: x.mean and two linears alone",
}
LABELS_TRAINING = {  # in place can't train
    "plain-clone": "plain PyTorch, clone + add",
    "plain-cat": "plain PyTorch, cat",
    "ours": "mod_kernels",
    "floor": "floor: dy + 1 into a fresh tensor",
}
COLOURS = {
    "plain-clone": PLAIN,
    "plain-cat": PLAIN_TOO,
    "plain-inplace": PLAIN_TOO,
    "compile": OTHER,
    "ours": OURS,
    "floor": THIRD,
}

# Of a batch size: the shapes, and of each provider in LABELS its ms in each shape, None where there is none.
Panel = tuple[list[str], dict[str, list[float | None]]]


def data(rows: tuple[Row, ...]) -> dict[int, Panel]:
    """By batch size."""
    names = LABELS_TRAINING if rows[0].mode == TRAIN else LABELS
    panels: dict[int, Panel] = {}
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        shapes, times = panels.setdefault(first.batch, ([], {name: [] for name in names}))
        shapes.append(first.name if first.k is None else f"{first.name}\nk={first.k}")
        for name in names:
            row = our_row(cell) if name == "ours" else cell.get(name)
            times[name].append(row.median_ms if row else None)
    return dict(sorted(panels.items()))


def picture(group: Group) -> Picture | None:
    """None of a group that holds no blocks."""
    row = group.first
    if row.kind not in CONV_KINDS or not any(one.timed for one in group.rows):
        return None
    panels = data(group.rows)
    mean = geometric_mean(pair.ratio for pair in pairs(group.rows))
    speed = f"; ours {mean:.2f}x the fastest plain form (geometric mean)" if mean else ""
    title = f"MoD block ({row.kind}), {group.where}{speed}"
    most = max(len(shapes) for shapes, _ in panels.values())
    size = (min(12.0, max(WIDTH, 1.5 * most)), 0.7 + 2.2 * len(panels))
    alt = f"{title}. Bars of the median time for N = {', '.join(map(str, panels))}."
    return Picture("bars", title, alt, group.run.machine, size, lambda figure: draw(figure, panels))


def draw(figure: FigureBase, panels: dict[int, Panel]) -> None:
    axes = figure.subplots(len(panels), 1, squeeze=False).flatten()
    for axis, (batch, panel) in zip(axes, panels.items(), strict=True):
        _bars(axis, *panel)
        axis.set_title(f"N = {batch}", loc="left")
        axis.set_ylabel("ms (log)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _bars(axis: Axes, shapes: list[str], times: dict[str, list[float | None]]) -> None:
    """Groups of bars, one group per shape; a provider without a time leaves its place empty."""
    names = LABELS_TRAINING if "plain-cat" in times else LABELS
    width = 0.84 / len(names)
    for place, name in enumerate(names):
        at = [index - 0.42 + (place + 0.5) * width for index in range(len(shapes))]
        known = [(x, time) for x, time in zip(at, times[name], strict=True) if time is not None]
        # Hatched, for without seeing red and green its colour is the compiled form's.
        look = {"hatch": "////", "edgecolor": INK, "linewidth": 0.4} if name == "floor" else {}
        look |= {"facecolor": COLOURS[name], "label": names[name]}
        axis.bar([x for x, _ in known], [y for _, y in known], width, **look)
        if name in ("plain-clone", "ours"):
            for x, time in known:
                axis.text(x, time * 1.05, _figures(time), ha="center", va="bottom", fontsize=7)
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)
    axis.margins(y=0.15)
    axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
    grid(axis, "y")


def _figures(time: float) -> str:
    """Two figures, and never an exponent."""
    return f"{time:.0f}" if time >= 10 else f"{time:.2g}" if time >= 0.001 else f"{time:.4f}"

"""What a network and its MoD blocks cost over c (k = C // c), beside the paper's accuracies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bench.providers import PLAIN as PLAIN_BLOCKS
from ..bench.store import SWEEP_BLOCK, Row
from ..bench.table import by_cell
from ..bench.table_paper import best_plain
from .collect import Group
from .pairs import our_row
from .paper import how
from .picture import OTHER, OURS, PLAIN, THIRD, WIDTH, Picture, grid, plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Points = list[tuple[int, float]]  # (c, ms)


def data(rows: list[Row]) -> dict[str, dict[str, Points]]:
    """By network or block, by "plain", "ours" and, of networks, "identity" (its MoD blocks left out); c rising."""
    found: dict[str, dict[str, Points]] = {}
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        if first.c is None:
            continue
        plain = best_plain(cell, PLAIN_BLOCKS) if first.kind == SWEEP_BLOCK else best_plain(cell)
        for name, row in (("plain", plain), ("ours", our_row(cell)), ("identity", cell.get("identity"))):
            if row is not None and row.timed:
                found.setdefault(first.name, {}).setdefault(name, []).append((first.c, row.median_ms))
    return {name: {way: sorted(points) for way, points in ways.items()} for name, ways in found.items()}


def pictures(group: Group, blocks: list[Group]) -> list[Picture]:
    """One of the networks for each batch size; ``blocks``, groups of kind SWEEP_BLOCK, are drawn below it."""
    found = []
    for batch, name, where in dict.fromkeys(map(how, group.rows)):
        same = (batch, group.first.threads, group.first.mode)
        by_itself = [row for other in blocks for row in other.rows if (row.batch, row.threads, row.mode) == same]
        whole, each = data([row for row in group.rows if row.batch == batch]), data(by_itself)
        top1 = {
            key: said["paper"]["top1"]
            for key, said in group.run.networks.items()
            if (said.get("paper") or {}).get("top1")
        }
        if whole:
            title = f"What k costs, {where}"
            alt = f"{title}: times of {', '.join(whole)} and of their MoD blocks over c."
            draw_it = lambda figure, parts=(whole, each, top1): draw(figure, *parts)  # noqa: E731
            size = (WIDTH, 6.6 if each else 3.6)
            found.append(Picture(f"n{batch}-{name}", title, alt, group.run.machine, size, draw_it))
    return found


def draw(
    figure: FigureBase,
    networks: dict[str, dict[str, Points]],
    blocks: dict[str, dict[str, Points]],
    top1: dict[str, float],
) -> None:
    axes = figure.subplots(2 if blocks else 1, 1, squeeze=False).flatten()
    looks = {
        "plain": (PLAIN, "^", "plain PyTorch"),
        "ours": (OURS, "o", "mod_kernels"),
        "identity": (OTHER, "s", "MoD blocks left out"),
    }
    for network, ways in networks.items():
        _curves(axes[0], network if len(networks) > 1 else "", ways, looks, "-")
        known = [(c, top1[f"{network} c={c}"]) for c, _ in ways.get("ours", []) if f"{network} c={c}" in top1]
        if known:
            right = axes[0].twinx()
            right.plot(*zip(*known, strict=True), "d:", color=THIRD, markersize=4)
            right.set_ylabel("ImageNet top-1, % (the paper's)", color=THIRD)
    axes[0].set_ylim(bottom=0)
    axes[0].set_title(", ".join(networks))
    for (block, ways), style in zip(blocks.items(), ("-", "--", "-.", ":", (0, (1, 3))), strict=False):
        _curves(axes[1], block, ways, looks, style)
    if blocks:
        axes[1].set_yscale("log")
        plain_numbers(axes[1].yaxis)
        axes[1].legend(fontsize=7, ncols=2)
        axes[1].set_title("MoD blocks by themselves")
    cs = sorted({c for ways in networks.values() for points in ways.values() for c, _ in points})
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(cs, [str(c) for c in cs])
        axis.set_xlabel("c (k = C // c)")
        axis.set_ylabel("time, ms")
        grid(axis)
    axes[0].legend(loc="lower right")


def _curves(axis: Axes, name: str, ways: dict[str, Points], looks: dict, style) -> None:
    for way, points in ways.items():
        colour, marker, label = looks[way]
        label = f"{name} {label}".strip()
        axis.plot(
            *zip(*points, strict=True), marker=marker, linestyle=style, color=colour, markersize=4, label=label
        )

"""Pictures of the paper's table (accuracy against time, as its Figure 3) and of the sweep over c, for plot.py."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.pictures import sign_and_save
from mod_kernels.bench.paper_table import DENSE, DENSE_OPTIMIZED, OPTIMIZED
from mod_kernels.bench.providers import ENGINES, IN_PLACE, PLAIN
from mod_kernels.bench.store import PAPER, SWEEP, SWEEP_BLOCK, Results, Row
from mod_kernels.bench.table import by_cell
from mod_kernels.bench.table_paper import best_plain

GREY, BROWN, BLUE = "#8a8a8a", "#b5651d", "#1f6fb2"


def plot(results: Results, file: Path, picture_format: str) -> list[Path]:
    """One picture per batch and thread count (CPU) or mode (GPU); none of a file that holds neither."""
    pictures = []
    for kind, draw in ((PAPER, _draw_paper), (SWEEP, _draw_sweep)):
        rows = [row for row in results.rows if row.kind in (kind, SWEEP_BLOCK)]
        cells = by_cell(row for row in rows if row.kind == kind)
        for batch, how in dict.fromkeys(_how(next(iter(cell.values()))) for cell in cells.values()):
            picture = file.with_name(f"{file.stem}-n{batch}-{how}.{picture_format}")
            where = f"N = {batch}, {_spelled(how)}"
            figure = draw(results, [row for row in rows if _how(row) == (batch, how)], where)
            sign_and_save(figure, results, picture, 0.01, (0, 0.04, 1, 1))
            pictures.append(picture)
    return pictures


def _how(row: Row) -> tuple[int, str]:
    return row.batch, f"threads{row.threads}" if row.threads else row.mode


def _spelled(how: str) -> str:
    """``"threads2"`` as ``"2 threads"``."""
    count = how.removeprefix("threads")
    return how if count == how else f"{count} thread" + ("" if count == "1" else "s")


def _draw_paper(results: Results, rows: list[Row], where: str) -> plt.Figure:
    """The paper's top-1 against the time measured here, eagerly and optimized."""
    cells = by_cell(rows).values()
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.2), sharey=True)
    for axis, title, dense, ways in (
        (axes[0], "eager", DENSE, {"MoD, plain PyTorch": None, "MoD, mod_kernels": "fused"}),
        (axes[1], "optimize_for_inference", DENSE_OPTIMIZED, {"MoD, mod_kernels": OPTIMIZED}),
    ):
        times: dict[str, list[float]] = {}  # of a dense network: it stands in several cells
        for cell in cells:
            if dense in cell and cell[dense].median_ms is not None:
                times.setdefault(results.networks[cell[dense].name]["dense"], []).append(cell[dense].median_ms)
        points = {name: statistics.median(each) for name, each in times.items()}
        _line(axis, results, points, "dense", GREY)
        for label, provider in ways.items():
            found = [best_plain(cell) if provider is None else cell.get(provider) for cell in cells]
            points = {row.name: row.median_ms for row in found if row is not None and row.median_ms is not None}
            _line(axis, results, points, label, BROWN if provider is None else BLUE)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("time, ms")
        axis.grid(color="#e5e5e5")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="lower right", fontsize=9)
    axes[0].set_ylabel("ImageNet top-1, % (the paper's)")
    figure.suptitle(f"Accuracy against time, {where}", fontsize=12)
    return figure


def _line(axis, results: Results, points: dict[str, float], label: str, colour: str) -> None:
    known = [(ms, results.networks[name]["paper"]["top1"], name) for name, ms in points.items()]
    known = sorted(point for point in known if point[1] is not None)
    # MobileNetV2s are a family of their own: no line leads from them to a ResNet.
    for family in (False, True):
        members = [point for point in known if point[2].startswith("mobilenet") == family]
        if not members:
            continue
        axis.plot([ms for ms, _, _ in members], [top1 for _, top1, _ in members], "o-", color=colour, label=label)
        label = None
        for ms, top1, name in members:
            short = name.removesuffix("_mod").replace("_mod_", "-").removeprefix("resnet")
            axis.annotate(short, (ms, top1), (3, -9), textcoords="offset points", fontsize=7, color=colour)


def _draw_sweep(results: Results, rows: list[Row], where: str) -> plt.Figure:
    """Times of the network and of its blocks over c; the paper's accuracy above the network's."""
    figure, (whole, each) = plt.subplots(1, 2, figsize=(12.5, 5.0))
    cells = [cell for cell in by_cell(rows).values() if _first(cell).kind == SWEEP]
    cs = sorted({_first(cell).c for cell in cells})
    for label, provider, colour in (
        ("plain PyTorch", None, BROWN),
        ("mod_kernels", "fused", BLUE),
        ("MoD blocks left out", "identity", GREY),
    ):
        _over_c(
            whole, [best_plain(cell) if provider is None else cell.get(provider) for cell in cells], label, colour
        )
    whole.set_ylim(bottom=0)
    whole.set_title(_first(cells[0]).name, fontsize=11)
    accuracies = {c: results.networks[f"{_first(cells[0]).name} c={c}"]["paper"] for c in cs}
    known = [(c, printed["top1"]) for c, printed in accuracies.items() if printed is not None]
    if known:
        right = whole.twinx()
        right.plot(
            [c for c, _ in known], [top1 for _, top1 in known], "s:", color="#3a7d44", label="top-1, the paper's"
        )
        right.set_ylabel("ImageNet top-1, % (the paper's)", color="#3a7d44")
    blocks = [cell for cell in by_cell(rows).values() if _first(cell).kind == SWEEP_BLOCK]
    names = list(dict.fromkeys(_first(cell).name for cell in blocks))
    for name, style in zip(names, ("o-", "s--", "^-.", "v:", "d-"), strict=False):
        of_name = [cell for cell in blocks if _first(cell).name == name]
        _over_c(each, [best_plain(cell, PLAIN) for cell in of_name], f"{name} plain", BROWN, style)
        ours = ENGINES[_first(of_name[0]).device] + IN_PLACE
        _over_c(each, [cell.get(ours) for cell in of_name], f"{name} mod_kernels", BLUE, style)
    each.set_yscale("log")
    each.set_title("MoD blocks by themselves", fontsize=11)
    for axis in (whole, each):
        axis.set_xscale("log", base=2)
        axis.set_xticks(cs, [str(c) for c in cs])
        axis.set_xlabel("c (k = C // c)")
        axis.set_ylabel("time, ms")
        axis.grid(color="#e5e5e5")
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"What k costs, {where}", fontsize=12)
    return figure


def _over_c(axis, rows: list[Row | None], label: str, colour: str, style: str = "o-") -> None:
    points = sorted((row.c, row.median_ms) for row in rows if row is not None and row.median_ms is not None)
    axis.plot([c for c, _ in points], [ms for _, ms in points], style, color=colour, label=label)


def _first(cell: dict[str, Row]) -> Row:
    return next(iter(cell.values()))

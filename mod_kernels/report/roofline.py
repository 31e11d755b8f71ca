"""Roofline of a device: the rate at which a block's unavoidable bytes went by, under what bounds it.

Large blocks are bounded by the bandwidth that was measured, small ones by what a call costs whatever it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bench.store import Row
from ..bench.table import TRAIN, by_cell
from ..spec import CONV_KINDS
from .collect import Machine, spelled_threads
from .pairs import fastest_plain, our_row, three
from .picture import INK, OURS, PLAIN, WIDTH, Picture, grid, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

_OPS = ("mod_block_", "mod_block")


@dataclass(frozen=True)
class Roofline:
    """Points are (MB that can't be avoided, GB/s they went by with)."""

    plain: tuple[tuple[float, float], ...]
    ours: tuple[tuple[float, float], ...]
    bandwidth_gbs: float | None
    call_ms: float | None  # what a call costs at least; None where it was not measured


def data(rows: Iterable[Row], overhead: Iterable[Row] = ()) -> Roofline:
    """``rows`` of blocks on one device, run alike; ``overhead`` those of suite "overhead", of which the ones from
    the same number of threads count: the raw op of a block, else the cheapest raw op."""
    rows = [row for row in rows if row.bytes]
    plain, ours = [], []
    for cell in by_cell(rows).values():
        for points, row in ((plain, fastest_plain(cell)), (ours, our_row(cell))):
            if row is not None:
                points.append((row.bytes / 1e6, row.bytes / row.median_ms / 1e6))
    bandwidths = [row.bandwidth_gbs for row in rows if row.bandwidth_gbs]
    where = {(row.device, row.threads) for row in rows}
    calls = [row for row in overhead if row.provider == "op" and row.timed and (row.device, row.threads) in where]
    block = [row for row in calls if row.name in _OPS]
    call_ms = min((row.median_ms for row in block or calls), default=None)
    return Roofline(tuple(plain), tuple(ours), max(bandwidths, default=None), call_ms)


def pictures(machine: Machine) -> list[Picture]:
    """One for each device, number of threads or mode, and state of the L2."""
    groups: dict[tuple, list] = {}
    for group in machine.groups:
        row = group.first
        if row.kind in CONV_KINDS and row.mode != TRAIN and group.suite != "memory":
            groups.setdefault((row.device, row.threads, row.mode, row.cache), []).append(group)
    overhead = [row for group in machine.suites.get("overhead", ()) for row in group.rows]
    found = []
    for (device, threads, mode, cache), alike in groups.items():
        line = data((row for group in alike for row in group.rows), overhead)
        if not line.ours:
            continue
        how = spelled_threads(threads) if threads else f"{mode}, L2 {cache}"
        name = "-".join(["roofline", device, f"threads{threads}" if threads else f"{mode}-{cache}"])
        best = max(rate for _, rate in line.ours)
        roof = f", of {line.bandwidth_gbs:.0f} GB/s measured" if line.bandwidth_gbs else ""
        alt = f"Roofline, {device}, {how}: blocks of ours reach up to {best:.1f} GB/s{roof}."
        newest = max((group.run for group in alike), key=lambda run: str(run.started))
        found.append(
            Picture(
                name,
                f"Roofline, {device}, {how}",
                alt,
                newest.machine,
                (WIDTH, 4.0),
                lambda f, line=line: draw(f, line),
            )
        )
    return found


def draw(figure: FigureBase, line: Roofline) -> None:
    axis = figure.subplots()
    for points, colour, marker, label in (
        (line.plain, PLAIN, "^", "plain PyTorch, the fastest form"),
        (line.ours, OURS, "o", "mod_kernels, in place"),
    ):
        if points:
            axis.scatter(*zip(*points, strict=True), s=20, color=colour, marker=marker, alpha=0.8, label=label)
    sizes = [size for size, _ in (*line.plain, *line.ours)]
    ends = (min(sizes) / 1.5, max(sizes) * 1.5)
    if line.bandwidth_gbs:
        label = f"memory bandwidth, {three(line.bandwidth_gbs)} GB/s"
        axis.plot(ends, (line.bandwidth_gbs,) * 2, "-", color=INK, linewidth=1, label=label)
    if line.call_ms:
        label = f"one call, {line.call_ms * 1e3:.3g} µs"
        axis.plot(ends, [size / line.call_ms for size in ends], "--", color=INK, linewidth=1, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    rates = [rate for _, rate in (*line.plain, *line.ours)]
    axis.set_ylim(min(rates) / 1.6, max(*rates, line.bandwidth_gbs or 0) * 1.6)
    axis.set_xlim(ends)
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis)
    axis.set_xlabel("MB that can't be avoided moving")
    axis.set_ylabel("GB/s of them")
    grid(axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)

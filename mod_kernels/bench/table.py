"""Results as tables: one row per cell, a column per provider, and the ratios that matter."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .blocks import COLD
from .machine import signature
from .networks import PLAIN_FORMS as PLAIN_NETWORKS
from .providers import BESIDE, COMPILED, ENGINES, FED, IN_PLACE, PLAIN
from .store import Results, Row

MISSING = "-"
TRAIN = "train"  # a row's mode
DOUBTS_SHOWN = 12  # more of them are only counted
_NARROW = {"show_edge": False, "pad_edge": False}  # every column fits a console of 140 characters


def by_cell(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """Rows by cell, then by provider, in the order they came."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.cell, {})[row.provider] = row
    return found


def ratio(cell: dict[str, Row], above: Iterable[str], below: str) -> float | None:
    """The fastest of ``above`` over ``below``, None where a time is missing."""
    times = [cell[name].median_ms for name in above if name in cell and cell[name].median_ms is not None]
    under = cell[below].median_ms if below in cell else None
    return min(times) / under if times and under else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def show(results: Results, console: Console) -> None:
    """Print every table, the notes and what was found wrong."""
    blocks = [row for row in results.rows if row.kind != "network"]
    groups: dict[tuple, list[Row]] = {}
    for row in blocks:
        group = (row.device, row.dtype, row.layout, row.threads, row.mode, row.cache)
        groups.setdefault(group, []).append(row)
    for group, rows in groups.items():
        console.print(_block_table(group, rows, results))
    networks = [row for row in results.rows if row.kind == "network"]
    if networks:
        console.print(_network_table(networks))
    for row in results.rows:
        if row.check.startswith("wrong") or (row.check.startswith("left out") and row.provider not in COMPILED):
            console.print(f"{row.name} N={row.batch} {row.provider}: {row.check}", markup=False, highlight=False)
    show_doubts(results.rows, console)
    for note in results.notes:
        console.print(note, markup=False, highlight=False)
    console.print(signature(results.machine), markup=False, highlight=False)
    if results.interrupted:
        console.print("interrupted: this is what was measured until then")


def show_doubts(rows: list[Row], console: Console) -> None:
    """Print which times are to be doubted and why; of more than a screen holds, how many."""
    doubted = [row for row in rows if row.warning]
    said = [f"{_where(row)} {row.provider}, to be doubted: {row.warning}" for row in doubted]
    if len(doubted) > DOUBTS_SHOWN:
        timed = sum(row.median_ms is not None for row in rows)
        said = [f"{len(doubted)} of {timed} times are to be doubted: a file of --json says which and why"]
    for line in said:
        console.print(line, markup=False, highlight=False)


def _where(row: Row) -> str:
    threads = f" {row.threads} thread(s)" if row.threads is not None else ""
    return f"{row.name} N={row.batch} {row.mode}{threads}"


def _block_table(group: tuple, rows: list[Row], results: Results) -> Table:
    device, dtype, layout, threads, mode, cache = group
    ours = ENGINES[device]
    where = f"{threads} thread{'s' if threads != 1 else ''}" if device == "cpu" else f"{mode}, L2 {cache}"
    if device == "cpu" and cache == COLD:
        where += ", cold (inputs in turn, more than the caches hold)"
    bandwidth = results.bandwidth_gbs.get("gpu" if threads is None else str(threads))
    reads = f", reads {bandwidth:.0f} GB/s" if bandwidth else ""
    what = "MoD block in training" if mode == TRAIN else "MoD block"
    table = Table(title=f"{what}, {dtype}, {layout}, {device}, {where}{reads}; median ms", **_NARROW)
    measured = {row.provider for row in rows}
    engines = [engine + ending for engine in (ours, *BESIDE[device]) for ending in ("", IN_PLACE, FED)]
    names = [*PLAIN, *COMPILED, *engines, "big-pass", "floor"]
    names = [name for name in names if name in measured]
    for heading in ("block", "N"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        style = "bold" if name in engines else ""
        table.add_column(name.replace("-", "\n"), justify="right", style=style)
    limits = any(row.limit_ms for row in rows)
    if limits:
        table.add_column("limit", justify="right")
    last = "big pass/\nfloor" if mode == TRAIN else "floor/\nours"
    for heading in ("clone/\nours", "best\nplain/\nours", last):
        table.add_column(heading, justify="right")
    ratios: list[list[float | None]] = []
    headlined = ours if mode == TRAIN else ours + IN_PLACE
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        ratios.append(
            [
                ratio(cell, ["plain-clone"], headlined),
                ratio(cell, [*PLAIN, *COMPILED], headlined),
                ratio(cell, ["big-pass"], "floor") if mode == TRAIN else ratio(cell, ["floor"], headlined),
            ]
        )
        times = [_time(cell.get(name)) for name in names]
        if limits:
            times.append(three_digits(first.limit_ms))
        table.add_row(first.name, str(first.batch), *times, *_ratios(ratios[-1]))
    means = [geometric_mean(column) for column in zip(*ratios, strict=True)]
    table.add_section()
    table.add_row("geometric\nmean", "", *[""] * (len(names) + limits), *_ratios(means))
    if mode == TRAIN:
        table.caption = (
            "forward and backward, gradients of x and of all weights; best plain is the fastest of the plain "
            "forms; big pass: that of x's gradient by itself; floor: dy + 1 into a fresh tensor"
        )
        return table
    table.caption = (
        "ours is the in-place form; fed, the same given x's means, is in no ratio; best plain is the fastest of "
        "the plain forms and the compiled ones, below whose times stand the seconds that compiling took; floor: "
        "x.mean and two linears; limit: the block's bytes at the bandwidth above (in cache a kernel can beat it)"
    )
    return table


def _network_table(rows: list[Row]) -> Table:
    measured = {row.provider for row in rows}
    plain = [name for name in PLAIN_NETWORKS if name in measured]
    names = [*plain, "fused", "identity"]
    training = any(row.mode == TRAIN for row in rows)
    table = Table(title=f"Whole networks{', forward and backward' if training else ''}; median ms")
    for heading in (
        "network",
        "N",
        "threads or\nmode",
        *names,
        "plain/\nfused",
        "(fused - identity)/\n(plain - identity)",
        *["peak MiB,\nplain/fused"] * training,
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        best = [name for name in plain if name in cell and cell[name].median_ms is not None]
        share = cell["fused"].share if "fused" in cell else None
        table.add_row(
            first.name,
            str(first.batch),
            str(first.threads or first.mode),
            *[_time(cell.get(name)) for name in names],
            *_ratios([ratio(cell, best, "fused")]),
            MISSING if share is None else "{:.2f} ({:.2f} to {:.2f})".format(*share),
            *[_peaks(cell, best)] * training,
        )
    table.caption = (
        "plain is the fastest of the plain forms; identity: the MoD blocks left out, the limit; "
        "differences are medians over the rounds, each round's against its own; in brackets a 95% interval"
    )
    return table


def _peaks(cell: dict[str, Row], plain: list[str]) -> str:
    peaks = [[cell[name].peak_mib for name in names if name in cell] for names in (plain, ["fused"])]
    known = [min(filter(None, values), default=None) for values in peaks]
    return MISSING if None in known else "{:.0f}/{:.0f}".format(*known)


def _time(row: Row | None) -> str:
    if row is None or row.check.startswith("left out"):
        return MISSING
    if row.check.startswith("wrong"):
        return "WRONG"
    compiling = "" if row.compile_s is None else f"\n{row.compile_s:.3g} s"
    return three_digits(row.median_ms) + compiling


def three_digits(value: float | None) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return MISSING
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _ratios(values: Iterable[float | None]) -> list[str]:
    return [MISSING if value is None else f"{value:.2f}" for value in values]

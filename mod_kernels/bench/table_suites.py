"""The suites beside blocks and networks as tables: ops, scaling, overhead, memory, cold start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from . import scaling
from .machine import signature
from .ops import PLAIN
from .overhead import PUBLIC, RAW, YARDSTICK
from .providers import ENGINES, IN_PLACE
from .providers import PLAIN as PLAIN_FORMS
from .store import Results, Row
from .table import MISSING, by_cell, geometric_mean, ratio, show_doubts, three_digits


def show(results: Results, console: Console) -> None:
    """Print the tables of ``results.suite``, then what was wrong or left out, the notes and the machine.

    Raises:
        KeyError: a suite that is not shown here.
    """
    rows = list(results.rows)
    for printed in SHOWN[results.suite](rows):
        console.print(printed, markup=False, highlight=False)
    for row in rows:
        if row.check.startswith(("wrong", "left out")):
            said = f"{row.name} N={row.batch} {row.mode} {row.provider}: {row.check}"
            console.print(said, markup=False, highlight=False)
    show_doubts(rows, console)
    for note in results.notes:
        console.print(note, markup=False, highlight=False)
    console.print(signature(results.machine), markup=False, highlight=False)
    if results.interrupted:
        console.print("interrupted: this is what was measured until then")


def _ops(rows: list[Row]) -> Iterable[Table]:
    for where, group in _runs(rows):
        headings = ("op", "shape", "N", "plain", "ours", "plain/\nours", "limit")
        table = _table(f"Ops by themselves, {where}; median ms", headings)
        ops = dict.fromkeys(row.provider.partition(":")[0] for row in group)
        for op in ops:
            ratios = []
            for cell in by_cell(row for row in group if row.provider.startswith(f"{op}:")).values():
                first = next(iter(cell.values()))
                ours = f"{op}:{ENGINES[first.device]}"
                plain = [name for name in cell if name.startswith(f"{op}:{PLAIN}")]
                ratios.append(ratio(cell, plain, ours))
                times = [_least(cell, plain), _least(cell, [ours])]
                limit = next((row.limit_ms for row in cell.values() if row.limit_ms is not None), None)
                table.add_row(
                    op,
                    first.name,
                    str(first.batch),
                    *map(three_digits, times),
                    *_two([ratios[-1]]),
                    three_digits(limit),
                )
            table.add_row("", "geometric mean", "", "", "", *_two([geometric_mean(ratios)]), "", end_section=True)
        table.caption = (
            "plain is the fastest of the ways that people write it; fed: given the means of x; limit: the bytes "
            "that can't be avoided at the bandwidth measured (in cache an op can beat it)"
        )
        yield table


def _scaling(rows: list[Row]) -> Iterable[Table | str]:
    for where, group in _runs(rows):
        headings = ("N", "H=W", "C", "k", "plain", "ours", "plain/\nours", "limit")
        table = _table(f"A bottleneck block along each axis, {where}; median ms", headings)
        for cell in by_cell(group).values():
            first = next(iter(cell.values()))
            ours = ENGINES[first.device] + IN_PLACE
            times = (_least(cell, PLAIN_FORMS), _least(cell, [ours]))
            limit = three_digits(first.limit_ms)
            place = map(str, scaling.place(first))
            table.add_row(*place, *map(three_digits, times), *_two([scaling.ratio_of(cell)]), limit)
        table.caption = "plain is the fastest of the plain forms, ours the in-place form"
        yield table
    yield from map(str, scaling.break_even(rows))


def _overhead(rows: list[Row]) -> Iterable[Table]:
    headings = ("op", "gradients", PUBLIC, RAW, YARDSTICK, f"{PUBLIC}/\n{YARDSTICK}")
    table = _table("What a call costs; microseconds", headings)
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        times = [_least(cell, [name]) for name in (PUBLIC, RAW, YARDSTICK)]
        microseconds = [None if time is None else time * 1e3 for time in times]
        gradients = "yes" if first.mode == "train" else "no"
        share = _two([ratio(cell, [PUBLIC], YARDSTICK)])
        table.add_row(first.name, gradients, *_two(microseconds), *share)
    table.caption = (
        f"one sample, 16 channels, one pixel; {PUBLIC}: the function; {RAW}: what it calls, by itself; "
        "the least over many short runs"
    )
    yield table


def _memory(rows: list[Row]) -> Iterable[Table]:
    for where, group in _runs(rows):
        engine = ENGINES[group[0].device]
        names = [*PLAIN_FORMS, engine, engine + IN_PLACE]
        headings = [
            "block",
            "N",
            *(name.replace("-", "\n") for name in names),
            "plain/\nours",
            "in place:\nplain/ours",
        ]
        table = _table(f"Memory of a call of the block at its peak, {where}; MiB", headings)
        for cell in by_cell(group).values():
            first = next(iter(cell.values()))
            peaks = {name: cell[name].peak_mib if name in cell else None for name in names}
            out_of_place = [peaks[name] for name in PLAIN_FORMS[:2] if peaks[name] is not None]
            pairs = (
                (min(out_of_place, default=None), peaks[engine]),
                (peaks[PLAIN_FORMS[2]], peaks[engine + IN_PLACE]),
            )
            shares = [plain / ours if plain and ours else None for plain, ours in pairs]
            table.add_row(first.name, str(first.batch), *_two(peaks.values()), *_two(shares))
        table.caption = "beyond what was held before the call, as PyTorch's allocator counts it"
        yield table


def _cold_start(rows: list[Row]) -> Iterable[Table]:
    table = _table("A fresh process; ms", ("step", "median", "quartiles", "starts"))
    for row in rows:
        quartiles = f"{three_digits(row.q1_ms)} to {three_digits(row.q3_ms)}" if row.samples > 1 else MISSING
        table.add_row(row.name, three_digits(row.median_ms), quartiles, str(row.samples))
    yield table


# By the name of a suite.
SHOWN = {
    "ops": _ops,
    "scaling": _scaling,
    "overhead": _overhead,
    "memory": _memory,
    "cold-start": _cold_start,
}


def _runs(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by what their cells have in common, with a name for it."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        mode = "forward and backward" if row.mode == "train" else row.mode
        on_gpu = f"{mode}, L2 {row.cache}"
        on_cpu = f"{row.threads} thread(s)" + (f", {mode}" if row.mode == "train" else "")
        where = f"{row.dtype}, {row.device}, {on_gpu if row.threads is None else on_cpu}"
        groups.setdefault(where, []).append(row)
    return list(groups.items())


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, show_edge=False, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _least(cell: dict[str, Row], names: Iterable[str]) -> float | None:
    """The shortest median of ``names``, ms."""
    times = [cell[name].median_ms for name in names if name in cell and cell[name].timed]
    return min(times, default=None)


def _two(values: Iterable[float | None]) -> list[str]:
    """With two digits after the point."""
    return [MISSING if value is None else f"{value:.2f}" for value in values]

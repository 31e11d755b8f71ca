"""``mod-kernels compare``: two result files, and an exit status for a regression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ._terminal import make_console, refuse, said

if TYPE_CHECKING:
    from .bench.compare import Change, Comparison, Speedup
    from .bench.store import Results, Row


def compare_command(
    first: Annotated[Path, typer.Argument(help="result file, the older", metavar="A.jsonl")],
    second: Annotated[Path, typer.Argument(help="result file, the newer", metavar="B.jsonl")],
    threshold: Annotated[
        float, typer.Option(help="a speed-up that fell by more than this share is a regression")
    ] = 0.1,
    suite: Annotated[str | None, typer.Option(help="only runs of this suite; default all")] = None,
) -> None:
    """Hold the newest results of B against those of A: speed-ups over plain PyTorch, and which of them changed.

    A change is significant if the intervals of the quartiles do not overlap. Exit status 1 on a regression: a
    speed-up that fell significantly and by more than the threshold, or a result that is wrong or missing in B.
    """
    from .bench.compare import compare

    if not 0 < threshold < 1:
        refuse(f"threshold must be between 0 and 1, got {threshold:g}")
    console, runs = make_console(), []
    problems: list[str] = []
    for path in (first, second):
        runs.append(_runs(path, suite, problems))
    comparison = compare(*runs, threshold)
    if not comparison.changes and not comparison.lost:
        refuse("; ".join([f"{first} and {second} have nothing to compare", *comparison.notes]))
    _show(comparison, console)
    for line in (*problems, *comparison.notes, *_named(comparison), comparison.summary()):
        said(console, line)
    if comparison.regressions:
        raise typer.Exit(1)


def _runs(path: Path, suite: str | None, problems: list[str]) -> list[Results]:
    """A file's runs, of one suite if one is asked for; at least one."""
    from .bench import store

    try:
        contents = store.read(path)
    except OSError as error:
        refuse(f"{path}: {error.strerror}")
    if not contents.runs:
        refuse("; ".join(contents.problems) or f"{path} holds no run")
    problems += contents.problems
    runs = [run for run in contents.runs if suite in (None, run.suite)]
    if not runs:
        suites = ", ".join(dict.fromkeys(run.suite for run in contents.runs))
        refuse(f"suite must be one of {suites} for {path}, got {suite!r}")
    return runs


def _show(comparison: Comparison, console: Console) -> None:
    groups: dict[str, list[Change]] = {}
    for change in (*comparison.changes, *comparison.lost):
        groups.setdefault(_where(change.row), []).append(change)
    for where, changes in groups.items():
        table = Table(title=f"{where}; speed-up over the fastest plain form, from the quartiles")
        for heading in ("cell", "provider", "A", "B", "B/A", "time\nB/A", ""):
            table.add_column(heading, justify="left" if heading in ("cell", "provider", "") else "right")
        for change in changes:
            verdict = "LOST" if change.lost else comparison.verdict(change)
            table.add_row(
                _cell(change.row),
                change.row.provider,
                _speedup(change.before),
                _speedup(change.after),
                "-" if change.lost else f"{change.ratio:.3f}",
                "-" if change.times is None else f"{change.times:.3f}",
                verdict.upper() if verdict == "regression" else verdict,
            )
        console.print(table)


def _named(comparison: Comparison) -> list[str]:
    """A line for every regression."""
    lines = []
    for change in comparison.regressions:
        what = change.lost or f"speed-up {change.before.value:.2f}, now {change.after.value:.2f}"
        doubt = f" (doubted: {change.row.warning})" if change.row.warning else ""
        lines.append(
            f"regression: {_cell(change.row)}, {_where(change.row)}, {change.row.provider}: {what}{doubt}"
        )
    return lines


def _cell(row: Row) -> str:
    options = "".join(f" {name}={value}" for name, value in (("c", row.c), ("k", row.k)) if value is not None)
    return f"{row.kind} {row.name} N={row.batch}{options}"


def _where(row: Row) -> str:
    threads = [] if row.threads is None else [f"{row.threads} thread{'s' if row.threads != 1 else ''}"]
    return ", ".join([row.device, *threads, row.dtype, row.layout, row.mode, row.cache])


def _speedup(one: Speedup | None) -> str:
    return "-" if one is None else f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})"

"""A numerics report as a table: the worst comparison of each group, then what failed and what was not served."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .verify import Report, Row

MAX_FAILURES_SHOWN = 20


def worst(report: Report) -> dict[tuple[str, str, str, str], Row]:
    """For each (backend, op, dtype, layout) the comparison nearest to its bound, or furthest past it."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in report.checked:
        key = (row.backend, row.op.split()[0], row.dtype, row.layout)
        if key not in found or _badness(row) > _badness(found[key]):
            found[key] = row
    return found


def not_served(report: Report) -> dict[str, dict[str, int]]:
    """Backend -> reason -> how many cases it did not take."""
    found: dict[str, dict[str, int]] = {}
    for row in report.rows:
        if not row.served:
            reasons = found.setdefault(row.backend, {})
            reasons[row.note] = reasons.get(row.note, 0) + 1
    return found


def _badness(row: Row) -> tuple[bool, float]:
    share = row.error / row.bound if row.bound else row.error
    return not row.ok, share if share == share else float("inf")


def show(report: Report, console: Console) -> None:
    """Print the report."""
    table = Table(title=f"Numerics on {report.device}, {len(report.checked)} comparisons, seed {report.seed}")
    for heading in ("backend", "op", "dtype", "layout"):
        table.add_column(heading, no_wrap=True)
    for heading in ("checks", "worst error", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("stage", "where", ""):
        table.add_column(heading, no_wrap=True)
    counts: dict[tuple[str, str, str, str], int] = {}
    for row in report.checked:
        key = (row.backend, row.op.split()[0], row.dtype, row.layout)
        counts[key] = counts.get(key, 0) + 1
    for key, row in worst(report).items():
        verdict = "ok" if row.ok else "[red]FAILED[/]"
        variant = " ".join(row.op.split()[1:])
        where = f"{row.shape} {variant}".strip()
        table.add_row(*key, str(counts[key]), f"{row.error:.1e}", f"{row.bound:.1e}", row.stage, where, verdict)
    if report.checked:
        console.print(table)
    for row in report.failed[:MAX_FAILURES_SHOWN]:
        line = f"FAILED {row.backend} {row.op} {row.dtype} {row.layout} {row.shape}: {row.stage} {row.error:.3g}"
        console.print(f"{line}, {row.bound:.3g} is allowed {row.note}", markup=False, highlight=False)
    for backend, reasons in not_served(report).items():
        for reason, count in reasons.items():
            line = f"not served by {backend} ({count} cases): {reason}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not report.checked:
        verdict = "NOTHING was checked: no backend named serves any case here"
    elif report.failed:
        verdict = f"FAILED: {len(report.failed)} of {len(report.checked)} comparisons"
    else:
        verdict = f"ok: {len(report.checked)} comparisons"
    console.print(verdict, highlight=False)

"""Compiled kernels as a table: the worst variant of each kernel on each architecture, then what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from .backends.triton.resources import Row

MISSING = "-"


def as_json(about: dict[str, object], rows: list[Row]) -> str:
    """``about`` and the rows, one a line and without what a row has not: there are thousands."""
    head = json.dumps(about, indent=1).removesuffix("\n}")
    lines = (
        json.dumps({key: value for key, value in asdict(row).items() if value not in (None, [])}) for row in rows
    )
    return head + ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def show(rows: list[Row], console: Console) -> None:
    """Print the table, every row that is not ok, and the verdict."""
    table = Table(title="Triton kernels, ahead of time; the worst of the variants")
    for heading in ("kernel", "sm"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "variants",
        "registers",
        "spilled\nbytes",
        "shared\nbytes",
        "occupancy",
        "loads,\nbytes",
        "stores,\nbytes",
        "pooled,\nbytes",
        "ESTIMATE\nbytes/clock",
        "ESTIMATE\ntime/floor",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.capability), []).append(row)
    for (kernel, capability), group in sorted(groups.items()):
        table.add_row(
            kernel,
            str(capability),
            str(len(group)),
            _worst(max, (row.registers for row in group)),
            _worst(max, (row.spill_bytes for row in group)),
            _worst(max, (row.shared_bytes for row in group)),
            _worst(min, (row.occupancy for row in group), "{:.0%}"),
            _worst(min, (row.load_widths and row.load_widths[0] for row in group)),
            _worst(min, (row.store_widths and row.store_widths[0] for row in group)),
            _worst(min, (row.pool_load_widths and row.pool_load_widths[0] for row in group)),
            _worst(min, (row.estimate_bytes_per_clock for row in group), "{:.1f}"),
            _worst(max, (row.estimate_over_floor for row in group), "{:.2f}"),
        )
    table.caption = (
        "narrowest loads and stores of a thread, and loads of what a pooling kernel pools; ESTIMATES, not "
        "measurements, from the instructions of the pooling loop: bytes that a multiprocessor can load a clock, "
        "time over the memory's"
    )
    console.print(table)
    wrong = [row for row in rows if not row.ok]
    for row in wrong:
        reason = f"does not compile: {' '.join(row.error.split())}" if row.error else ", ".join(row.problems)
        console.print(f"{row.name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    verdict = f"FAILED: {len(wrong)} of {len(rows)} variants" if wrong else f"ok: {len(rows)} variants"
    console.print(verdict, highlight=False)


def _worst(pick: Callable[[list], float], values: Iterable[float | None], form: str = "{}") -> str:
    known = [value for value in values if value is not None]
    return form.format(pick(known)) if known else MISSING

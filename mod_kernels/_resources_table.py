"""Compiled kernels as a table: the worst variant of each kernel on each architecture, then what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table

from .backends import cuda_resources
from .backends.triton.resources import Row

MISSING = "-"


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
    _judge(rows, "variants", console)


def show_cuda(rows: list[cuda_resources.Row], console: Console) -> None:
    """The same of the CUDA engine's kernels; of those made for several dtypes the worst."""
    table = Table(title="CUDA kernels, ahead of time; the worst of the instantiations")
    for heading in ("kernel", "sm"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "instantiations",
        "registers",
        "spilled\nbytes",
        "stack\nbytes",
        "loads,\nbytes",
        "stores,\nbytes",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, int], list[cuda_resources.Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel.partition("<")[0], row.capability), []).append(row)
    for (kernel, capability), group in sorted(groups.items()):
        table.add_row(
            kernel,
            str(capability),
            str(len(group)),
            _worst(max, (row.registers for row in group)),
            _worst(max, (row.spill_bytes for row in group)),
            _worst(max, (row.stack_bytes for row in group)),
            _worst(min, (row.load_widths and row.load_widths[1] for row in group)),
            _worst(min, (row.store_widths and row.store_widths[1] for row in group)),
        )
    table.caption = "widest loads and stores of a thread, of the instantiation where those are narrowest"
    console.print(table)
    _judge(rows, "kernels", console)


def _judge(rows: list, what: str, console: Console) -> None:
    """Every row that is not ok, and the verdict."""
    wrong = [row for row in rows if not row.ok]
    for row in wrong:
        reason = f"does not compile: {' '.join(row.error.split())}" if row.error else ", ".join(row.problems)
        console.print(f"{row.name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    verdict = f"FAILED: {len(wrong)} of {len(rows)} {what}" if wrong else f"ok: {len(rows)} {what}"
    console.print(verdict, highlight=False)


def _worst(pick: Callable[[list], float], values: Iterable[float | None], form: str = "{}") -> str:
    known = [value for value in values if value is not None]
    return form.format(pick(known)) if known else MISSING

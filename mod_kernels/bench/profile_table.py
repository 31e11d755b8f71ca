"""What :mod:`mod_kernels.bench.profile` found as a table, from results alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .machine import signature
from .profile import BLOCK, DISPATCH, FUSED, KIND, OTHER, PLAIN, STEPS
from .store import Results, Row
from .table import MISSING, by_cell

_LABELS = {DISPATCH: "Python and dispatch"}
_MEANING = {
    "cpu": "Wall times; the profiler slows both: the last line is a forward without it. Python and dispatch is "
    "what lies between a block's steps, what the profiler takes to begin and end them included.",
    "cuda": "Device times of kernels; the last line is a forward without the profiler, its waiting for Python "
    "included.",
}


def show(results: Results, console: Console) -> None:
    """Print a table for each network, what its blocks call, what was wrong, and the machine."""
    for rows in by_cell(row for row in results.rows if row.kind == KIND).values():
        first = next(iter(rows.values()))
        network = results.networks[first.name]
        console.print(_table(first, rows, network))
        count = max(row.samples for row in rows.values())
        _say(console, f"medians of {count} forwards; plain form: {network['form']}. {_MEANING[first.device]}")
        _say(console, "Fused, the other blocks take the means for the MoD blocks after them wherever they can.")
        calls = "{plain:.3g} {what} in plain PyTorch, {fused:.3g} fused".format(
            what="ops" if first.device == "cpu" else "kernels", **network["calls"]
        )
        _say(console, f"each of the {network['blocks']} MoD blocks: {calls}")
        for name in (PLAIN, FUSED):
            check = rows[f"{name}/{OTHER}"].check
            if check != "ok":
                _say(console, f"{name}: {check}")
    for note in results.notes:
        _say(console, note)
    _say(console, signature(results.machine))
    if results.interrupted:
        _say(console, "interrupted: nothing was measured to its end")


def _table(first: Row, rows: dict[str, Row], network: dict) -> Table:
    on_cpu = first.device == "cpu"
    where = f", {first.threads} thread{'s' if first.threads != 1 else ''}" if on_cpu else ""
    table = Table(title=f"{first.name}, N={first.batch}, {first.dtype}, {first.device}{where}", show_edge=False)
    table.add_column("part", no_wrap=True)
    for heading in ("plain ms", "share", "fused ms", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    times = {provider: row.median_ms for provider, row in rows.items() if row.timed}
    inside = [part for part in (*STEPS, DISPATCH) if f"{PLAIN}/{part}" in rows]
    plain = [times[f"{PLAIN}/{part}"] for part in inside if f"{PLAIN}/{part}" in times]
    blocks = {PLAIN: sum(plain) if plain else None, FUSED: times.get(f"{FUSED}/{BLOCK}")}
    other = {name: times.get(f"{name}/{OTHER}") for name in (PLAIN, FUSED)}
    whole = {name: None if other[name] is None else blocks[name] + other[name] for name in other}
    for part in inside:
        table.add_row(_LABELS.get(part, part), *_time(times.get(f"{PLAIN}/{part}"), whole[PLAIN]), "", "")
    table.add_section()
    for label, by_name in (("MoD blocks", blocks), (OTHER, other), ("together", whole)):
        table.add_row(label, *_time(by_name[PLAIN], whole[PLAIN]), *_time(by_name[FUSED], whole[FUSED]))
    unprofiled = {name: _time(network["unprofiled_ms"].get(name), 1.0)[0] for name in (PLAIN, FUSED)}
    table.add_row("not profiled", unprofiled[PLAIN], "", unprofiled[FUSED], "")
    return table


def _time(ms: float | None, whole: float | None) -> tuple[str, str]:
    return (MISSING, MISSING) if ms is None or not whole else (f"{ms:.3g}", f"{ms / whole:.1%}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)

"""The paper's table and the sweep over c as tables, from results alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .machine import signature
from .networks import PLAIN_FORMS
from .paper_table import DENSE, DENSE_OPTIMIZED, OPTIMIZED
from .store import PAPER, SWEEP, SWEEP_BLOCK, Results, Row
from .table import MISSING, by_cell, three_digits

_RUNTIMES = ("onnxruntime", "openvino")


def show(results: Results, console: Console) -> None:
    """Print the tables, why a time is not there, and the machine."""
    rows = {kind: [row for row in results.rows if row.kind == kind] for kind in (PAPER, SWEEP, SWEEP_BLOCK)}
    if rows[PAPER]:
        console.print(_paper(rows[PAPER], results))
    if rows[SWEEP]:
        console.print(_sweep(rows[SWEEP], results))
    if rows[SWEEP_BLOCK]:
        console.print(_sweep_blocks(rows[SWEEP_BLOCK]))
    for (provider, check), where in _unmeasured(results.rows).items():
        console.print(f"{provider}: {check} ({', '.join(where)})", markup=False, highlight=False)
    console.print(signature(results.machine), markup=False, highlight=False)
    if results.interrupted:
        console.print("interrupted: this is what was measured until then")


def best_plain(cell: dict[str, Row], forms: tuple[str, ...] = PLAIN_FORMS) -> Row | None:
    """The fastest of the plain forms that have a time."""
    timed = [cell[form] for form in forms if form in cell and cell[form].median_ms is not None]
    return min(timed, key=lambda row: row.median_ms, default=None)


def _paper(rows: list[Row], results: Results) -> Table:
    runtimes = [name for name in _RUNTIMES if any(row.provider == name for row in rows)]
    table = Table(
        title="The paper's networks, float32; median ms, and speed-ups over the dense peer", show_edge=False
    )
    headings = ["network", "N", "threads\nor mode", "M par.", "GMAC", "plain", "fused", "opti-\nmized", "identity"]
    headings += [*runtimes, "plain\nx", "fused\nx", "opti-\nmized x", "identity\nx", "paper\nx"]
    headings += ["share of plain", "share of plain,\noptimized"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        network = results.networks[first.name]
        dense, plain = results.networks[network["dense"]], best_plain(cell)
        where = (str(first.batch), str(first.threads or first.mode))
        times = [milliseconds(cell.get(DENSE)), MISSING, milliseconds(cell.get(DENSE_OPTIMIZED))]
        table.add_row(network["dense"], *where, *_size(dense), *times)
        times = [milliseconds(one) for one in (plain, *map(cell.get, ("fused", OPTIMIZED, "identity", *runtimes)))]
        speedups = [speedup(one) for one in (plain, *map(cell.get, ("fused", OPTIMIZED, "identity")))]
        printed = network["paper"]["gpu_speedup" if first.device == "cuda" else "cpu_speedup"]
        table.add_row(
            first.name,
            *where,
            *_size(network),
            *times,
            *speedups,
            MISSING if printed is None else f"{printed:.2f}",
            *[share(cell.get(one)) for one in ("fused", OPTIMIZED)],
            end_section=True,
        )
    table.caption = (
        "plain: the fastest of its three forms; a dense row's time stands under plain; identity: MoD blocks left "
        "out, the limit; x: over the dense network run alike (optimized over optimized); paper: on its machine; "
        "share: (fused - identity) / (plain - identity), with its 95% interval; optimized: all three optimized"
    )
    return table


def _sweep(rows: list[Row], results: Results) -> Table:
    table = Table(title="Networks over c (k = C // c), float32; median ms", show_edge=False)
    headings = ("network", "c", "N", "threads\nor mode", "M par.", "GMAC", "plain", "fused", "identity", "top-1 %")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        network = results.networks[f"{first.name} c={first.c}"]
        printed = network["paper"]
        table.add_row(
            first.name,
            str(first.c),
            str(first.batch),
            str(first.threads or first.mode),
            *_size(network),
            *[milliseconds(one) for one in (best_plain(cell), cell.get("fused"), cell.get("identity"))],
            MISSING if printed is None else f"{printed['top1']:.2f}",
        )
    table.caption = "plain: the fastest of its three forms; top-1: the paper's (Table 10), ImageNet"
    return table


def _sweep_blocks(rows: list[Row]) -> Table:
    from .providers import ENGINES, IN_PLACE, PLAIN

    table = Table(title="Their MoD blocks over c, by themselves; median ms", show_edge=False)
    for heading in ("block", "c", "N", "threads\nor mode", "plain", "fused", "floor", "plain/\nfused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in by_cell(rows).values():
        first = next(iter(cell.values()))
        plain, ours = best_plain(cell, PLAIN), cell.get(ENGINES[first.device] + IN_PLACE)
        timed = plain is not None and ours is not None and ours.median_ms is not None
        where = (first.name, str(first.c), str(first.batch), str(first.threads or first.mode))
        ratio = f"{plain.median_ms / ours.median_ms:.2f}" if timed else MISSING
        table.add_row(*where, milliseconds(plain), milliseconds(ours), milliseconds(cell.get("floor")), ratio)
    table.caption = "plain: the fastest of its three forms; fused: in place"
    return table


def _unmeasured(rows: list[Row]) -> dict[tuple[str, str], list[str]]:
    """Where there is no time: the cells by provider and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.check.startswith(("wrong", "left out")):
            at = "" if row.c is None else f" c={row.c}"
            found.setdefault((row.provider, row.check), []).append(f"{row.name}{at} N={row.batch}")
    return found


def _size(network: dict) -> tuple[str, str]:
    return f"{network['parameters'] / 1e6:.2f}", f"{network['multiply_adds'] / 1e9:.3f}"


def milliseconds(row: Row | None) -> str:
    """A way's median, or that its output was wrong."""
    if row is not None and row.check.startswith("wrong"):
        return "WRONG"
    return three_digits(None if row is None else row.median_ms)


def share(row: Row | None) -> str:
    """What a fused block costs of a plain one, and its interval."""
    return MISSING if row is None or row.share is None else "{:.2f} ({:.2f} to {:.2f})".format(*row.share)


def speedup(row: Row | None) -> str:
    """Over the dense network run alike."""
    return MISSING if row is None or row.speedup is None else f"{row.speedup[0]:.2f}"

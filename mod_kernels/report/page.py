"""The page: what could not be read, then machine by machine and suite by suite tables and pictures."""

from __future__ import annotations

from collections.abc import Callable

from ..bench.machine import signature
from ..bench.store import PAPER, Results, Row
from ..bench.table import MISSING, by_cell
from . import gallery, heatmap, paper, roofline, scaling
from .collect import Collected, Group, Machine
from .html import bullets, details, document, drawn, table, tag
from .pairs import three
from .picture import Picture

# Given a picture, its <svg>; None draws nothing.
Inline = Callable[[Picture], str] | None
TITLE = "mod_kernels: what was measured"
_SHADES = "above 1 ours is faster (blue), below 1 the plain form (orange)"


def page(collected: Collected, inline: Inline) -> str:
    runs = {id(group.run) for machine in collected.machines for group in machine.groups}
    rows = sum(len(group.rows) for machine in collected.machines for group in machine.groups)
    parts = [
        tag("h1", TITLE),
        tag(
            "p",
            f"From {collected.files} result files: {rows} rows of {len(runs)} runs. Of each device, dtype, "
            "layout, number of threads, mode and kind the newest run is shown. Times are medians; times of "
            "different machines do not compare.",
        ),
    ]
    if collected.problems:
        said = tag("strong", "Not everything could be read or drawn")
        parts.append(f'<section class="problems" id="problems">{said}{bullets(collected.problems)}</section>')
    parts.append(_contents(collected.machines))
    parts += [_machine(number, machine, inline) for number, machine in enumerate(collected.machines)]
    return document(TITLE, "\n".join(parts))


def _contents(machines: list[Machine]) -> str:
    items = []
    for number, machine in enumerate(machines):
        links = " ".join(tag("a", suite, href=f"#{_anchor(number, suite)}") for suite in machine.suites)
        items.append(f"<li>{tag('a', machine.name, href=f'#m{number}')}<p>{links}</p></li>")
    return f"<nav><ul>{''.join(items)}</ul></nav>"


def _anchor(number: int, suite: str) -> str:
    return f"m{number}-{suite.replace(' ', '-')}"


def _machine(number: int, machine: Machine, inline: Inline) -> str:
    parts = [tag("h2", machine.name, id=f"m{number}")]
    parts += _figures(roofline.pictures(machine), inline, signed=True)
    for suite, groups in machine.suites.items():
        parts.append(tag("h3", f"Suite {suite}", id=_anchor(number, suite)))
        runs = list({id(group.run): group.run for group in groups}.values())
        if len(runs) == 1:
            parts.append(_signed(runs[0]))
        with_bars: set[str] = set()
        for group in groups:
            # Bars of a kind once, run as its first group is: the tables have all, and so has a folder of pictures.
            again = gallery.has_bars(group) and group.first.kind in with_bars
            with_bars.add(group.first.kind)
            parts.append(tag("h4", f"{group.first.kind}: {group.where}"))
            if len(runs) > 1:
                parts.append(_signed(group.run))
            parts += _group(machine, group, None if again else inline)
        parts += _figures(gallery.of_memory(machine, suite), inline, signed=True)
    return f"<section>{''.join(parts)}</section>"


def _signed(run: Results) -> str:
    said = [tag("p", f"{signature(run.machine)}; {run.command}", class_="soft")]
    said += [tag("p", note, class_="soft") for note in run.notes]
    if run.interrupted:
        said.append(tag("p", "Interrupted: this is what was measured until then.", class_="soft"))
    return "".join(said)


def _group(machine: Machine, group: Group, inline: Inline) -> list[str]:
    parts = []
    heat = heatmap.data(group.rows)
    ratios = _heat_table(heat) if heat.cells else ""
    rest = _all_of_it(group) + _doubts(group)
    if group.first.kind == PAPER:
        parts.append(_paper_table(group))
    elif group.suite == "scaling":  # of its many shapes each has one batch size but the first
        parts.append(bullets(f"{curve.axis}: {curve.verdict}" for curve in scaling.data(group.rows)))
        rest = ratios + rest
    else:
        parts += [ratios] * bool(ratios)
    parts += _figures(gallery.of_group(machine, group), inline)
    parts.append(details("All that was measured", rest, is_open=not parts))
    return parts


def _figures(pictures: list[Picture], inline: Inline, signed: bool = False) -> list[str]:
    if inline is None:
        return []
    end = {True: lambda one: f"{one.title}. {signature(one.machine)}", False: lambda one: one.title}[signed]
    return [drawn(inline(picture), end(picture), picture.alt) for picture in pictures]


def _heat_table(heat: heatmap.Heat) -> str:
    rows = []
    for name in heat.rows:
        cells = [heat.cells.get((name, batch)) for batch in heat.columns]
        rows.append([name, *(MISSING if pair is None else _shaded(pair) for pair in cells)])
    caption = f"Fastest plain form's time over ours, geometric mean {heat.mean:.2f}; {_SHADES}"
    return table(["", *(f"N = {batch}" for batch in heat.columns)], rows, caption)


def _shaded(pair: heatmap.Pair) -> str:
    colour, opaque = heatmap.shade(pair.ratio)
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    style = f"background:rgba({red},{green},{blue},{opaque})"
    return tag("td", f"{pair.ratio:.2f}", style=style, title=heatmap.said(pair))


def _paper_table(group: Group) -> str:
    tables = []
    for batch, _, where in dict.fromkeys(map(paper.how, group.rows)):
        rows = []
        for line in paper.data([row for row in group.rows if row.batch == batch], group.run.networks):
            printed = MISSING if line.printed is None else f"{line.printed:.2f}"
            ours = [_interval(one) for one in (line.fused, line.optimized, line.plain, line.identity)]
            rows.append([line.network, printed, *ours])
        caption = (
            f"{where}: speed-up over the dense network run alike, with its 95% interval (optimized: over the "
            "dense network optimized); the paper's is of its own machine"
        )
        headings = ["network", "paper's", "fused", "optimized", "plain", "MoD blocks left out"]
        tables.append(table(headings, rows, caption))
    return "".join(tables)


def _interval(speedup: paper.Speedup | None) -> str:
    return MISSING if speedup is None else "{:.2f} ({:.2f} to {:.2f})".format(*speedup)


def _all_of_it(group: Group) -> str:
    """A line a cell, a column a provider: median ms, and MiB at the peak where that was measured."""
    providers = list(dict.fromkeys(row.provider for row in group.rows))
    cells = by_cell(group.rows)
    more = [name for name in ("k", "c") if any(getattr(row, name) for row in group.rows)]
    shared = list(dict.fromkeys(row.provider for row in group.rows if row.share))
    rows = []
    for cell in cells.values():
        first = next(iter(cell.values()))
        rows.append(
            [
                first.name,
                str(first.batch),
                *(str(getattr(first, name) or MISSING) for name in more),
                *(_value(cell.get(name)) for name in providers),
                *(_interval(cell[name].share if name in cell else None) for name in shared),
            ]
        )
    caption = "median ms; MiB at the peak" if any(row.peak_mib for row in group.rows) else "median ms"
    if shared:
        caption += "; share: (fused - identity) / (plain - identity), run alike, with its 95% interval"
    return table(["", "N", *more, *providers, *(f"share, {name}" for name in shared)], rows, caption)


def _value(row: Row | None) -> str:
    if row is None:
        return MISSING
    said = [three(row.median_ms)] if row.median_ms is not None else []
    said += [f"{row.peak_mib:.3g} MiB"] if row.peak_mib is not None else []
    doubt = "WRONG" if row.check.startswith("wrong") else " ?" if row.warning else ""
    return " / ".join(said) + doubt or MISSING


def _doubts(group: Group) -> str:
    """Where a time is missing or to be doubted, by reason."""
    found: dict[str, list[str]] = {}
    for row in group.rows:
        cell = f"{row.name} N={row.batch}"
        if row.check.startswith(("wrong", "left out")):
            found.setdefault(f"{row.provider}: {row.check}", []).append(cell)
        if row.warning:
            found.setdefault(f"? {row.provider}: {row.warning}", []).append(cell)
    return bullets(f"{reason} ({', '.join(cells)})" for reason, cells in found.items()) if found else ""

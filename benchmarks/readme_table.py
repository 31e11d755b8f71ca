"""README's tables, each made of the committed results that its marker names; part of `make figures`.

python -m benchmarks.readme_table
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from mod_kernels.bench.paper_table import DENSE, DENSE_OPTIMIZED, OPTIMIZED
from mod_kernels.bench.providers import COMPILED, IN_PLACE, PLAIN
from mod_kernels.bench.store import Row
from mod_kernels.bench.table import MISSING, by_cell, geometric_mean
from mod_kernels.bench.table_paper import best_plain, milliseconds, share, speedup
from mod_kernels.report.collect import Group, collect
from mod_kernels.report.gallery import has_bars
from mod_kernels.report.pairs import our_row

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_RUNTIMES = ("onnxruntime", "openvino")
_OF_NETWORKS = (
    "network", "GMAC", "dense", "plain", "fused", "optimized", *_RUNTIMES, "fused x", "optimized x", "paper x",
    "share of plain", "share, optimized",
)  # fmt: skip
_OF_BLOCKS = (
    "blocks", "how", "cells", "over plain clone", "over the best plain", "out of place over clone",
    "of the floor's time", "commit",
)  # fmt: skip


def main() -> None:
    README.write_text(filled(README.read_text()))


def filled(readme: str) -> str:
    """README's text with its tables made anew.

    Raises:
        ValueError: the markers around one of them are not there.
    """
    for name, table in _TABLES.items():
        marked = re.compile(rf"(<!-- {name}, from (\S+) -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        match = marked.search(readme)
        if match is None:
            raise ValueError(f"README.md has no markers around {name}")
        readme = readme[: match.start()] + match[1] + table(ROOT / match[2]) + match[3] + readme[match.end() :]
    return readme


def networks(file: Path) -> str:
    """A table a batch size, in it a line a network: medians in ms, and speed-ups over the dense peer run alike.

    Columns that the run has nothing for are left out.
    """
    (machine,) = collect([file]).machines
    return "".join(_of_batch(machine.name, group) for group in machine.suites["table"]) + "\n"


def _of_batch(machine: str, group: Group) -> str:
    lines = []
    for cell in by_cell(group.rows).values():
        fused, optimized = cell.get("fused"), cell.get(OPTIMIZED)
        name = next(iter(cell.values())).name
        network = group.run.networks[name]
        printed = network["paper"]["cpu_speedup"]
        lines.append(
            (
                name,
                f"{network['multiply_adds'] / 1e9:.2f}",
                f"{milliseconds(cell.get(DENSE))} / {milliseconds(cell.get(DENSE_OPTIMIZED))}",
                *(milliseconds(one) for one in (best_plain(cell), fused, optimized, *map(cell.get, _RUNTIMES))),
                *(speedup(one) for one in (fused, optimized)),
                MISSING if printed is None else f"{printed:.2f}",
                *(share(one) for one in (fused, optimized)),
            )
        )
    commit = str(group.run.machine["commit"])[:7]
    columns = [column for column in zip(_OF_NETWORKS, *lines, strict=True) if set(column[1:]) != {MISSING}]
    headings, *lines = zip(*columns, strict=True)
    return f"\nN = {group.first.batch}, {machine} (commit {commit}):\n\n" + _markdown(headings, lines)


def blocks(folder: Path) -> str:
    """A table a machine, of all result files in the folder; a line for each way its blocks were measured."""
    text = ""
    for machine in collect([folder]).machines:
        groups = [group for group in machine.groups if has_bars(group)]
        text += f"\n{machine.name}:\n\n" + _markdown(_OF_BLOCKS, map(group_line, groups))
    return text + "\n"


def group_line(group: Group) -> tuple[str, ...]:
    """What one way of measuring gave: means over its cells of shape and batch that have a time of ours."""
    cells = [(cell, our_row(cell)) for cell in by_cell(group.rows).values()]
    cells = [(cell, ours) for cell, ours in cells if ours is not None]
    clone = ("plain-clone",)

    def over(names: Iterable[str], time_of_ours: Callable[[dict[str, Row], Row], float | None]) -> list[float]:
        times = [(_fastest(cell, names), time_of_ours(cell, ours)) for cell, ours in cells]
        return [plain / ours for plain, ours in times if plain is not None and ours is not None]

    def headlined(cell: dict[str, Row], ours: Row) -> float | None:
        return ours.median_ms

    def out_of_place(cell: dict[str, Row], ours: Row) -> float | None:
        return _fastest(cell, [ours.provider.removesuffix(IN_PLACE)])

    # In training ours is out of place anyway, and what is kept as the floor is that of one pass, not of the block.
    inference = group.suite == "block"
    return (
        group.first.kind.replace("_", " "),
        group.where,
        str(len(cells)),
        _mean_and(min, over(clone, headlined)),
        _mean_and(min, over((*PLAIN, *COMPILED), headlined)),
        _mean_and(min, over(clone, out_of_place) if inference else []),
        _mean_and(max, [1 / one for one in over(["floor"], headlined)] if inference else []),
        str(group.run.machine["commit"])[:7],
    )


def _fastest(cell: dict[str, Row], names: Iterable[str]) -> float | None:
    return min((cell[name].median_ms for name in names if name in cell and cell[name].timed), default=None)


def _mean_and(worst: Callable[[list[float]], float], values: list[float]) -> str:
    return f"{geometric_mean(values):.2f} ({worst(values):.2f})" if values else MISSING


def _markdown(headings: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


_TABLES: dict[str, Callable[[Path], str]] = {
    "blocks": blocks,
    "the paper's table": networks,
    "the paper's table at N = 32": networks,
}


if __name__ == "__main__":
    main()

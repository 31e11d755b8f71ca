"""The paper's table in README.md, from the committed results that its first marker names; part of `make figures`.

python -m benchmarks.readme_table
"""

from __future__ import annotations

import re
from pathlib import Path

from mod_kernels.bench.paper_table import DENSE, DENSE_OPTIMIZED, OPTIMIZED
from mod_kernels.bench.store import PAPER, Results, Row, load
from mod_kernels.bench.table import by_cell
from mod_kernels.bench.table_paper import best_plain

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- the paper's table, from (\S+) -->\n).*?(<!-- end of the table -->)", re.DOTALL)
_RUNTIMES = ("onnxruntime", "openvino")
_HEADINGS = (
    "network", "GMAC", "dense", "plain", "fused", "optimized", *_RUNTIMES, "fused x", "optimized x", "paper x",
    "share of plain",
)  # fmt: skip


def main() -> None:
    README.write_text(filled(README.read_text()))


def filled(readme: str) -> str:
    """README's text with its table made anew.

    Raises:
        ValueError: its markers are not there.
    """
    match = _BLOCK.search(readme)
    if match is None:
        raise ValueError("README.md has no markers around the paper's table")
    table = markdown(load(ROOT / match[2]))
    return readme[: match.start()] + match[1] + table + match[3] + readme[match.end() :]


def markdown(results: Results) -> str:
    """A line a network: medians in ms, and speed-ups over the dense peer run alike."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---|" + "---|" * (len(_HEADINGS) - 1)]
    for cell in by_cell(row for row in results.rows if row.kind == PAPER).values():
        fused, optimized = cell.get("fused"), cell.get(OPTIMIZED)
        name = next(iter(cell.values())).name
        network = results.networks[name]
        printed = network["paper"]["cpu_speedup"]
        share = fused.share if fused is not None else None
        lines.append(
            "| "
            + " | ".join(
                (
                    name,
                    f"{network['multiply_adds'] / 1e9:.2f}",
                    f"{_ms(cell.get(DENSE))} / {_ms(cell.get(DENSE_OPTIMIZED))}",
                    *(_ms(one) for one in (best_plain(cell), fused, optimized, *map(cell.get, _RUNTIMES))),
                    *(_x(one) for one in (fused, optimized)),
                    "-" if printed is None else f"{printed:.2f}",
                    "-" if share is None else "{:.2f} ({:.2f} to {:.2f})".format(*share),
                )
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def _ms(row: Row | None) -> str:
    return "-" if row is None or row.median_ms is None else f"{row.median_ms:.3g}"


def _x(row: Row | None) -> str:
    return "-" if row is None or row.speedup is None else f"{row.speedup[0]:.2f}"


if __name__ == "__main__":
    main()

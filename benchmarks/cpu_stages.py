"""What pool, selector, top-k and tail cost apart, for every ISA level this machine runs.

    python -m benchmarks.cpu_stages [--json FILE] [--dtype float32] [--blocks KIND|all] [--batch N]

Compiles ``benchmarks/native/stages.cpp`` with the engine's own sources and flags, without torch, once for each
level; runs each on one thread; prints a table and keeps every figure in FILE: microseconds for the whole batch,
bytes that the stage can't avoid moving, floating-point operations, and beside them what reading memory, reading
the second-level cache and multiplying in registers reach in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mod_kernels.backends.native import KINDS, isa_levels
from mod_kernels.bench import machine

ROOT = Path(__file__).parents[1]
KERNELS = ("block", "fuse", "linear", "pool", "tail", "top_k")
WIDTH = 140  # the table's, whatever the terminal's
# As in setup.py, which can't be imported: it would build.
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--blocks", default="bottleneck", choices=(*KINDS, "all"))
    parser.add_argument("--batch", type=int, default=0, choices=(0, 1, 8, 32), help="0: all three")
    given = parser.parse_args()
    levels = {}
    with tempfile.TemporaryDirectory() as folder:
        for level in isa_levels():
            program = compiled(level, Path(folder))
            command = [program, given.dtype, given.blocks, str(given.batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            limits, *rows = map(json.loads, done.stdout.splitlines())
            levels[level] = {"limits": limits, "rows": rows}
            Console(width=WIDTH).print(table(level, limits, rows))
    if given.json:
        command = " ".join(["python -m benchmarks.cpu_stages", *sys.argv[1:]])
        kept = {"machine": machine.describe(), "command": command, "levels": levels}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(kept, indent=1) + "\n")


def compiled(level: str, folder: Path) -> Path:
    """The program for one level."""
    program = folder / f"stages_{level}"
    march = [] if level == "base" else [f"-march=x86-64-{level}"]
    sources = ["benchmarks/native/stages.cpp", *(f"csrc/cpu/{kernel}.cpp" for kernel in KERNELS)]
    subprocess.run(["c++", *FLAGS, *march, *sources, "-o", str(program)], check=True, cwd=ROOT)
    return program


def table(level: str, limits: dict, rows: list[dict]) -> Table:
    """A line for each block, batch and layout; in each stage's cell its time, and its rate against the limit."""
    title = (
        f"{level}: microseconds (GB/s, Gflop/s); memory {limits['memory_gb_s']:.0f} GB/s, "
        f"second-level cache {limits['l2_gb_s']:.0f} GB/s, multiply-adds {limits['peak_gflop_s']:.0f} Gflop/s"
    )
    drawn = Table("block", "N", "layout", title=title)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    for stage in stages:
        drawn.add_column(stage, justify="right")
    cells: dict[tuple, dict] = {}
    for row in rows:
        cells.setdefault((row["block"], row["n"], row["layout"]), {})[row["stage"]] = row
    for (block, batch, layout), found in cells.items():
        drawn.add_row(block, str(batch), layout, *(_cell(found[stage]) for stage in stages))
    return drawn


def _cell(row: dict) -> str:
    rates = f"{row['gb_s']:.0f}" if not row["flop"] else f"{row['gb_s']:.0f}, {row['gflop_s']:.0f}"
    return f"{row['us']:.1f} ({rates})"


if __name__ == "__main__":
    main()

"""The developer's regression gate: how much faster than plain PyTorch blocks are on one thread, never how fast.

    python -m pytest benchmarks                   this gate and the pytest-benchmark suite beside it
    python -m pytest benchmarks/test_ratios.py    the gate alone, ten seconds

Each cell is checked and timed by the benchmark's own suites, all providers interleaved: pytest-benchmark times one
function to its end and then the next, and what a neighbour does meanwhile falls on one of them.

The plain forms' fastest time over ours must be at least ``SHARE`` of what is committed for this kind of machine
under ``benchmarks/results/``, and where nothing is, at least 1. What falls short is measured once more: a
regression falls short again, a neighbour's burst seldom does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mod_kernels import backends
from mod_kernels.bench import blocks, machine, store, table, training
from mod_kernels.bench.providers import ENGINES, IN_PLACE, PLAIN
from mod_kernels.bench.shapes import BOTTLENECK, Shape

RESULTS = Path(__file__).parent / "results"
SHARE, TRIES = 0.7, 2
ENGINE = ENGINES["cpu"]
RUNS = {"block": blocks.run, "block-train": training.run}


@dataclass(frozen=True)
class Gate:
    """``ours`` against the fastest of ``plain`` in one cell."""

    suite: str
    shape: Shape
    batch: int
    ours: str
    plain: tuple[str, ...] = PLAIN

    def __str__(self) -> str:
        return f"{self.suite} {self.shape.name} N={self.batch} {self.ours}"


def _gates() -> list[Gate]:
    by_name = {shape.name: shape for shape in BOTTLENECK}
    gates = []
    for name, batch in (("512x28x28", 8), ("1024x14x14", 1), ("1024x14x14", 8), ("2048x7x7", 8)):
        gates.append(Gate("block", by_name[name], batch, ENGINE + IN_PLACE))
        # x is kept: against the forms that keep it as well.
        gates.append(Gate("block", by_name[name], batch, ENGINE, ("plain-clone", "plain-cat")))
    gates += [Gate("block-train", by_name[name], 8, ENGINE) for name in ("512x28x28", "1024x14x14")]
    return gates


GATES = _gates()


@functools.lru_cache(None)  # what is in place and what is not are of one measurement
def measured(suite: str, shape: Shape, batch: int, attempt: int) -> tuple[tuple, dict[str, store.Row]]:
    """The cell, and its rows by provider; each ``attempt`` measures anew."""
    plan = replace(blocks.quick(blocks.Plan((shape,), (batch,), (1,))), compile_batches=())
    results = store.Results({}, "", suite=suite)
    RUNS[suite](plan, results, lambda *_: None)
    ((cell, rows),) = table.by_cell(results.rows).items()
    return cell, rows


def committed(gate: Gate, cell: tuple, folder: Path) -> float | None:
    """The newest ratio of this cell in a folder of result files."""
    found = []
    for path in folder.glob("*.jsonl"):
        for run in store.read(path).runs:
            ratio = table.ratio(table.by_cell(run.rows).get(cell, {}), gate.plain, gate.ours)
            if ratio is not None:
                found.append((run.started, ratio))
    return max(found, default=(None, None))[1]


def shortfall(gate: Gate, rows: dict[str, store.Row], expected: float | None) -> str:
    """Why the gate is shut, or nothing; ``expected`` is the committed ratio, if there is one."""
    ours = rows.get(gate.ours)
    if ours is None or ours.check != "ok":
        return f"{gate.ours}: {ours.check if ours else 'not measured'}"
    ratio = table.ratio(rows, gate.plain, gate.ours)
    if ratio is None:
        return f"none of {', '.join(gate.plain)} has a time"
    floor, why = 1.0, "nothing is committed for this kind of machine"
    if expected is not None:
        floor, why = SHARE * expected, f"{SHARE:g} of the committed {expected:.2f}"
    return "" if ratio >= floor else f"{ratio:.2f} times as fast as plain, must be at least {floor:.2f}: {why}"


@functools.lru_cache(None)
def this_folder() -> Path:
    return RESULTS / machine.folder_name(machine.describe())


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_ratio(gate):
    status = backends.engines()[ENGINE]["status"]
    if status != "ok":
        pytest.skip(f"{ENGINE}: {status}")
    said = []
    for attempt in range(TRIES):
        cell, rows = measured(gate.suite, gate.shape, gate.batch, attempt)
        problem = shortfall(gate, rows, committed(gate, cell, this_folder()))
        if not problem:
            return
        said.append(problem)
    pytest.fail("; again: ".join(said), pytrace=False)

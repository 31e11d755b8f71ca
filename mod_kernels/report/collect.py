"""Result files read together: by machine, by suite, and of each group of rows the newest run that has it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bench.blocks import COLD
from ..bench.machine import folder_name, short_name
from ..bench.store import PAPER, Results, Row, machine_key, read
from ..bench.table import TRAIN

# In this order on the page; suites that are not named here follow.
ORDER = (
    "block",
    "block-train",
    "network",
    "network-train",
    "table",
    "sweep",
    "scaling",
    "memory",
    "profile",
    "ops",
    "overhead",
    "cold-start",
)
# What a machine's name, its folder and a signature are made of.
_OF_A_MACHINE = {
    "cpu": str,
    "cores": int | None,
    "isa": str,
    "caches": dict,
    "gpu": str | None,
    "torch": str,
    "triton": str | None,
    "commit": str | None,
    "date": str,
}
_WORDS = ("name", "kind", "device", "dtype", "layout", "mode", "cache", "provider", "check")


@dataclass(frozen=True)
class Group:
    """Rows of one run that differ in nothing but shape, batch size (not in the paper's table), k and provider."""

    suite: str
    run: Results
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def where(self) -> str:
        """``"float32, nchw, 1 thread"``; on a GPU the mode and the state of its L2."""
        row = self.first
        how = spelled_threads(row.threads) if row.threads else f"{row.device}, {row.mode}, L2 {row.cache}"
        how += ", cold inputs" * (row.threads is not None and row.cache == COLD)
        return f"{row.dtype}, {row.layout}, {how}" + (", forward and backward" if row.mode == TRAIN else "")


@dataclass
class Machine:
    """All that was measured on one machine."""

    name: str
    folder: str
    suites: dict[str, list[Group]] = field(default_factory=dict)
    # By suite, then by "network N=batch": the newest run that has the memory of a training step.
    memory: dict[str, dict[str, Results]] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        return [group for groups in self.suites.values() for group in groups]


@dataclass
class Collected:
    machines: list[Machine] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # sentences: what could not be read
    files: int = 0


def collect(paths: Sequence[Path]) -> Collected:
    """Read files, and all ``*.jsonl`` in and below folders.

    Never raises on what a file holds: what can't be read is a sentence of ``problems``, and so is a path that is
    not there.
    """
    found = Collected()
    runs: list[Results] = []
    for path in _files(paths, found.problems):
        try:
            contents = read(path)
        except OSError as error:
            found.problems.append(f"{path}: {error.strerror}")
            continue
        found.files += 1
        found.problems += contents.problems
        runs += [run for run in contents.runs if _signed(run, path, found.problems)]
    machines: dict[tuple, Machine] = {}
    folders: dict[str, int] = {}
    for run in sorted(
        runs, key=lambda run: str(run.started), reverse=True
    ):  # the newest first: it is there to stay
        key = machine_key(run.machine)
        if key not in machines:
            folder = folder_name(run.machine)
            folders[folder] = folders.get(folder, 0) + 1
            number = folders[folder]
            machines[key] = Machine(short_name(run.machine), folder if number == 1 else f"{folder}-{number}")
        _add(machines[key], run, found.problems)
    for machine in machines.values():
        for groups in machine.suites.values():
            groups.sort(key=lambda group: group_order(group.first))
        machine.suites = {name: machine.suites[name] for name in sorted(machine.suites, key=_place)}
    found.machines = sorted(machines.values(), key=lambda machine: machine.name)
    return found


def group_key(row: Row) -> tuple:
    # The batch sizes of the paper's table, hours together, may be measured one by one.
    batch = row.batch if row.kind == PAPER else None
    return (row.device, row.dtype, row.layout, row.threads, row.mode, row.cache, batch, row.kind)


def group_order(row: Row) -> tuple:
    """NCHW, few threads and small batches first."""
    how = (row.kind, row.layout != "nchw", row.dtype, row.threads or 0, row.device, row.mode, row.cache)
    return (*how, row.batch if row.kind == PAPER else 0)


def spelled_threads(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")


def _files(paths: Iterable[Path], problems: list[str]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            problems.append(f"{path} holds no *.jsonl")
        files += inside
    return list(dict.fromkeys(files))


def _signed(run: Results, path: Path, problems: list[str]) -> bool:
    lacking = [name for name, kind in _OF_A_MACHINE.items() if not isinstance(run.machine.get(name, ...), kind)]
    if lacking:
        problems.append(f"{path}: the run of {run.started} says nothing of {', '.join(lacking)}: left out")
    return not lacking


def _add(machine: Machine, run: Results, problems: list[str]) -> None:
    """Add the groups of ``run`` that no newer run had."""
    sound = [row for row in run.rows if _sound(row)]
    if len(sound) < len(run.rows):
        lost = len(run.rows) - len(sound)
        problems.append(f"suite {run.suite}, run of {run.started}: {lost} rows with impossible values left out")
    groups: dict[tuple, list[Row]] = {}
    for row in sound:
        groups.setdefault(group_key(row), []).append(row)
    known = machine.suites.setdefault(run.suite, []) if groups else []
    had = {group_key(group.first) for group in known}
    known += [Group(run.suite, run, tuple(rows)) for key, rows in groups.items() if key not in had]
    for cell in dict.fromkeys(key.rpartition(" ")[0] for key in run.memory):
        machine.memory.setdefault(run.suite, {}).setdefault(cell, run)


def _sound(row: Row) -> bool:
    """Whether the values are such that everything behind this may work with them."""
    words = all(isinstance(getattr(row, name), str) for name in _WORDS)
    times = (row.median_ms, row.q1_ms, row.q3_ms, row.peak_mib, row.bytes, row.bandwidth_gbs)
    return (
        words
        and _whole(row.batch)
        and all(value is None or _whole(value) for value in (row.threads, row.c, row.k))
        and all(value is None or _number(value) for value in times)
        and (row.median_ms is None or row.median_ms > 0)
        and all(value is None or len(value) == 3 for value in (row.share, row.speedup))
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _place(suite: str) -> tuple[int, str]:
    return (ORDER.index(suite) if suite in ORDER else len(ORDER), suite)

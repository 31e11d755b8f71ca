"""Result files: JSON lines, a run's machine and then what it measured; ``benchmarks/SCHEMA.md`` has the fields.

A file is only ever appended to, as cells are done: an interrupt loses the cell it falls in, and what was measured
before stays, of this run and of all runs before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SCHEMA = 2
# Kinds of rows of the paper's table and of the sweep, which are shown and drawn by themselves.
PAPER, SWEEP, SWEEP_BLOCK = "paper", "sweep", "sweep block"


@dataclass(frozen=True)
class Row:
    """One provider in one cell.

    ``check`` is ``"ok"``, ``"wrong: ..."``, ``"left out: ..."`` or, for what is not a provider of the block
    (the floor, the identity network), ``"none"``; a time is there only with ``"ok"`` and ``"none"``.
    """

    name: str  # a shape ("256x56x56") or a network
    kind: str  # of mod_kernels.spec.CONV_KINDS, "network", or the name of an op
    batch: int
    threads: int | None  # None on a GPU
    device: str
    dtype: str
    mode: str  # "eager", "graph" (inside a CUDA graph) or "train" (forward and backward)
    cache: str  # "warm", or "cold": the L2 flushed before each call (GPU), inputs rotated (CPU)
    provider: str
    check: str
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    samples: int = 0
    repeats: int = 0
    over_identity_ms: float | None = None  # networks: median over the rounds of its time less the identity's
    # Networks, ours: (fused - identity) / (plain - identity), and the ends of its 95% confidence interval.
    share: tuple[float, float, float] | None = None
    layout: str = "nchw"  # of x
    peak_mib: float | None = None  # what a call holds at its peak beyond what was held before it, see memory.py
    # torch.compile: seconds of the first call, without starting the compiler; the same in all cells that share it.
    compile_s: float | None = None
    # The paper's table: the dense peer's time over this one's, and the ends of its 95% confidence interval.
    speedup: tuple[float, float, float] | None = None
    c: int | None = None  # the sweep: k = C // c
    k: int | None = None  # channels processed, where it is not the paper's
    bytes: int | None = None  # what can't be avoided moving
    bandwidth_gbs: float | None = None  # measured in the same run: bytes at this rate are the limit
    warning: str | None = None  # outliers, drift: why the time is to be doubted

    @property
    def cell(self) -> tuple:
        """What rows compared with each other have in common."""
        run = (self.device, self.dtype, self.layout, self.mode, self.cache)
        return (self.kind, self.name, self.batch, self.threads, *run, self.c, self.k)

    @property
    def limit_ms(self) -> float | None:
        """The bytes that can't be avoided at the bandwidth measured; in cache a kernel can beat it."""
        return self.bytes / self.bandwidth_gbs / 1e6 if self.bytes and self.bandwidth_gbs else None

    @property
    def timed(self) -> bool:
        return self.median_ms is not None


@dataclass
class Results:
    """All that one run of a suite leaves."""

    machine: dict[str, Any]
    command: str
    rows: list[Row] = field(default_factory=list)
    bandwidth_gbs: dict[str, float] = field(default_factory=dict)  # by thread count, "gpu" on a GPU
    notes: list[str] = field(default_factory=list)
    # Networks in training: "network N=batch provider" -> memory over a step (memory.Timeline.points).
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    # The paper's table and the sweep, by network: parameters, multiply-adds, what the paper printed, and more that
    # is said of it beside its times.
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    interrupted: bool = False  # read from a file: also where the run's end is not in it
    suite: str = "block"
    finished: list[str] = field(default_factory=list)  # the cells that are done, by their labels
    # When, in UTC: what tells a run from the others of its file.
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())


class Journal:
    """Appends to one file what a run has found since the last time; the file's folder is made.

    Raises:
        OSError: the file can't be written; raised before anything is measured.
    """

    def __init__(self, path: Path, results: Results, resumed: bool = False) -> None:
        self.path, self._results = path, results
        path.parent.mkdir(parents=True, exist_ok=True)
        # What was cut off in the middle of a line must not take the next line with it.
        whole = not path.exists() or path.stat().st_size == 0 or path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if not whole:
            self._file.write("\n")
        head = {"machine": results.machine, "command": results.command, "suite": results.suite}
        self._written: dict[str, str] = {}
        if resumed:
            for line in _lines(results):
                self._written[_key(line)] = json.dumps(line)
            self._append([{"record": "resumed"}])
        else:
            self._append([{"record": "run", **head}])
        self.write()

    def write(self) -> None:
        """Append what is new or has changed."""
        fresh = []
        for line in _lines(self._results):
            key, text = _key(line), json.dumps(line)
            if self._written.get(key) != text:
                self._written[key] = text
                fresh.append(line)
        self._append(fresh)

    def close(self) -> None:
        """Append the rest, and how the run ended."""
        self.write()
        self._append([{"record": "end", "interrupted": self._results.interrupted}])
        self._file.close()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            text = json.dumps({"schema": SCHEMA, "run": self._results.started, **line})
            self._file.write(text + "\n")
        self._file.flush()


def save(results: Results, path: Path) -> None:
    """Append a run that is over."""
    Journal(path, results).close()


@dataclass
class Contents:
    """What a file holds: its runs, oldest first, and what could not be read of it."""

    runs: list[Results] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def machines(self) -> list[tuple]:
        """Of how many machines the runs are; more than one are not to be compared."""
        return list(dict.fromkeys(machine_key(run.machine) for run in self.runs))


def machine_key(machine: dict[str, Any]) -> tuple:
    """What two runs on one machine have in common. A virtual processor has no number: its first cache helps."""
    caches = machine.get("caches")
    level1 = caches.get("L1 Data") if isinstance(caches, dict) else None
    return (*(machine.get(part) for part in ("gpu", "cpu", "cores", "isa")), level1)


def read(path: Path) -> Contents:
    """Everything of a result file that can be read, with a sentence for all that can't.

    Raises:
        OSError: the file is not there, or may not be read.
    """
    contents = Contents()
    runs: dict[str, Results] = {}
    foreign: dict[str, int] = {}
    lost, unreadable = 0, []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            schema = data["schema"]
        except (ValueError, TypeError, KeyError):
            unreadable.append(number)
            continue
        if schema != SCHEMA:
            foreign[repr(schema)] = foreign.get(repr(schema), 0) + 1
            continue
        try:
            lost += not _take(data, runs)
        except (ValueError, TypeError, KeyError) as error:
            said = f"{type(error).__name__}: {error}"
            contents.problems.append(f"{path} line {number} is no record of schema {SCHEMA} ({said}): left out")
    contents.runs = list(runs.values())
    if len(unreadable) == 1:
        contents.problems.append(f"{path} line {unreadable[0]} is cut off or no record: left out")
    elif unreadable:
        said = f"{path}: {len(unreadable)} lines are cut off or no records, the first is line {unreadable[0]}"
        contents.problems.append(f"{said}: left out")
    for schema, count in foreign.items():
        contents.problems.append(
            f"{path}: {count} lines of schema {schema} left out, "
            f"this version reads {SCHEMA} (benchmarks/SCHEMA.md)"
        )
    if lost:
        contents.problems.append(f"{path}: {lost} lines belong to no run in it: left out")
    if len(contents.machines) > 1:
        names = "; ".join(" ".join(str(part) for part in key if part) for key in contents.machines)
        contents.problems.append(f"{path} mixes {len(contents.machines)} machines: {names}")
    return contents


def load(path: Path) -> Results:
    """The newest run of a file in which everything can be read.

    Raises:
        ValueError: there is something in it that :func:`read` could not read, or no run.
    """
    contents = read(path)
    if contents.problems or not contents.runs:
        raise ValueError("; ".join(contents.problems) or f"{path} holds no run")
    return contents.runs[-1]


def _lines(results: Results) -> Iterator[dict[str, Any]]:
    """All records of a run but the first and the last. A record is told from others by what :func:`_key` takes."""
    for key, gbs in results.bandwidth_gbs.items():
        yield {"record": "bandwidth", "key": key, "gbs": gbs}
    for row in results.rows:
        kept = {one.name: getattr(row, one.name) for one in fields(Row)}
        # What says nothing is left out; the default is read again.
        kept = {
            name: value for name, value in kept.items() if _DEFAULTS[name] is MISSING or value != _DEFAULTS[name]
        }
        yield {"record": "row", **kept}
    for note in results.notes:
        yield {"record": "note", "key": note}
    for key, points in results.memory.items():
        yield {"record": "memory", "key": key, "points": points}
    for key, said in results.networks.items():
        yield {"record": "network", "key": key, "said": said}
    for label in results.finished:
        yield {"record": "cell", "key": label}


_DEFAULTS = {one.name: one.default for one in fields(Row)}


def _key(line: dict[str, Any]) -> str:
    return f"{line['record']} {line['key'] if 'key' in line else json.dumps(line)}"


def _take(data: dict[str, Any], runs: dict[str, Results]) -> bool:
    """Add one line to its run; False where there is none."""
    record, started = data["record"], data["run"]
    if record == "run":
        if not isinstance(data["machine"], dict):
            raise TypeError(f"machine must be an object, got {data['machine']!r}")
        # Until its end is read: a process that was killed wrote none.
        runs[started] = Results(
            data["machine"], data["command"], suite=data["suite"], started=started, interrupted=True
        )
        return True
    run = runs.get(started)
    if run is None:
        return False
    if record == "row":
        known = {name: value for name, value in data.items() if name in _DEFAULTS}
        for name in ("share", "speedup"):
            if known.get(name) is not None:
                known[name] = tuple(known[name])
        run.rows.append(Row(**known))
    elif record == "bandwidth":
        run.bandwidth_gbs[data["key"]] = data["gbs"]
    elif record == "note":
        run.notes.append(data["key"])
    elif record == "memory":
        run.memory[data["key"]] = [tuple(point) for point in data["points"]]
    elif record == "network":
        run.networks[data["key"]] = data["said"]
    elif record == "cell":
        run.finished.append(data["key"])
    elif record == "end":
        run.interrupted = data["interrupted"]
    elif record == "resumed":
        run.interrupted = True
    else:
        raise ValueError(f"record {record!r}")
    return True

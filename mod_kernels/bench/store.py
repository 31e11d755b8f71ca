"""Result files: JSON with the machine, the command and one row per provider and cell."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
# Kinds of rows of the paper's table and of the sweep, which are shown and drawn by themselves.
PAPER, SWEEP, SWEEP_BLOCK = "paper", "sweep", "sweep block"


@dataclass(frozen=True)
class Row:
    """One provider in one cell.

    ``check`` is ``"ok"``, ``"wrong: ..."``, ``"left out: ..."`` or, for what is not a provider of the block
    (the floor, the identity network), ``"none"``; a time is there only with ``"ok"`` and ``"none"``.
    """

    name: str  # a shape ("256x56x56") or a network
    kind: str  # of mod_kernels.spec.CONV_KINDS, or "network"
    batch: int
    threads: int | None  # None on a GPU
    device: str
    dtype: str
    mode: str  # "eager", "graph" (inside a CUDA graph) or "train" (forward and backward)
    cache: str  # "warm", or "cold" where the L2 is flushed before each call
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
    layout: str = "nchw"  # of x; files from before there was a choice do not say
    peak_mib: float | None = None  # networks in training: what a step holds at its peak, see memory.py
    # torch.compile: seconds of the first call, without starting the compiler; the same in all cells that share it.
    compile_s: float | None = None
    # The paper's table: the dense peer's time over this one's, and the ends of its 95% confidence interval.
    speedup: tuple[float, float, float] | None = None
    c: int | None = None  # the sweep: k = C // c

    @property
    def cell(self) -> tuple:
        """What rows compared with each other have in common."""
        run = (self.device, self.dtype, self.layout, self.mode, self.cache)
        return (self.kind, self.name, self.batch, self.threads, *run, self.c)


@dataclass
class Results:
    """All that one run of the benchmark leaves."""

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
    interrupted: bool = False


def save(results: Results, path: Path) -> None:
    """Write ``results``; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, **asdict(results)}, indent=1) + "\n")


def load(path: Path) -> Results:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: the file's schema is not this version's.
    """
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {data.get('schema')!r}")
    known = {one.name for one in fields(Results)}
    data = {key: value for key, value in data.items() if key in known}
    return Results(**{**data, "rows": [Row(**row) for row in data["rows"]]})

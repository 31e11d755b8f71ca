"""Two result files held against each other: which speed-ups over plain PyTorch changed, and by how much.

What is judged is the fastest plain form's time over ours, both of one run: ratios of interleaved times travel from
day to day and from machine to machine, absolute times do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from .paper_table import OPTIMIZED
from .providers import BESIDE, ENGINES, FED, IN_PLACE
from .store import Results, Row, machine_key
from .table import by_cell

_ENGINES = {*ENGINES.values(), *(engine for beside in BESIDE.values() for engine in beside)}
OURS = {engine + ending for engine in _ENGINES for ending in ("", IN_PLACE, FED)} | {"fused", OPTIMIZED}
AGREEING = 0.1  # ratios this close to 1 are said to agree


@dataclass(frozen=True)
class Speedup:
    """The fastest plain form's median over ours; ``low`` and ``high`` are of the quartiles furthest apart."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One provider of ours in one cell, in two files."""

    row: Row  # of the second file; of the first where the second has none
    before: Speedup | None
    after: Speedup | None = None
    times: float | None = None  # the second median over the first, on one machine
    lost: str = ""  # right in the first file; what the second says instead

    @property
    def ratio(self) -> float:
        """The second speed-up over the first: below 1 is worse."""
        return self.after.value / self.before.value

    @property
    def significant(self) -> bool:
        """The two intervals do not overlap."""
        return self.after.high < self.before.low or self.before.high < self.after.low


@dataclass
class Comparison:
    """What two files have in common, and sentences on what was not compared."""

    threshold: float
    changes: list[Change] = field(default_factory=list)  # those with a speed-up in both files
    lost: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def verdict(self, change: Change) -> str:
        """``"regression"``, ``"slower"`` (by no more than the threshold), ``"faster"``, or nothing where the
        quartiles overlap."""
        if not change.significant:
            return ""
        if change.ratio < 1 - self.threshold:
            return "regression"
        return "slower" if change.ratio < 1 else "faster"

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if self.verdict(change) == "regression"] + self.lost

    def summary(self) -> str:
        """One line: how much was compared, and what came out."""
        cells = len({change.row.cell for change in (*self.changes, *self.lost)})
        said = f"cells compared: {cells}, ratios: {len(self.changes)}"
        if self.changes:
            ratios = [change.ratio for change in self.changes]
            agreeing = sum(abs(one - 1) <= AGREEING for one in ratios) / len(ratios)
            said += f" (median {median(ratios):.3f}, {agreeing:.0%} agree within {AGREEING:.0%})"
        significant = sum(change.significant for change in self.changes)
        return f"{said}; significant changes: {significant}, regressions: {len(self.regressions)}"


def compare(first: Sequence[Results], second: Sequence[Results], threshold: float) -> Comparison:
    """``first`` and ``second``: runs of a file each, oldest first, at least one.

    Of each file the newest of every provider in every cell counts, of the newest run's machine. A cell is compared
    with the same cell of the same suite. A provider that was right in the first file, and that the second one's
    cell has wrong or not at all, is lost; a cell that the second file does not have was not measured, no more.
    """
    found = Comparison(threshold)
    first, second = (_one_machine(runs, name, found) for runs, name in ((first, "first"), (second, "second")))
    same = machine_key(first[-1].machine) == machine_key(second[-1].machine)
    if not same:
        found.notes.append("the two files are of different machines: only the ratios to plain are compared")
    before, after = _newest(first), _newest(second)
    measured = {key[:2] for key in after}
    unmeasured, unjudged = set(), 0
    for key, (row, speedup) in before.items():
        if row.provider not in OURS or row.check != "ok":
            continue
        if key[:2] not in measured:
            unmeasured.add(key[:2])
            continue
        now, speedup_now = after.get(key, (None, None))
        if now is None or now.check != "ok":
            found.lost.append(Change(now or row, speedup, lost=now.check if now else "missing"))
        elif speedup is None or speedup_now is None:
            unjudged += 1
        else:
            times = now.median_ms / row.median_ms if same else None
            found.changes.append(Change(now, speedup, speedup_now, times))
    if unmeasured:
        found.notes.append(f"cells of the first file that the second does not have: {len(unmeasured)}")
    if unjudged:
        found.notes.append(f"times without a plain form's or without quartiles, not compared: {unjudged}")
    return found


def _one_machine(runs: Sequence[Results], name: str, found: Comparison) -> list[Results]:
    newest = machine_key(runs[-1].machine)
    kept = [run for run in runs if machine_key(run.machine) == newest]
    if len(kept) < len(runs):
        machine = " ".join(str(part) for part in newest if part)
        left = len(runs) - len(kept)
        found.notes.append(f"of the {name} file only the runs on {machine}; runs on others left out: {left}")
    return kept


def _newest(runs: Sequence[Results]) -> dict[tuple, tuple[Row, Speedup | None]]:
    """By suite, cell and provider; each speed-up is over plain times of the row's own run."""
    found = {}
    for run in runs:
        for cell, rows in by_cell(run.rows).items():
            plain = [row for name, row in rows.items() if _is_plain(name) and row.check == "ok" and row.timed]
            fastest = min(plain, key=lambda row: row.median_ms, default=None)
            for provider, row in rows.items():
                found[run.suite, cell, provider] = row, _speedup(fastest, row)
    return found


def _is_plain(provider: str) -> bool:
    return provider == "plain" or provider.startswith("plain-")


def _speedup(plain: Row | None, ours: Row) -> Speedup | None:
    """None where a time or a quartile is missing."""
    if plain is None or not all((plain.q1_ms, plain.q3_ms, ours.median_ms, ours.q1_ms, ours.q3_ms)):
        return None
    return Speedup(plain.median_ms / ours.median_ms, plain.q1_ms / ours.q3_ms, plain.q3_ms / ours.q1_ms)

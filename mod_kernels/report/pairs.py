"""The two sides of every comparison: the fastest plain form of a cell, and ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..bench.networks import PLAIN_FORMS
from ..bench.providers import ENGINES, IN_PLACE, PLAIN
from ..bench.store import Row
from ..bench.table import TRAIN, by_cell

_PLAIN = tuple(dict.fromkeys((*PLAIN, *PLAIN_FORMS, "plain")))


@dataclass(frozen=True)
class Pair:
    """A cell that both were timed in."""

    plain: Row
    ours: Row

    @property
    def ratio(self) -> float:
        """How often ours fits into the time of the plain form; above 1 it is faster."""
        return self.plain.median_ms / self.ours.median_ms


def pairs(rows: Iterable[Row]) -> list[Pair]:
    """Of every cell that has both, in the order they came.

    Rows of single ops, whose providers are ``"<op>:plain"`` and so on, are taken op by op: in what is returned
    their names begin with the op's.
    """
    found = []
    for cell in by_cell(map(_named_by_op, rows)).values():
        plain, ours = fastest_plain(cell), our_row(cell)
        if plain is not None and ours is not None:
            found.append(Pair(plain, ours))
    return found


def fastest_plain(cell: dict[str, Row]) -> Row | None:
    timed = [cell[name] for name in _PLAIN if name in cell and cell[name].timed]
    return min(timed, key=lambda row: row.median_ms, default=None)


def our_row(cell: dict[str, Row]) -> Row | None:
    """Ours as it is headlined: in place, but in training, where nothing may be; a whole network, accelerated.

    Never the one that is handed x's means: no plain form is.
    """
    first = next(iter(cell.values()))
    engine = ENGINES.get(first.device, first.device)
    forms = (engine,) if first.mode == TRAIN else (engine + IN_PLACE, engine)
    return next((cell[name] for name in (*forms, "fused") if name in cell and cell[name].timed), None)


def size_of(name: str) -> tuple[int, int, int] | None:
    """C, H, W of ``"256x56x56"``; None of another name."""
    parts = name.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        return None
    return int(parts[0]), int(parts[1]), int(parts[2])


def three(value: float) -> str:
    """Three figures, and never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.5f}"


def _named_by_op(row: Row) -> Row:
    op, colon, provider = row.provider.partition(":")
    return replace(row, name=f"{op} {row.name}", provider=provider) if colon else row

"""How every suite goes through its cells: finished ones are skipped, each is announced, pinned and kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .store import Results, Row

Cell = TypeVar("Cell")
# Called before a cell with its label, its number and how many there are.
OnCell = Callable[[str, int, int], None]


def run_cells(
    planned: Sequence[Cell],
    results: Results,
    on_cell: OnCell,
    measure: Callable[[Cell], list[Row]],
    budget_s: float = float("inf"),
    passes: int = 1,
) -> None:
    """``measure`` each cell into ``results``, on as many threads as its ``threads`` says (None: left as they are).

    ``str(cell)`` is its label: a cell that ``results.finished`` has is not measured again. Past ``budget_s`` no
    new cell begins, and a note says which are missing. What an interrupt leaves is whole cells.

    Several ``passes`` go through all cells as often; each time ``measure`` gives the rows of all that it has
    measured of the cell so far. What the clock or an interrupt ends early leaves those of the passes before.
    """
    started, threads_before = time.monotonic(), torch.get_num_threads()
    done = set(results.finished)
    labelled = [(str(cell), cell) for cell in planned if str(cell) not in done]
    skipped = len(planned) - len(labelled)
    so_far: dict[str, list[Row]] = {}
    try:
        for turn, (number, (label, cell)) in itertools.product(range(passes), enumerate(labelled)):
            if time.monotonic() - started > budget_s:
                left = [label for label, _ in labelled[number:]]
                results.notes.append(_out_of_time(budget_s, turn, passes, left))
                return
            on_cell(label, skipped + turn * len(labelled) + number, skipped + passes * len(labelled))
            if cell.threads is not None:
                torch.set_num_threads(cell.threads)
            so_far[label] = measure(cell)
            if turn == passes - 1:
                _keep(label, so_far, results)
    finally:
        torch.set_num_threads(threads_before)
        for label in list(so_far):
            _keep(label, so_far, results)


def _keep(label: str, so_far: dict[str, list[Row]], results: Results) -> None:
    results.rows += so_far.pop(label)
    results.finished.append(label)


def _out_of_time(budget_s: float, turn: int, passes: int, left: list[str]) -> str:
    if turn == 0:
        return f"out of time ({budget_s:.0f} s), not measured: {', '.join(left)}"
    return f"out of time ({budget_s:.0f} s) in pass {turn + 1} of {passes}, before {left[0]}"

"""How every suite goes through its cells: finished ones are skipped, each is announced, pinned and kept."""

from __future__ import annotations

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
) -> None:
    """``measure`` each cell into ``results``, on as many threads as its ``threads`` says (None: left as they are).

    ``str(cell)`` is its label: a cell that ``results.finished`` has is not measured again. Past ``budget_s`` no
    new cell begins, and a note says which are missing. What an interrupt leaves is whole cells.
    """
    started, threads_before = time.monotonic(), torch.get_num_threads()
    labels = [str(cell) for cell in planned]
    done = set(results.finished)
    try:
        for number, (cell, label) in enumerate(zip(planned, labels, strict=True)):
            if label in done:
                continue
            if time.monotonic() - started > budget_s:
                left = ", ".join(one for one in labels[number:] if one not in done)
                results.notes.append(f"out of time ({budget_s:.0f} s), not measured: {left}")
                return
            on_cell(label, number, len(planned))
            if cell.threads is not None:
                torch.set_num_threads(cell.threads)
            results.rows += measure(cell)
            results.finished.append(label)
    finally:
        torch.set_num_threads(threads_before)

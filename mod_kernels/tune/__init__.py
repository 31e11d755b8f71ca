"""``mod-kernels tune``: which numbers of the Triton kernels' tuning are the fastest on this GPU, kept in a file.

Opt-in: without it every GPU takes the tuning of its architecture (:mod:`mod_kernels.backends.triton.tuning`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends.triton import in_force, tuning_file
from ..bench.shapes import BASIC, BOTTLENECK, Shape
from .cells import Cell, cells_of, make_inputs
from .gpu_timer import graph_timer
from .search import OutOfTime, Search, Verdict

SHAPES = {shape.name: shape for shape in (*BOTTLENECK, *BASIC)}
# A single image, what a server batches, and a batch beyond ``batch_samples``.
BATCHES = (1, 8, 32, 128)


class Tuned(NamedTuple):
    """``complete``: there was time for every candidate. ``changes``: to the architecture's tuning, in words."""

    path: Path
    complete: bool
    changes: str


def tune(
    shapes: Iterable[Shape],
    batches: Iterable[int],
    dtypes: Iterable[torch.dtype],
    budget_s: float,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> Tuned:
    """Search on the current CUDA device, both layouts, and write what was found; the next process takes it.

    It starts from the architecture's tuning, not from a file that is there. An exception, KeyboardInterrupt too,
    leaves that file as it is.
    """
    deadline = time.monotonic() + budget_s

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise OutOfTime

    device = torch.cuda.current_device()
    gpu, triton = in_force.names(device)
    found = Search(in_force.built_in(device), all_cells(shapes, batches, dtypes), graph_timer, device, check_time)
    with torch.inference_mode():
        complete = found.run(on_verdict=on_verdict)
    path = tuning_file.path_of(gpu, triton)
    kept = [str(verdict) for verdict in found.verdicts if verdict.kept]
    tuning_file.save(path, found.best, gpu, triton, kept)
    return Tuned(path, complete, in_force.changes(found.best, found.start))


def all_cells(
    shapes: Iterable[Shape], batches: Iterable[int], dtypes: Iterable[torch.dtype], device: str = "cuda"
) -> list[Cell]:
    """Every op on every combination, in both layouts."""
    return [
        cell
        for dtype in dtypes
        for shape in shapes
        for batch in batches
        for inputs in make_inputs(shape, batch, dtype, device)
        for cell in cells_of(inputs)
    ]

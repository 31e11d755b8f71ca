"""Whole networks in training: a forward and a backward of plain, fused, and with the MoD blocks left out.

The optimiser's step is not in it: it is the same for all. On a CPU only, so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._tolerances import relative_norm
from ..backends import use_backend
from .cells import OnCell, run_cells
from .memory import timeline
from .networks import Cell, build, compare, median_difference_ms, share_of_plain
from .store import Results, Row
from .timing import CpuClock, Timed, measure, on_round_of

NETWORKS = ("resnet50_mod", "resnet75_mod")
BATCHES = (8,)
# Of the gradients of two right runs, taken together as one vector: some seventy float32 layers there and back.
GRADIENTS = 1e-2


@dataclass(frozen=True)
class TrainingCell(Cell):
    mode: str = "training"

    def __str__(self) -> str:
        return f"{self.name} training N={self.batch} {self.threads} thread(s)"


def run(
    names: tuple[str, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    results: Results,
    on_cell: OnCell,
    dtype: torch.dtype = torch.float32,
    size: int = 224,
    rounds: int = 30,
) -> None:
    """Measure networks into ``results``, cell by cell."""
    planned = [TrainingCell(name, batch, count) for count in threads for name in names for batch in batches]

    def measured(cell: TrainingCell) -> list[Row]:
        return run_cell(cell.name, cell.batch, cell.threads, dtype, size, rounds, results)

    run_cells(planned, results, on_cell, measured)


class Step:
    """Forward, cross entropy, backward; the gradients of all parameters are fresh tensors."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.model, self._image = model, image
        self._labels = torch.arange(len(image)) % 1000
        self._parameters = [one for one in model.parameters() if one.requires_grad]

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.inference_mode(False), torch.enable_grad():
            y = self.model(self._image)
            return y.detach(), torch.autograd.grad(F.cross_entropy(y, self._labels), self._parameters)


def run_cell(
    name: str, batch: int, threads: int, dtype: torch.dtype, size: int, rounds: int, results: Results
) -> list[Row]:
    """One network at one batch size: outputs and gradients against the reference's, times, memory over a step."""
    image = torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(1)).to(dtype)
    steps = {name: Step(model, image) for name, model in build(name, "cpu", dtype, training=True).items()}
    with use_backend("reference"):
        expected = steps["fused"].run()
    checks = {
        name: "none" if name == "identity" else _check(step.run(), expected, dtype) for name, step in steps.items()
    }
    del expected
    right = {name: step for name, step in steps.items() if not checks[name].startswith("wrong")}
    timed = {name: Timed(name, step.run) for name, step in right.items()}
    measure(list(timed.values()), CpuClock(), rounds, budget_s=400.0, on_round=on_round_of("cpu"))
    rows = []
    text = str(dtype).removeprefix("torch.")
    row = partial(Row, name, "network", batch, threads, "cpu", text, "train", "warm")
    for provider, check in checks.items():
        if provider not in timed:
            rows.append(row(provider, check))
            continue
        one = timed[provider]
        low, median, high = one.quartiles()
        share = share_of_plain(timed) if provider == "fused" else None
        line = timeline(right[provider].run)
        results.memory[f"{name} N={batch} {provider}"] = line.points
        times = {"median_ms": median, "q1_ms": low, "q3_ms": high, "samples": len(one.samples)}
        times |= {"repeats": one.repeats, "warning": one.warning()}
        times |= {"over_identity_ms": median_difference_ms(one, timed["identity"])}
        rows.append(row(provider, check, share=share, peak_mib=line.peak_mib, **times))
    return rows


def _check(found: tuple, expected: tuple, dtype: torch.dtype) -> str:
    (y, gradients), (expected_y, expected_gradients) = found, expected
    said = compare(y, expected_y, dtype)
    if said != "ok":
        return said
    together, wanted = (torch.cat([one.flatten() for one in all_]) for all_ in (gradients, expected_gradients))
    error = relative_norm(together, wanted)
    return "ok" if error <= GRADIENTS else f"wrong: gradients off by {error:.1e} from the reference's"

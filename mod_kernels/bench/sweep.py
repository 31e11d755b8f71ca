"""Choosing k: what a network and its MoD blocks cost at each c (k = C // c), beside known accuracies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from .. import models
from ..spec import MoDSpec
from . import blocks, networks, paper, paper_table
from .compiled import Compiler
from .shapes import FORMATS, Shape
from .store import SWEEP, SWEEP_BLOCK, Results, Row

NETWORK = "resnet50_mod"
CS = tuple(paper.RESNET50_MOD_AT_C)
ROUNDS, BLOCK_ROUNDS = 100, 40


@dataclass(frozen=True)
class ShapeAtC(Shape):
    """A block whose k is not the paper's."""

    c: int = 64

    @property
    def k(self) -> int:
        return max(1, self.channels // self.c)


def run(
    name: str,
    cs: tuple[int, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    results: Results,
    on_cell: Callable[[str, int, int], None],
    device: str = "cpu",
    rounds: int = ROUNDS,
    block_rounds: int = BLOCK_ROUNDS,
) -> None:
    """Measure into ``results``: at each c the network, then each kind of MoD block in it by itself.

    ``on_cell`` gets a label, the number and the count.

    Raises:
        ValueError: a name that :func:`mod_kernels.models.list_models` does not have.
    """
    data = paper.data_of(name)
    shapes = mod_shapes(name, data)
    runs = [(count, "eager") for count in threads] if device == "cpu" else [(None, "eager"), (None, "graph")]
    cells = [(c, batch, *how) for how in runs for batch in batches for c in cs]
    threads_before = torch.get_num_threads()
    number = -1

    def begin(label: str) -> None:
        nonlocal number
        number += 1
        on_cell(label, number, len(cells) * (1 + len(shapes)))

    try:
        for c, batch, count, mode in cells:
            where = f"c={c} N={batch} " + (f"{count} thread(s)" if count else mode)
            begin(f"{name} {where}")
            if count is not None:
                torch.set_num_threads(count)
            results.networks[f"{name} c={c}"] = describe(name, c, data)
            dtype = torch.float32
            rows = networks.run_cell(
                name, batch, count, mode, device, dtype, data.size, rounds, c=c, **data.options
            )
            results.rows += [replace(row, kind=SWEEP, c=c) for row in rows]
            for shape in shapes:
                begin(f"{shape.name} {where}")
                at_c = ShapeAtC(shape.kind, shape.channels, shape.height, shape.width, c)
                results.rows += _block_rows(at_c, batch, count, mode, device, block_rounds, results)
    finally:
        torch.set_num_threads(threads_before)


def _block_rows(
    shape: ShapeAtC, batch: int, threads: int | None, mode: str, device: str, rounds: int, results: Results
) -> list[Row]:
    key = "gpu" if threads is None else str(threads)
    if key not in results.bandwidth_gbs:
        results.bandwidth_gbs[key] = blocks.bandwidth_gbs(device)
    plan = blocks.Plan((shape,), (batch,), device=device, rounds=rounds)
    cell = blocks.Cell(shape, batch, threads, mode)
    rows = blocks.run_cell(cell, plan, results.bandwidth_gbs[key], Compiler({}), _make_x)
    return [replace(row, kind=SWEEP_BLOCK, c=shape.c) for row in rows]


def _make_x(shape: Shape, batch: int, spec: MoDSpec, layout: str) -> Tensor:
    """Any x: among the 1025 largest of 2048 logits two always come near a tie, in which the check lets either be
    first."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch, shape.channels, shape.height, shape.width), generator=generator)
    return x.to(spec.fc1_weight).contiguous(memory_format=FORMATS[layout])


def mod_shapes(name: str, data: paper.Data) -> list[Shape]:
    """The kinds of MoD blocks in a network, in its order."""
    found: list[Shape] = []
    with torch.device("meta"), torch.no_grad():
        network = getattr(models, name)(**data.options).eval()
        networks.with_blocks(network, lambda block: _Recorder(block.conv_block.kind, found))
        network(torch.empty(1, 3, data.size, data.size))
    return list(dict.fromkeys(found))


class _Recorder(nn.Module):
    """In a MoD block's place: notes what would come to it."""

    def __init__(self, kind: str, found: list[Shape]) -> None:
        super().__init__()
        self._kind, self._found = kind, found

    def forward(self, x: Tensor) -> Tensor:
        self._found.append(Shape(self._kind, *x.shape[1:]))
        return x


def describe(name: str, c: int, data: paper.Data) -> dict:
    """Parameters and multiply-adds of a network at c, and of ResNet50-MoD what the paper prints."""
    with torch.device("meta"):
        network = getattr(models, name)(c=c, **data.options).eval()
        network = networks.with_blocks(network, lambda block: networks.PlainBlock(block, "cat"))
        counted = paper_table.counts(network, torch.empty(1, 3, data.size, data.size))
    printed = paper.RESNET50_MOD_AT_C.get(c) if name == NETWORK else None
    return {"data": data.name, "paper": None if printed is None else asdict(printed), **counted}

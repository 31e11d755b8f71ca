"""Choosing k: what a network and its MoD blocks cost at each c (k = C // c), beside known accuracies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from .. import models
from ..spec import MoDSpec
from . import blocks, networks, paper, paper_table
from .cells import OnCell, run_cells
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
    on_cell: OnCell,
    device: str = "cpu",
    rounds: int = ROUNDS,
    block_rounds: int = BLOCK_ROUNDS,
) -> None:
    """Measure into ``results``: at each c the network, then each kind of MoD block in it by itself.

    Raises:
        ValueError: a name that :func:`mod_kernels.models.list_models` does not have.
    """
    data = paper.data_of(name)
    shapes = mod_shapes(name, data)
    planned: list[NetworkAtC | BlockAtC] = []
    for how in networks.ways_to_run(threads, device):
        for batch in batches:
            for c in cs:
                planned.append(NetworkAtC(name, batch, *how, c))
                at_c = [ShapeAtC(shape.kind, shape.channels, shape.height, shape.width, c) for shape in shapes]
                planned += [BlockAtC(shape, batch, *how) for shape in at_c]

    def measured(cell: NetworkAtC | BlockAtC) -> list[Row]:
        if isinstance(cell, BlockAtC):
            return _block_rows(cell, device, block_rounds, results)
        results.networks[f"{name} c={cell.c}"] = describe(name, cell.c, data)
        how = (cell.threads, cell.mode, device, torch.float32, data.size, rounds)
        rows = networks.run_cell(name, cell.batch, *how, c=cell.c, **data.options)
        return [replace(row, kind=SWEEP, c=cell.c) for row in rows]

    run_cells(planned, results, on_cell, measured)


@dataclass(frozen=True)
class NetworkAtC(networks.Cell):
    c: int = 64

    def __str__(self) -> str:
        return f"{super().__str__()} c={self.c}"


@dataclass(frozen=True)
class BlockAtC(blocks.Cell):
    def __str__(self) -> str:
        return f"{super().__str__()} c={self.shape.c}"


def _block_rows(cell: BlockAtC, device: str, rounds: int, results: Results) -> list[Row]:
    plan = blocks.Plan((cell.shape,), (cell.batch,), device=device, rounds=rounds)
    bandwidth = blocks.bandwidth_of(cell.threads, device, results)
    rows = blocks.run_cell(cell, plan, bandwidth, Compiler({}), _make_x)
    return [replace(row, kind=SWEEP_BLOCK, c=cell.shape.c) for row in rows]


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

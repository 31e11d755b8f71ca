"""Blocks in training: forward and backward of plain PyTorch and of this package, gradients of x and all weights.

Every provider gets x as the output of an op before it, as in a network: a leaf could not be written into.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import backends
from .._layout import layout_of, memory_format_of
from .._library import accumulation_dtype
from .._tolerances import VALUES, relative_norm
from ..backends import Call
from ..nn import FUSED_CONV_BLOCKS, MoDBlock, NarrowConvNeXt
from .blocks import FLOOR, WARM, Cell, CellRows, Plan, bandwidth_of, cells
from .cells import OnCell, run_cells
from .networks import PlainBlock
from .providers import ENGINES, PLAIN
from .shapes import FORMATS, Shape
from .store import Results, Row
from .timing import CpuClock, Timed, measure, on_round_of

BATCHES = (8, 32)
# The one pass over x's gradient by itself, to be held against the floor.
BIG_PASS = "big-pass"
HELD = 4  # outputs of the two passes over a map that are kept meanwhile
# Of the gradients against float64's, times the dtype's tolerance for values: those of weights are sums over all
# N*H*W pixels, up to 100352 here, through two or three batch norms whose own gradients are differences of such
# sums. Plain PyTorch is off by up to 20 times in float32; a term that is missing, by a thousand and more.
GRADIENTS = 100


class _Handed(torch.autograd.Function):
    """``buffer`` as what an op of ``leaf`` wrote there; its gradient goes on as it is."""

    @staticmethod
    def forward(ctx, leaf: Tensor, buffer: Tensor) -> Tensor:
        ctx.mark_dirty(buffer)
        return buffer

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class Step:
    """One training step of a block: ``run`` is timed, ``refill`` restores what an in-place form overwrote."""

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.module, self._x, self._dy, self._buffer = module, x, dy, x.clone()
        self._leaf = torch.empty_like(x).requires_grad_()
        self._parameters = list(module.parameters())

    def refill(self) -> None:
        self._buffer.copy_(self._x)

    def run(self) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            y = self.module(_Handed.apply(self._leaf, self._buffer.detach()))
            return torch.autograd.grad(y, [self._leaf, *self._parameters], self._dy)


def make_block(shape: Shape, dtype: torch.dtype) -> MoDBlock:
    """The paper's block, with a selector whose logits lie apart, and norms and a layer scale that are not fresh.

    After fresh ones, without a bias, a batch norm before a convolution and another has a gradient of zero: nothing
    to hold a relative error to.
    """
    torch.manual_seed(0)
    conv_block = {one.kind: one for one in FUSED_CONV_BLOCKS}[shape.kind](shape.k)
    block = MoDBlock(shape.channels, conv_block, shape.k).to(dtype)
    nn.init.normal_(block.selector.fc1.weight, std=(2.0 / shape.channels) ** 0.5)
    nn.init.normal_(block.selector.fc2.weight)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, NarrowConvNeXt):
            nn.init.uniform_(module.gamma, 0.5, 1.5)
    return block.train()


def run(plan: Plan, results: Results, on_cell: OnCell) -> None:
    """Measure cell by cell into ``results``; only on a CPU so far, and only warm."""
    planned = [replace(cell, mode="train") for cell in cells(replace(plan, caches=(WARM,)))]

    def measured(cell: Cell) -> list[Row]:
        return run_cell(cell, plan, bandwidth_of(cell.threads, plan.device, results))

    run_cells(planned, results, on_cell, measured, plan.total_s)


def run_cell(cell: Cell, plan: Plan, bandwidth: float) -> list[Row]:
    """Check and time every provider of one cell."""
    shape, engine = cell.shape, ENGINES[plan.device]
    block = make_block(shape, plan.dtype)
    x, dy = (_random(shape, cell.batch, plan, seed) for seed in (1, 2))
    modules = {name: PlainBlock(block, name.removeprefix("plain-")) for name in PLAIN} | {engine: block}
    expected = Step(PlainBlock(copy.deepcopy(block).double(), "clone"), x.double(), dy.double()).run()
    rows, timed = CellRows(cell, plan, bandwidth), []
    with backends.use_backend(engine):
        for name, module in modules.items():
            step = Step(module, x, dy)
            try:
                problem = _problem(step.run(), expected, plan.dtype)
            except RuntimeError as error:
                # Autograd's own refusal: torch.gather has saved what the in-place form then overwrites.
                rows.add(name, f"left out: {str(error).partition(':')[0]}")
                continue
            if problem:
                rows.add(name, f"wrong: {problem}")
            else:
                timed.append(Timed(name, step.run, step.refill))
        # Fresh outputs, for both alike: the allocator would give one of them the memory of its last output again,
        # still in the cache, and the other that of a few in turn.
        outputs: deque[Tensor] = deque(maxlen=HELD)
        for name, run in ((FLOOR, lambda: dy + 1.0), (BIG_PASS, _big_pass(shape, dy))):
            timed.append(Timed(name, lambda run=run: outputs.append(run())))
        measure(timed, CpuClock(), plan.rounds, plan.cell_s, on_round_of("cpu"), plan.spread)
    for one in timed:
        rows.add(one.name, "none" if one.name in (FLOOR, BIG_PASS) else "ok", one)
    return rows.rows


def _big_pass(shape: Shape, dy: Tensor) -> Callable[[], Tensor]:
    """dy, the pooled vector's gradient and that of the gathered channels, as a block's backward has them."""
    index = torch.rand((len(dy), shape.channels)).topk(shape.k).indices
    pooled = torch.rand((len(dy), shape.channels), dtype=accumulation_dtype(dy.dtype))
    gathered = dy[:, : shape.k].contiguous(memory_format=memory_format_of(dy))
    call = Call("fuse_channels", dy.device.type, dy.dtype, layout_of(dy), shape.channels, shape.k)
    op = backends.choose(call).ops["input_gradient"]
    return lambda: op(dy, pooled, gathered, index, None, None, "first")


def _random(shape: Shape, batch: int, plan: Plan, seed: int) -> Tensor:
    size = (batch, shape.channels, shape.height, shape.width)
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.to(plan.dtype).contiguous(memory_format=FORMATS[plan.layout])


def _problem(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> str:
    """What is wrong with the gradients of x and the parameters; ``""`` if nothing is."""
    for number, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        error = relative_norm(got, wanted)
        if not error <= GRADIENTS * VALUES[dtype]:
            return f"gradient {number} off by {error:.1e}, {GRADIENTS * VALUES[dtype]:.1e} is allowed"
    return ""

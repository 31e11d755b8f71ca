"""The suites of ``mod-kernels bench`` by name: what each takes, and how it is run and shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console

from .._layout import NCHW
from . import (
    block_memory,
    blocks,
    cold_start,
    network_training,
    networks,
    ops,
    overhead,
    scaling,
    table,
    table_suites,
    training,
)
from .cells import OnCell
from .shapes import SHAPES, Shape
from .store import Results


@dataclass(frozen=True)
class Request:
    """What was asked for; None: the suite's own default. ``threads`` is ignored on a GPU."""

    threads: tuple[int, ...]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batches: tuple[int, ...] | None = None
    kind: str | None = None
    layout: str | None = None
    networks: tuple[str, ...] | None = None
    quick: bool = False
    max_autotune: bool = False


@dataclass(frozen=True)
class Suite:
    """``options`` are the words of the command line it takes, beside those that every suite does."""

    about: str
    run: Callable[[Request, Results, OnCell], None]
    options: frozenset[str]
    cpu_dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    on_gpu: bool = True
    show: Callable[[Results, Console], None] = table_suites.show


def _shapes(request: Request) -> tuple[Shape, ...]:
    kinds = ("bottleneck",) if request.quick else ("bottleneck", "basic")
    kinds = kinds if request.kind is None else (request.kind,)
    return tuple(shape for kind in kinds for shape in SHAPES[kind])


def _plan(request: Request, batches: tuple[int, ...]) -> blocks.Plan:
    return blocks.Plan(
        _shapes(request),
        request.batches or batches,
        request.threads,
        request.device,
        request.dtype,
        request.layout or NCHW,
        max_autotune=request.max_autotune,
    )


def _block(request: Request, results: Results, on_cell: OnCell) -> None:
    plan = _plan(request, blocks.BATCHES)
    blocks.run(blocks.quick(plan) if request.quick else plan, results, on_cell)


def _block_train(request: Request, results: Results, on_cell: OnCell) -> None:
    training.run(_plan(request, training.BATCHES), results, on_cell)


def _network(request: Request, results: Results, on_cell: OnCell) -> None:
    names = request.networks or networks.NETWORKS
    networks.run(names, request.batches or (1,), request.threads, results, on_cell, request.device, request.dtype)


def _network_train(request: Request, results: Results, on_cell: OnCell) -> None:
    names, batches = request.networks or network_training.NETWORKS, request.batches or network_training.BATCHES
    network_training.run(names, batches, request.threads, results, on_cell, request.dtype)


def _ops(request: Request, results: Results, on_cell: OnCell) -> None:
    batches = request.batches or blocks.BATCHES
    ops.run(batches, request.threads, results, on_cell, request.device, request.dtype, request.quick)


def _scaling(request: Request, results: Results, on_cell: OnCell) -> None:
    scaling.run(request.threads, results, on_cell, request.device, request.dtype, request.quick)


def _overhead(request: Request, results: Results, on_cell: OnCell) -> None:
    overhead.run(results, on_cell, request.device)


def _memory(request: Request, results: Results, on_cell: OnCell) -> None:
    batches = request.batches or training.BATCHES
    block_memory.run(batches, request.threads, results, on_cell, request.device, request.dtype)


def _cold_start(request: Request, results: Results, on_cell: OnCell) -> None:
    cold_start.run(results, on_cell)


_BLOCK = frozenset({"kind", "layout", "batch", "dtype", "threads"})
_NETWORK = frozenset({"network", "batch", "dtype", "threads"})
# Whole networks on a CPU: in bfloat16 plain code selects so differently that its output is as far off as with no
# MoD block at all, in float16 its convolutions take ten times as long.
SUITES = {
    "block": Suite("blocks, inference", _block, _BLOCK | {"quick", "max-autotune"}, show=table.show),
    "block-train": Suite("blocks, forward and backward", _block_train, _BLOCK, on_gpu=False, show=table.show),
    "network": Suite("whole networks, inference", _network, _NETWORK, ("float32",), show=table.show),
    "network-train": Suite(
        "whole networks, forward and backward", _network_train, _NETWORK, ("float32",), False, table.show
    ),
    "ops": Suite("each op by itself", _ops, frozenset({"quick", "batch", "dtype", "threads"})),
    "scaling": Suite("blocks over N, H*W, C and k", _scaling, frozenset({"quick", "dtype", "threads"})),
    "overhead": Suite("what a call costs beside its arithmetic", _overhead, frozenset(), ("float32",)),
    "memory": Suite("what a block holds at its peak", _memory, frozenset({"batch", "dtype", "threads"})),
    "cold-start": Suite("imports, first calls, compilers", _cold_start, frozenset(), ("float32",), False),
}
# What ``bench all`` goes through: everything but steps of whole networks, which take as long as all the rest.
ALL = ("cold-start", "overhead", "block", "block-train", "ops", "memory", "scaling", "network")

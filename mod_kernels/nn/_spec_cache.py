"""The cache that can't serve a stale fold.

A folded spec is a copy of what was in sixteen or so parameters and buffers. :class:`SpecCache` keeps one per
block and, before each use, looks at everything it came from: a changed weight must never be answered with the
fold of the old one. It serves this package's blocks and foreign ones alike; each says what is to be watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _autocast
from ..spec import MoDSpec


class Watched(NamedTuple):
    """What a spec depends on, as places to look at again: tables (dicts) of modules, and names in them."""

    children: list[dict]  # every module's table of submodules
    tensors: list[tuple[dict, str]]
    hooks: list[dict]  # have to stay empty
    attributes: list[tuple[dict, str]]  # plain values; one that is absent counts as None
    tables: list[dict]  # have to keep the number of their names: an attribute that appears may hide another


class _Source(NamedTuple):
    """One tensor that a spec came from: where it was found, and what it was then."""

    table: dict
    name: str
    tensor: Tensor
    version: int
    address: int


class _Entry(NamedTuple):
    """A spec and all it came from."""

    spec: MoDSpec
    # The block's own tables: a copy of the block (a DataParallel replica) has others.
    block_attributes: dict
    block_modules: dict
    children: list[tuple[dict, dict]]  # tables of submodules, and what they held
    sources: list[_Source]
    absent: list[tuple[dict, str]]  # biases that were None
    hooks: list[dict]
    attributes: list[tuple[dict, str, Any]]
    sizes: list[tuple[dict, int]]
    # Aliases of the sources. They keep the old memory from being given to a new tensor at the same address,
    # which would make ``p.data = ...`` twice in a row look like no change.
    aliases: list[Tensor]


class SpecCache:
    """The folded spec of one block, checked at each call against everything it came from.

    Checked: the same module objects, the same tensor objects, each at the same address and version; settings such
    as a BN's eps and mode, k and position; no hooks, no forward of a module's own. Not looked at are the stride,
    padding and dilation of a MoDBlock's convolutions; and no check of this kind can see a write that bypasses
    PyTorch's version counter (through ``.data``, NumPy or raw memory) and leaves the tensor where it is.
    ``train()``, ``eval()`` or ``load_state_dict`` drop the fold after such a change.

    A copy or a pickle of it is empty: it is refilled at the first call.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple:
        return SpecCache, ()

    def clear(self) -> None:
        self._entry = None

    def get(
        self,
        block: nn.Module,
        fold: Callable[[nn.Module], MoDSpec | None],
        watched: Callable[[nn.Module], Watched],
    ) -> MoDSpec | None:
        """The spec of ``block`` as it is now, or None where it has to run as it is written.

        ``fold`` makes a spec, or says None; ``watched`` says what that spec depends on.
        """
        if _has_any_global_hook():
            return None
        entry = self._entry
        if entry is not None and _holds(entry, block):
            return entry.spec
        self._entry = None
        # Outside inference mode and autocast: an entry made inside them may be used outside.
        device = next((one.device.type for one in block.parameters()), "cpu")
        with torch.inference_mode(False), torch.no_grad(), _autocast.outside(device):
            spec = fold(block)
            if spec is not None and _waited_for(spec):
                self._entry = _entry(block, spec, watched(block))
        return spec


def _waited_for(spec: MoDSpec) -> bool:
    """Waits until spec is made, on a GPU: the next call may come on another stream. False, and no wait, while a
    CUDA graph is captured, which makes it at each replay.
    """
    if not spec.fc1_weight.is_cuda:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    torch.cuda.current_stream(spec.fc1_weight.device).synchronize()
    return True


def _holds(entry: _Entry, block: nn.Module) -> bool:
    # This runs at every call of every block: plain loops over what was gathered once, no nn.Module attribute
    # look-ups of submodules. Modules compare by identity, so comparing their tables is exact.
    attributes = block.__dict__
    if entry.block_attributes is not attributes or entry.block_modules is not attributes["_modules"]:
        return False
    if any(entry.hooks):
        return False
    for table, held in entry.children:
        if table != held:
            return False
    try:
        for table, name, tensor, version, address in entry.sources:
            if table[name] is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        for table, name in entry.absent:
            if table[name] is not None:
                return False
        for table, name, value in entry.attributes:
            now = table.get(name)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
    # Taken out of its module (parametrized, pruned); a tensor or an array where none was, which has no one answer.
    except (KeyError, RuntimeError, ValueError):
        return False
    for table, size in entry.sizes:  # noqa: SIM110 (a generator costs every call more)
        if len(table) != size:
            return False
    return True


def _entry(block: nn.Module, spec: MoDSpec, watched: Watched) -> _Entry | None:
    """The entry for a spec just made, or None where its sources can't be watched.

    Tensors made under ``torch.inference_mode`` have no version counter, subclasses (fake tensors, DTensor) no
    address that means anything, and a DataParallel replica keeps its tensors outside its modules' tables:
    such blocks are folded afresh at each call.
    """
    sources, absent, aliases = [], [], []
    for table, name in watched.tensors:
        if name not in table:
            return None
        tensor = table[name]
        if tensor is None:
            absent.append((table, name))
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
            return None
        sources.append(_Source(table, name, tensor, tensor._version, tensor.data_ptr()))
        aliases.append(tensor.detach())
    return _Entry(
        spec,
        vars(block),
        block._modules,
        [(table, dict(table)) for table in watched.children],
        sources,
        absent,
        watched.hooks,
        [(table, name, snapshot(table.get(name))) for table, name in watched.attributes],
        [(table, len(table)) for table in watched.tables],
        aliases,
    )


def snapshot(value: Any) -> Any:
    """A value as it is now: lists and dicts may be written to. (torch 2.11's Dynamo can't trace a deepcopy.)"""
    if type(value) is dict:
        return {key: snapshot(one) for key, one in value.items()}
    return type(value)(snapshot(one) for one in value) if type(value) in (list, tuple) else value

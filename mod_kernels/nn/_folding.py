"""BN folding, and the cache that can't serve a stale fold.

A folded spec is a copy of what was in sixteen or so parameters and buffers. :class:`SpecCache` keeps one per
block and, before each use, looks at everything it came from: a changed weight must never be answered with the
fold of the old one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .._library import accumulation_dtype
from ..spec import MoDSpec

if TYPE_CHECKING:
    from .mod_block import MoDBlock


class FoldedConvs(NamedTuple):
    """A conv block in eval mode as :class:`mod_kernels.functional.MoDSpec` takes it."""

    kind: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    final_relu: bool


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``conv`` followed by ``norm`` in eval mode, as one weight (OIHW) and one bias (O,), detached.

    Folded in float32 (float64 for float64) and left there: the fused block keeps its intermediates in float32
    anyway, and rounding the products ``weight * scale`` to a half model's dtype would add an error that the
    unfolded model does not have. At k channels the extra bytes do not count.

    With ``scale = norm_weight / sqrt(var + eps)``: ``weight * scale``, ``(conv_bias - mean) * scale + norm_bias``.
    ``torch.nn.utils.fusion.fuse_conv_bn_weights`` says the same, but makes Parameters, which torch.compile
    can't trace.
    """
    dtype = accumulation_dtype(conv.weight.dtype)
    scale = torch.rsqrt(norm.running_var.detach().to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(dtype)
    bias = -norm.running_mean.detach().to(dtype)
    if conv.bias is not None:
        bias = bias + conv.bias.detach().to(dtype)
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().to(dtype)
    return conv.weight.detach().to(dtype) * scale[:, None, None, None], bias


def why_not_fusible(block: MoDBlock) -> str:
    """Why ``block`` can't run as one op, by what it is made of; ``""`` if it can.

    Exact types only: a subclass, a parametrization or a quantized layer computes something else.
    """
    from . import FUSED_CONV_BLOCKS
    from .selector import ChannelSelector

    selector, conv_block = block.selector, block.conv_block
    if type(selector) is not ChannelSelector:
        return f"its selector is a {type(selector).__name__}, not a ChannelSelector"
    for name in ("fc1", "fc2"):
        if type(getattr(selector, name)) is not nn.Linear:
            return f"selector.{name} is a {type(getattr(selector, name)).__name__}, not nn.Linear"
    if type(conv_block) not in FUSED_CONV_BLOCKS:
        known = ", ".join(one.__name__ for one in FUSED_CONV_BLOCKS)
        return f"its conv_block is a {type(conv_block).__name__}, none of {known}"
    if conv_block.k != selector.k:
        return f"conv_block takes k={conv_block.k} channels, selector.k is {selector.k}"
    reason = conv_block.why_not_folded()
    return f"conv_block.{reason}" if reason else ""


def runs_plainly(block: MoDBlock) -> bool:
    """Whether running ``block``'s parts one by one would do just what the folded spec says.

    Not so while a forward hook hangs on a part (fusing would skip it; backward hooks do nothing where no
    gradient is needed), or while a BN is in training mode inside a block in eval mode.
    """
    if _has_any_global_hook() or any(_hooks(block)):
        return False
    return not any(norm.training for norm in block.conv_block.norms())


def _hooks(block: MoDBlock) -> tuple[dict, ...]:
    """The hook tables of the modules that the ordinary path calls and the fused one does not."""
    called = [block.selector, block.conv_block, *block.conv_block.called()]
    return tuple(hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks))


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
    block_modules: dict  # the block's own table: a copy of the block (a DataParallel replica) has another
    modules: list[tuple[dict, dict]]  # tables of submodules, and what they held
    sources: list[_Source]
    absent: list[tuple[dict, str]]  # biases that were None
    hooks: tuple[dict, ...]
    norms: list[tuple[nn.Module, float]]  # and their eps
    settings: tuple
    # Aliases of the sources. They keep the old memory from being given to a new tensor at the same address,
    # which would make ``p.data = ...`` twice in a row look like no change.
    aliases: list[Tensor]


class SpecCache:
    """The folded spec of one block, checked at each call against every tensor it came from.

    Checked: the same module objects, the same tensor objects, each at the same address and version; BN's eps
    and mode; k, position and final_relu; no hooks. What no check of this kind can see is a write that bypasses
    PyTorch's version counter (through ``.data``, NumPy or raw memory) and leaves the tensor where it is:
    ``train()``, ``eval()`` or ``load_state_dict`` drop the fold after such a write.

    A copy or a pickle of it is empty: it is refilled at the first call.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple:
        return SpecCache, ()

    def clear(self) -> None:
        self._entry = None

    def get(self, block: MoDBlock) -> MoDSpec | None:
        """The spec of ``block`` as it is now, or None where its parts have to run one by one."""
        if _has_any_global_hook():
            return None
        entry = self._entry
        if entry is not None and _holds(entry, block):
            return entry.spec
        self._entry = None
        if why_not_fusible(block) or not runs_plainly(block):
            return None
        # Outside inference mode: an entry made inside it may be used outside.
        with torch.inference_mode(False), torch.no_grad():
            spec = block.spec()
            self._entry = _entry(block, spec)
        return spec


def _holds(entry: _Entry, block: MoDBlock) -> bool:
    # This runs at every call of every block: plain loops over what was gathered once, no nn.Module attribute
    # look-ups of submodules. Modules compare by identity, so comparing their tables is exact.
    if entry.block_modules is not block._modules or any(entry.hooks):
        return False
    for table, held in entry.modules:
        if table != held:
            return False
    try:
        for table, name, tensor, version, address in entry.sources:
            if table[name] is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        for table, name in entry.absent:
            if table[name] is not None:
                return False
    except KeyError:  # taken out of its module (parametrized, pruned)
        return False
    for norm, eps in entry.norms:
        if norm.training or norm.eps != eps:
            return False
    return entry.settings == _settings(block)


def _settings(block: MoDBlock) -> tuple:
    modules = block._modules
    return block.position, modules["selector"].k, modules["conv_block"].final_relu


def _entry(block: MoDBlock, spec: MoDSpec) -> _Entry | None:
    """The entry for a spec just made, or None where its sources can't be watched.

    Tensors made under ``torch.inference_mode`` have no version counter, subclasses (fake tensors, DTensor) no
    address that means anything, and a DataParallel replica keeps its tensors outside its modules' tables:
    such blocks are folded afresh at each call.
    """
    sources, absent, aliases = [], [], []
    for table, name in _tensor_slots(block):
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
    tables = [module._modules for module in (block, block.selector, block.conv_block)]
    return _Entry(
        spec,
        block._modules,
        [(table, dict(table)) for table in tables],
        sources,
        absent,
        _hooks(block),
        [(norm, norm.eps) for norm in block.conv_block.norms()],
        _settings(block),
        aliases,
    )


def _tensor_slots(block: MoDBlock) -> Iterator[tuple[dict, str]]:
    """Where each tensor that goes into the spec is held: (a module's table, its name there)."""
    for module in (block.selector.fc1, block.selector.fc2):
        yield from tensor_slots(module)
    yield from block.conv_block.tensor_slots()


def tensor_slots(layer: nn.Module) -> Iterator[tuple[dict, str]]:
    """Those of a layer's weight and bias."""
    yield layer._parameters, "weight"
    yield layer._parameters, "bias"

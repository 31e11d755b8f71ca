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
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .._library import accumulation_dtype
from ..spec import CONV_KINDS, MoDSpec

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
    """
    dtype = accumulation_dtype(conv.weight.dtype)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype)

    weight, bias = fuse_conv_bn_weights(
        cast(conv.weight),
        cast(conv.bias),
        cast(norm.running_mean),
        cast(norm.running_var),
        norm.eps,
        cast(norm.weight),
        cast(norm.bias),
    )
    return weight.detach(), bias.detach()


def why_not_fusible(block: MoDBlock) -> str:
    """Why ``block`` can't run as one op, by what it is made of; ``""`` if it can.

    Exact types only: a subclass, a parametrization or a quantized layer computes something else.
    """
    from .conv_blocks import NarrowBasicBlock, NarrowBottleneck
    from .selector import ChannelSelector

    selector, conv_block = block.selector, block.conv_block
    if type(selector) is not ChannelSelector:
        return f"its selector is a {type(selector).__name__}, not a ChannelSelector"
    for name in ("fc1", "fc2"):
        if type(getattr(selector, name)) is not nn.Linear:
            return f"selector.{name} is a {type(getattr(selector, name)).__name__}, not nn.Linear"
    if type(conv_block) not in (NarrowBottleneck, NarrowBasicBlock):
        name = type(conv_block).__name__
        return f"its conv_block is a {name}, not a NarrowBottleneck or a NarrowBasicBlock"
    layers = conv_block.layers()
    for i, (conv, norm) in enumerate(layers, 1):
        if type(conv) is not nn.Conv2d:
            return f"conv_block.conv{i} is a {type(conv).__name__}, not nn.Conv2d"
        if not _is_plain(conv):
            return f"conv_block.conv{i} is not of stride 1, zero padding (kernel - 1) / 2, one group: {conv}"
        if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return f"conv_block.bn{i} is a {type(norm).__name__}, not nn.BatchNorm2d"
        if norm.running_mean is None or norm.running_var is None:
            return f"conv_block.bn{i} keeps no running statistics"
    weights = tuple(conv.weight for conv, _ in layers)
    if [tuple(w.shape) for w in weights] != CONV_KINDS[conv_block.kind](weights, block.selector.k):
        return f"conv_block's weights do not fit a {conv_block.kind!r} of k={block.selector.k}"
    return ""


def _is_plain(conv: nn.Conv2d) -> bool:
    kernel = conv.kernel_size
    return (
        kernel[0] % 2 == 1
        and conv.padding == tuple((size - 1) // 2 for size in kernel)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def runs_plainly(block: MoDBlock) -> bool:
    """Whether running ``block``'s parts one by one would do just what the folded spec says.

    Not so while a hook hangs on a part (fusing would skip it), or while a BN is in training mode inside a
    block in eval mode (it would use the batch's statistics).
    """
    if _has_any_global_hook():
        return False
    parts = _parts(block)
    if any(hooks for part in parts for hooks in _hooks(part)):
        return False
    return not any(part.training for part in parts)


def _parts(block: MoDBlock) -> list[nn.Module]:
    """The modules that fusing bypasses, the block itself (whose own hooks run as ever) not among them."""
    conv_block = block.conv_block
    layers = [layer for pair in conv_block.layers() for layer in pair]
    return [block.selector, block.selector.fc1, block.selector.fc2, conv_block, *layers]


def _hooks(module: nn.Module) -> tuple[dict, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


class _Source(NamedTuple):
    """One tensor (or module) that a spec came from: where it was found, and what it was then."""

    table: dict
    name: str
    tensor: Tensor
    version: int
    address: int


class _Entry(NamedTuple):
    """A spec and all it came from."""

    spec: MoDSpec
    children: dict  # block._modules: a copy of the block (a DataParallel replica) has another
    modules: list[tuple[dict, str, nn.Module | None]]
    sources: list[_Source]
    absent: list[tuple[dict, str]]  # biases that are None
    hooks: tuple[dict, ...]
    norms: list[tuple[nn.Module, float]]
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
    # One flat loop: this runs at every call of every block.
    if entry.children is not block._modules or any(entry.hooks):
        return False
    for table, name, module in entry.modules:
        if table[name] is not module or module.training:
            return False
    for table, name, tensor, version, address in entry.sources:
        if table[name] is not tensor or tensor._version != version or tensor.data_ptr() != address:
            return False
    for table, name in entry.absent:
        if table[name] is not None:
            return False
    for norm, eps in entry.norms:
        if norm.eps != eps:
            return False
    return entry.settings == _settings(block)


def _settings(block: MoDBlock) -> tuple:
    return block.position, block.selector.k, block.conv_block.final_relu


def _entry(block: MoDBlock, spec: MoDSpec) -> _Entry | None:
    """The entry for a spec just made, or None where its sources can't be watched.

    Tensors made under ``torch.inference_mode`` have no version counter, and subclasses (fake tensors, DTensor)
    no address that means anything: they are folded afresh at each call.
    """
    sources, absent, aliases = [], [], []
    for table, name in _tensor_slots(block):
        tensor = table.get(name)
        if tensor is None:
            absent.append((table, name))
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
            return None
        sources.append(_Source(table, name, tensor, tensor._version, tensor.data_ptr()))
        aliases.append(tensor.detach())
    parts = _parts(block)
    return _Entry(
        spec,
        block._modules,
        list(_module_slots(block)),
        sources,
        absent,
        tuple(hooks for part in parts for hooks in _hooks(part)),
        [(norm, norm.eps) for _, norm in block.conv_block.layers()],
        _settings(block),
        aliases,
    )


def _module_slots(block: MoDBlock) -> Iterator[tuple[dict, str, nn.Module]]:
    for parent in (block, block.selector, block.conv_block):
        for name, module in parent._modules.items():
            yield parent._modules, name, module


def _tensor_slots(block: MoDBlock) -> Iterator[tuple[dict, str]]:
    """Where each tensor that goes into the spec is held: (a module's table, its name there)."""
    for part in _parts(block):
        for name in part._parameters:
            yield part._parameters, name
        for name in part._buffers:
            if name != "num_batches_tracked":  # moves with every training step, and is not folded
                yield part._buffers, name

"""BN folding; whether a MoDBlock may run as its folded spec, and what that spec depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .._library import accumulation_dtype
from ..spec import MoDSpec
from ._spec_cache import Watched

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


def fold_layer_norm(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution after ``norm``, weight (O, I, 1, 1) and bias (O,), with the norm's own taken into it."""
    if norm.bias is not None:
        # No matrix product: under autocast, in a compiled graph, that would be rounded.
        bias = bias + (weight.flatten(1) * norm.bias.detach().to(weight.dtype)).sum(1)
    if norm.weight is not None:
        weight = weight * norm.weight.detach().to(weight.dtype)[:, None, None]
    return weight, bias


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

    Not so while a part has a forward hook (fusing would skip it; backward hooks do nothing where no gradient is
    needed) or a forward of its own, or while a BN is in training mode inside a block in eval mode.
    """
    if _has_any_global_hook() or any(_hooks(block)) or any("forward" in vars(part) for part in _called(block)):
        return False
    return not any(norm.training for norm in block.conv_block.norms())


def _called(block: MoDBlock) -> list[nn.Module]:
    """The modules that the ordinary path calls and the fused one does not."""
    return [block.selector, block.conv_block, *block.conv_block.called()]


def _hooks(block: MoDBlock) -> list[dict]:
    return [hooks for part in _called(block) for hooks in (part._forward_hooks, part._forward_pre_hooks)]


def fold(block: MoDBlock) -> MoDSpec | None:
    """``block.spec()``, or None where the block's parts have to run one by one."""
    return None if why_not_fusible(block) or not runs_plainly(block) else block.spec()


def watched(block: MoDBlock) -> Watched:
    """What ``block.spec()`` depends on."""
    selector, conv_block = block.selector, block.conv_block
    norms = [vars(norm) for norm in conv_block.norms()]
    return Watched(
        children=[module._modules for module in (block, selector, conv_block)],
        tensors=list(_tensor_slots(block)),
        hooks=_hooks(block),
        attributes=[
            (vars(block), "position"),
            (vars(selector), "k"),
            (vars(conv_block), "final_relu"),
            *((norm, name) for norm in norms for name in ("training", "eps")),
        ],
        tables=[vars(part) for part in _called(block)],
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

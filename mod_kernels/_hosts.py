"""The residual blocks of torchvision and timm that ``convert`` knows: their convolutions, their narrowed form.

By module and class name, so that neither library is imported for it; a subclass may do something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from .nn import (
    NarrowBasicBlock,
    NarrowBottleneck,
    NarrowConv,
    NarrowConvNeXt,
    NarrowInvertedResidual,
)
from .spec import CONV_KINDS, LAYER_NORM_EPS

NormLayer = Callable[[int], nn.Module]
Layers = list[tuple[nn.Module, nn.Module, nn.Module | None]]  # convolution, norm, activation after it


class Host(NamedTuple):
    """One class of block. Both are called for a block that keeps its C channels.

    ``why_not(block, C)``: what the narrowed form would lack or do otherwise, ``""`` if nothing.
    ``narrow(block, k)``: the narrowed form, fresh, initialised as the host's library initialises the block.
    """

    why_not: Callable[[nn.Module, int], str]
    narrow: Callable[[nn.Module, int], nn.Module]


def host_of(block: nn.Module) -> Host | None:
    return _HOSTS.get((type(block).__module__, type(block).__qualname__))


def convolutions(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def why_not_conv(conv: nn.Module, norm: nn.Module, activation: nn.Module, channels: int) -> str:
    """As :class:`Host`'s ``why_not``, for VGG's convolution, norm and ReLU."""
    return _why_not("conv", [(conv, norm, activation)], channels, final="relu")


def narrow_conv(conv: nn.Module, norm: nn.Module, k: int) -> NarrowConv:
    narrow = NarrowConv(k, bias=conv.bias is not None, norm_layer=_norm_like(norm))
    kaiming(narrow)
    if narrow.conv1.bias is not None:
        nn.init.zeros_(narrow.conv1.bias)
    return narrow


# What blocks of convolutions and norms have in common.

_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6}


def _why_not(kind: str, layers: Layers, channels: int, final: str | None = None) -> str:
    first = layers[0][0]
    mid = channels // 4 if kind == "bottleneck" else getattr(first, "out_channels", 0)
    shapes = CONV_KINDS[kind].shapes(mid, channels)
    for i, ((conv, norm, activation), shape, then) in enumerate(
        zip(layers, shapes, (*CONV_KINDS[kind].between, final), strict=True), 1
    ):
        if type(conv) is not nn.Conv2d:
            return f"its convolution {i} is a {type(conv).__name__}, not nn.Conv2d"
        if tuple(conv.weight.shape) != shape:
            return (
                f"its convolution {i} has weights {tuple(conv.weight.shape)}, "
                f"{shape} in a {kind!r} of {channels} channels"
            )
        if _norm_like(norm) is None:
            return f"its norm {i} is a {type(norm).__name__}, of which no narrowed form is known"
        if then is not None and type(activation) is not _ACTIVATIONS[then]:
            return f"its activation {i} is a {type(activation).__name__}, not nn.{_ACTIVATIONS[then].__name__}"
    return ""


def _norm_like(norm: nn.Module) -> NormLayer | None:
    """Makes norms of ``norm``'s class and settings; None if the class is not known."""
    where = type(norm).__module__, type(norm).__name__
    if where == ("torchvision.ops.misc", "FrozenBatchNorm2d"):
        return partial(type(norm), eps=norm.eps)
    # timm's holds its activation as well, which the narrowed blocks apply by themselves.
    with_activation = where == ("timm.layers.norm_act", "BatchNormAct2d")
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not with_activation:
        return None
    settings = {name: getattr(norm, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
    if type(norm) is nn.SyncBatchNorm:
        return partial(nn.SyncBatchNorm, **settings, process_group=norm.process_group)
    return partial(nn.BatchNorm2d, **settings)


# How the libraries initialise a block. Norms start as PyTorch's in all of them.


def kaiming(narrow: nn.Module) -> None:
    """torchvision's and timm's ResNet, both VGGs, torchvision's MobileNetV2."""
    for conv in convolutions(narrow):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _kaiming_zero_last(narrow: nn.Module) -> None:
    """timm's ResNet, whose default ``zero_init_last`` starts each branch at zero."""
    kaiming(narrow)
    norm = narrow.norms()[-1]
    if norm.weight is not None:
        nn.init.zeros_(norm.weight)


def _fan_out_per_group(narrow: nn.Module) -> None:
    """timm's MobileNetV2: the fan-out of a depthwise convolution is that of one of its groups."""
    for conv in convolutions(narrow):
        fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
        nn.init.normal_(conv.weight, 0, math.sqrt(2 / fan_out))


def truncated_normal(narrow: nn.Module) -> None:
    """Both ConvNeXts."""
    for layer in narrow.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


# The hosts.


def _torchvision_resnet(block: nn.Module, convs: int) -> tuple[Layers, str]:
    layers = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), block.relu) for i in range(1, convs + 1)]
    return layers, "" if block.downsample is None else "it has a downsample"


def _timm_resnet(block: nn.Module, convs: int) -> tuple[Layers, str]:
    layers = [tuple(getattr(block, f"{part}{i}") for part in ("conv", "bn", "act")) for i in range(1, convs + 1)]
    for name in ("se", "downsample"):
        if getattr(block, name) is not None:
            return layers, f"it has {name}, a {type(getattr(block, name)).__name__}"
    if not isinstance(block.aa, nn.Identity):
        return layers, f"it has aa, a {type(block.aa).__name__}"
    return layers, ""


def _torchvision_inverted(block: nn.Module) -> tuple[Layers, str]:
    if len(block.conv) != 4:
        return [], "it has no expansion"
    expand, depthwise, conv, norm = block.conv
    return [tuple(expand), tuple(depthwise), (conv, norm, None)], ""


def _timm_inverted(block: nn.Module) -> tuple[Layers, str]:
    layers = [
        (block.conv_pw, block.bn1, getattr(block.bn1, "act", None)),
        (block.conv_dw, block.bn2, getattr(block.bn2, "act", None)),
        (block.conv_pwl, block.bn3, None),
    ]
    if not block.has_skip or block.conv_s2d is not None:
        return layers, "it has no shortcut, or a space to depth"
    if not isinstance(block.se, nn.Identity):
        return layers, f"it has se, a {type(block.se).__name__}"
    return layers, ""


def _conv_host(
    kind: str,
    read: Callable[[nn.Module], tuple[Layers, str]],
    make: Callable[..., nn.Module],
    initialise: Callable[[nn.Module], None],
) -> Host:
    def why_not(block: nn.Module, channels: int) -> str:
        layers, lacks = read(block)
        reason = lacks or _why_not(kind, layers, channels)
        if not reason and kind == "inverted_residual" and layers[0][0].out_channels % channels:
            reason = f"its hidden width {layers[0][0].out_channels} is no multiple of {channels}"
        return reason

    def narrow(block: nn.Module, k: int) -> nn.Module:
        conv, norm, _ = read(block)[0][0]
        more = {"expand": conv.out_channels // conv.in_channels} if kind == "inverted_residual" else {}
        made = make(k, norm_layer=_norm_like(norm), **more)
        initialise(made)
        return made

    return Host(why_not, narrow)


class _ConvNeXtParts(NamedTuple):
    conv: nn.Module
    norm: nn.Module
    first: nn.Module
    activation: nn.Module
    second: nn.Module


def _torchvision_convnext(block: nn.Module) -> tuple[_ConvNeXtParts, str]:
    conv, _, norm, first, activation, second, _ = block.block
    return _ConvNeXtParts(conv, norm, first, activation, second), ""


def _timm_convnext(block: nn.Module) -> tuple[_ConvNeXtParts, str]:
    mlp = block.mlp
    parts = _ConvNeXtParts(block.conv_dw, block.norm, mlp.fc1, mlp.act, mlp.fc2)
    if type(mlp).__name__ != "Mlp":
        return parts, f"its mlp is a {type(mlp).__name__}"
    if block.gamma is None:
        return parts, "it has no layer scale"
    return parts, "" if isinstance(block.shortcut, nn.Identity) else "it has a downsample"


def _convnext_host(read: Callable[[nn.Module], tuple[_ConvNeXtParts, str]]) -> Host:
    def why_not(block: nn.Module, channels: int) -> str:
        (conv, norm, first, activation, second), lacks = read(block)
        if lacks:
            return lacks
        if type(conv) is not nn.Conv2d or tuple(conv.weight.shape) != (channels, 1, 7, 7):
            return f"its convolution is not a depthwise 7x7 of {channels} channels: {conv}"
        if not isinstance(norm, nn.LayerNorm) or norm.eps != LAYER_NORM_EPS or norm.bias is None:
            return f"its norm is not a LayerNorm with weight, bias and eps {LAYER_NORM_EPS}: {norm}"
        # timm has a class of its own for it.
        if type(activation).__name__ != "GELU" or getattr(activation, "approximate", "none") != "none":
            return f"its activation is not the exact GELU: {activation}"
        if any(layer.bias is None for layer in (conv, first, second)):
            return "a layer of it has no bias"
        if first.weight.shape[0] % channels:
            return f"its hidden width {first.weight.shape[0]} is no multiple of {channels}"
        return ""

    def narrow(block: nn.Module, k: int) -> NarrowConvNeXt:
        hidden, channels = read(block)[0].first.weight.shape[:2]
        made = NarrowConvNeXt(k, expand=hidden // channels)
        truncated_normal(made)
        return made

    return Host(why_not, narrow)


_HOSTS: dict[tuple[str, str], Host] = {
    ("torchvision.models.resnet", "BasicBlock"): _conv_host(
        "basic", partial(_torchvision_resnet, convs=2), NarrowBasicBlock, kaiming
    ),
    ("torchvision.models.resnet", "Bottleneck"): _conv_host(
        "bottleneck", partial(_torchvision_resnet, convs=3), NarrowBottleneck, kaiming
    ),
    ("torchvision.models.mobilenetv2", "InvertedResidual"): _conv_host(
        "inverted_residual", _torchvision_inverted, NarrowInvertedResidual, kaiming
    ),
    ("torchvision.models.convnext", "CNBlock"): _convnext_host(_torchvision_convnext),
    ("timm.models.resnet", "BasicBlock"): _conv_host(
        "basic", partial(_timm_resnet, convs=2), NarrowBasicBlock, _kaiming_zero_last
    ),
    ("timm.models.resnet", "Bottleneck"): _conv_host(
        "bottleneck", partial(_timm_resnet, convs=3), NarrowBottleneck, _kaiming_zero_last
    ),
    ("timm.models._efficientnet_blocks", "InvertedResidual"): _conv_host(
        "inverted_residual", _timm_inverted, NarrowInvertedResidual, _fan_out_per_group
    ),
    ("timm.models.convnext", "ConvNeXtBlock"): _convnext_host(_timm_convnext),
}
KNOWN = tuple(f"{module.partition('.')[0]}'s {name}" for module, name in _HOSTS)

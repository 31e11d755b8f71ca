"""MoDSpec: all that the fused block needs beside x, as plain tensors; and the kinds of conv block there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

POSITIONS = ("first", "last", "original")
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


class ConvKind(NamedTuple):
    """How the convolutions of a kind of block hang together: stride 1, zero padding ``(kernel - 1) / 2``.

    ``shapes``: the OIHW shapes its weights must have, given mid_channels and k; where I is 1 and the convolution's
    input has more channels than one, it is depthwise. ``between``: what follows each convolution but the last:
    ``relu``, ``relu6``, ``gelu`` (exact), or ``layer_norm``, over the channels of every pixel, with
    LAYER_NORM_EPS and without weight or bias (they fold into the convolution after it). ``host_mid``: the host
    architecture's mid_channels for k. ``mid_weight``: whose outputs they are.
    """

    shapes: Callable[[int, int], list[tuple[int, ...]]]
    between: tuple[str, ...]
    host_mid: Callable[[int], int]
    mid_weight: int = 0

    def mid_channels(self, weights: Sequence[Tensor]) -> int:
        """mid_channels of a block with these weights (of the last one, if there are too few)."""
        return weights[min(self.mid_weight, len(weights) - 1)].shape[0]


# torchvision's, timm's and the original ConvNeXt's.
LAYER_NORM_EPS = 1e-6
# MobileNetV2's t, everywhere but in its first stage (which has a single block).
EXPANSION = 6

CONV_KINDS: dict[str, ConvKind] = {
    "bottleneck": ConvKind(
        lambda mid, k: [(mid, k, 1, 1), (mid, mid, 3, 3), (k, mid, 1, 1)],
        ("relu", "relu"),
        lambda k: max(1, k // 4),
    ),
    "basic": ConvKind(lambda mid, k: [(k, k, 3, 3)] * 2, ("relu",), lambda k: k),
    "inverted_residual": ConvKind(
        lambda mid, k: [(mid, k, 1, 1), (mid, 1, 3, 3), (k, mid, 1, 1)],
        ("relu6", "relu6"),
        lambda k: EXPANSION * k,
    ),
    "conv": ConvKind(lambda mid, k: [(k, k, 3, 3)], (), lambda k: k),
    "convnext": ConvKind(
        lambda mid, k: [(k, 1, 7, 7), (mid, k, 1, 1), (k, mid, 1, 1)],
        ("layer_norm", "gelu"),
        lambda k: 4 * k,
        mid_weight=1,
    ),
}


class Form(NamedTuple):
    """What the raw ops are told of a block beside its tensors and k."""

    kind: str
    mid_channels: int
    final_relu: bool
    position: str


def written_form(kind: str, mid_channels: int, final_relu: bool, position: str) -> str:
    """A :class:`Form` as the raw ops take it, one string: ``"bottleneck:8:relu:first"``.

    The third part says what follows the last convolution, ``relu`` or ``linear``. Every argument of a raw op
    costs a call a third of a microsecond, and a spec's form never changes.
    """
    return f"{kind}:{mid_channels}:{'relu' if final_relu else 'linear'}:{position}"


@cache
def read_form(form: str) -> Form:
    """The parts of what :func:`written_form` wrote.

    Raises:
        ValueError: it is not such a string; says which part.
    """
    parts = form.split(":")
    if len(parts) != 4:
        raise ValueError(f"form must be kind:mid_channels:relu or linear:position, got {form!r}")
    kind, mid_channels, ending, position = parts
    if kind not in CONV_KINDS:
        raise ValueError(f"kind must be one of {', '.join(CONV_KINDS)}, got {kind!r} in form {form!r}")
    if not mid_channels.isdecimal():
        raise ValueError(f"mid_channels must be a whole number, got {mid_channels!r} in form {form!r}")
    if ending not in ("relu", "linear"):
        raise ValueError(
            f"the last convolution must be followed by 'relu' or 'linear', got {ending!r} in form {form!r}"
        )
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r} in form {form!r}")
    return Form(kind, int(mid_channels), ending == "relu", position)


class Token:
    """Stands for one spec, where nothing may keep its tensors alive. (torch 2.11 can't trace ``object()``.)"""


@dataclass(frozen=True, eq=False)
class MoDSpec:
    """One MoD block for inference: selector weights, the narrowed conv block with its BN folded, k, position.

    Args:
        fc1_weight: (R, C), selector's first layer.
        fc2_weight: (C, R), its second.
        k: number of channels processed, 1 <= k <= C.
        kind: ``"bottleneck"`` (1x1, 3x3, 1x1), ``"basic"`` (3x3, 3x3), ``"inverted_residual"`` (1x1, depthwise
            3x3, 1x1), ``"conv"`` (3x3) or ``"convnext"`` (depthwise 7x7, 1x1, 1x1): see CONV_KINDS.
        conv_weights: OIHW, in the order they run.
        conv_biases: (O,) each, one per weight (a folded BN always leaves one).
        fc1_bias, fc2_bias: (R,) and (C,), or None (the paper has none).
        position: where the result is added: ``"first"`` k channels (the paper), ``"last"`` k, ``"original"``.
        final_relu: a ReLU after the last convolution.

    All on one device. dtypes are checked against x when the block runs: x's own or float32. Engines read the
    convolutions from one packed copy made here, and the selector through aliases: after a change of the former's
    values, or of a Parameter's ``.data``, a new spec is needed.

    Raises:
        ValueError, TypeError: a shape, dtype, device, kind or position that does not fit, named.
    """

    fc1_weight: Tensor
    fc2_weight: Tensor
    k: int
    kind: str
    conv_weights: tuple[Tensor, ...]
    conv_biases: tuple[Tensor, ...]
    fc1_bias: Tensor | None = None
    fc2_bias: Tensor | None = None
    position: str = "first"
    final_relu: bool = False
    channels: int = field(init=False, repr=False)
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)
    dtypes: frozenset[torch.dtype] = field(init=False, repr=False)
    selector_arguments: tuple = field(init=False, repr=False)
    conv_arguments: tuple = field(init=False, repr=False)
    token: Token = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from . import _checks  # not at the top: _checks reads the tables above

        object.__setattr__(self, "conv_weights", tuple(self.conv_weights))
        object.__setattr__(self, "conv_biases", tuple(self.conv_biases))
        _checks.spec(self)
        object.__setattr__(self, "channels", self.fc1_weight.shape[1])
        # Engines read dense OIHW; a model in channels_last carries its conv weights in that format.
        for name in ("fc1_weight", "fc2_weight", "fc1_bias", "fc2_bias"):
            tensor = getattr(self, name)
            object.__setattr__(self, name, tensor if tensor is None else tensor.contiguous())
        for name in ("conv_weights", "conv_biases"):
            object.__setattr__(self, name, tuple(tensor.contiguous() for tensor in getattr(self, name)))
        # What the ops need at every call, worked out once.
        set_derived = partial(object.__setattr__, self)
        optional = (self.fc1_bias, self.fc2_bias)
        selector = [self.fc1_weight, self.fc2_weight, *(bias for bias in optional if bias is not None)]
        set_derived("tensors", (*selector, *self.conv_weights, *self.conv_biases))
        set_derived("dtypes", frozenset(tensor.dtype for tensor in self.tensors))
        aliases = (
            tensor if tensor is None else tensor.detach()
            for tensor in (self.fc1_weight, self.fc2_weight, *optional)
        )
        set_derived("selector_arguments", tuple(aliases))
        packed = _packed(self.conv_weights, self.conv_biases)
        mid_channels = CONV_KINDS[self.kind].mid_channels(self.conv_weights)
        form = written_form(self.kind, mid_channels, self.final_relu, self.position)
        set_derived("conv_arguments", (packed, form))
        set_derived("token", Token())


def _packed(weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor:
    """Weight and bias of each convolution in turn, one vector, float64 if one of them is, else float32.

    One tensor instead of six: every tensor argument costs a call a few tenths of a microsecond.
    """
    parameters = [tensor.detach().flatten() for pair in zip(weights, biases, strict=True) for tensor in pair]
    wide = any(tensor.dtype == torch.float64 for tensor in parameters)
    return torch.cat([tensor.to(torch.float64 if wide else torch.float32) for tensor in parameters])


def unpacked(conv_parameters: Tensor, form: str, k: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases, as views, from the raw ops' arguments: what :func:`_packed` put together."""
    kind, mid_channels, _, _ = read_form(form)
    shapes = CONV_KINDS[kind].shapes(mid_channels, k)
    sizes = [size for shape in shapes for size in (prod(shape), shape[0])]
    parts = conv_parameters.split(sizes)
    weights = tuple(part.view(shape) for part, shape in zip(parts[::2], shapes, strict=True))
    return weights, parts[1::2]

"""The narrowed ConvNeXt block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._library import accumulation_dtype
from ..spec import LAYER_NORM_EPS
from ._folding import FoldedConvs, fold_layer_norm, tensor_slots
from .conv_blocks import NarrowConvBlock


class NarrowConvNeXt(NarrowConvBlock):
    """Depthwise 7x7, LayerNorm over the channels, linear ``k -> expand * k``, GELU, linear back, layer scale.

    ConvNeXt's block (arXiv 2201.03545) at k channels, with its own names of parameters. At k = 1 the LayerNorm of
    one channel is zero whatever the input, and the block a constant: a network needs k of at least 2 for it to
    do anything.

    Args:
        k: channels in and out.
        expand: hidden channels over k.
        layer_scale: initial value of ``gamma``, the scale of each channel at the end.
    """

    kind = "convnext"

    def __init__(self, k: int, expand: int = 4, layer_scale: float = 1e-6) -> None:
        super().__init__(k)
        self.dwconv = nn.Conv2d(k, k, 7, padding=3, groups=k)
        self.norm = nn.LayerNorm(k, eps=LAYER_NORM_EPS)
        self.pwconv1 = nn.Linear(k, expand * k)
        self.pwconv2 = nn.Linear(expand * k, k)
        self.gamma = nn.Parameter(torch.full((k,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """(N, k, H, W) to the same."""
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        x = self.gamma * self.pwconv2(F.gelu(self.pwconv1(x)))
        return x.permute(0, 3, 1, 2)

    def folded(self) -> FoldedConvs:
        """The norm's weight and bias go into the first linear layer, gamma into the second."""
        dtype = accumulation_dtype(self.dwconv.weight.dtype)
        depthwise, bias, _, _, w1, b1, w2, b2, gamma = (
            table[name].detach().to(dtype) for table, name in self.tensor_slots()
        )
        first = fold_layer_norm(w1[:, :, None, None], b1, self.norm)
        second = (w2 * gamma[:, None])[:, :, None, None], b2 * gamma
        return FoldedConvs(self.kind, (depthwise, first[0], second[0]), (bias, first[1], second[1]), False)

    def why_not_folded(self) -> str:
        k = self.k
        for name, layer in zip(("dwconv", "norm", "pwconv1", "pwconv2"), self.called(), strict=True):
            expected = {"dwconv": nn.Conv2d, "norm": nn.LayerNorm}.get(name, nn.Linear)
            if type(layer) is not expected:
                return f"{name} is a {type(layer).__name__}, not nn.{expected.__name__}"
            if layer.bias is None or layer.weight is None:
                return f"{name} has no weight or no bias"
        conv, norm = self.dwconv, self.norm
        plain = (conv.stride, conv.padding, conv.dilation, conv.padding_mode) == ((1, 1), (3, 3), (1, 1), "zeros")
        if not plain or tuple(conv.weight.shape) != (k, 1, 7, 7):
            return f"dwconv is not a depthwise 7x7 of {k} channels, stride 1, padding 3: {conv}"
        if norm.eps != LAYER_NORM_EPS or norm.normalized_shape != (k,):
            return f"norm is not over {k} channels with eps {LAYER_NORM_EPS}: {norm}"
        hidden = self.pwconv1.out_features
        if self.pwconv1.in_features != k or tuple(self.pwconv2.weight.shape) != (k, hidden):
            return f"pwconv1 and pwconv2 do not go from k={k} channels and back"
        return ""

    def called(self) -> list[nn.Module]:
        return [self.dwconv, self.norm, self.pwconv1, self.pwconv2]

    def norms(self) -> list[nn.Module]:
        return [self.norm]

    def tensor_slots(self) -> Iterator[tuple[dict, str]]:
        for layer in self.called():
            yield from tensor_slots(layer)
        yield self._parameters, "gamma"

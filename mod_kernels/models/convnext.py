"""ConvNeXt-MoD: in each stage every block with an odd index is a MoD block, as in a ResNet-MoD.

The paper (arXiv 2409.17016) has no ConvNeXt; the choice of c is this package's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt

from .._hosts import truncated_normal
from ..nn import NarrowConvNeXt
from . import _options

# name -> blocks per stage, and torchvision's rate of stochastic depth. Widths are 96, 192, 384, 768 in both.
NETWORKS: dict[str, tuple[tuple[int, int, int, int], float]] = {
    "convnext_tiny_mod": ((3, 3, 9, 3), 0.1),
    "convnext_small_mod": ((3, 3, 27, 3), 0.4),
}
_WIDTHS = (96, 192, 384, 768)


class MoDConvNeXt(ConvNeXt):
    """torchvision's ConvNeXt with a :class:`mod_kernels.nn.MoDBlock` at every odd index of every stage.

    Standard blocks keep their rate of stochastic depth; a MoD block has none.

    Args:
        layers: blocks per stage.
        c: k = max(1, C // c) channels are processed. With the first stage's width, 96, its MoD block has a single
            channel, whose LayerNorm is zero (:class:`mod_kernels.nn.NarrowConvNeXt`): it adds a bias, no more.
        position: where MoD blocks add their result: ``"first"``, ``"last"`` or ``"original"``.
        layer_scale: initial scale of every block's branch.
        **kwargs: torchvision's own (num_classes, stochastic_depth_prob, norm_layer, ...).
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        c: int = 96,
        position: str = "first",
        layer_scale: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        _options.check(c, position)
        setting = [
            CNBlockConfig(width, following, blocks)
            for width, following, blocks in zip(_WIDTHS, (*_WIDTHS[1:], None), layers, strict=True)
        ]
        odd = iter([i % 2 == 1 for blocks in layers for i in range(blocks)])

        def standard(dim: int, layer_scale: float, stochastic_depth_prob: float) -> nn.Module:
            # torchvision's constructor initialises every nn.Linear: the MoD blocks, whose selectors keep
            # PyTorch's values, come after it.
            return _Place(dim) if next(odd) else CNBlock(dim, layer_scale, stochastic_depth_prob)

        super().__init__(setting, layer_scale=layer_scale, block=standard, **kwargs)
        narrow = partial(_narrow, layer_scale=layer_scale)
        for name, stage in list(self.features.named_children()):
            if isinstance(stage[0], CNBlock):
                blocks = (
                    _options.mod_block(one.channels, c, position, narrow) if isinstance(one, _Place) else one
                    for one in stage
                )
                setattr(self.features, name, _options.stage(blocks))


class _Place(nn.Identity):
    """Where a MoD block goes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


def _narrow(k: int, layer_scale: float) -> NarrowConvNeXt:
    """Initialised as torchvision's ConvNeXt does its blocks."""
    block = NarrowConvNeXt(k, layer_scale=layer_scale)
    truncated_normal(block)
    return block


def _builder(name: str) -> Callable[..., MoDConvNeXt]:
    layers, rate = NETWORKS[name]

    def build(
        c: int = 96,
        position: str = "first",
        num_classes: int = 1000,
        stochastic_depth_prob: float = rate,
        **kwargs: Any,
    ) -> MoDConvNeXt:
        return MoDConvNeXt(
            layers, c, position, num_classes=num_classes, stochastic_depth_prob=stochastic_depth_prob, **kwargs
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{layers} blocks per stage; arguments as :class:`MoDConvNeXt`."""
    return build


convnext_tiny_mod = _builder("convnext_tiny_mod")
convnext_small_mod = _builder("convnext_small_mod")

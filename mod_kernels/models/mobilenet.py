"""MobileNetV2-MoD: in each stage every block with an odd index is a MoD block (arXiv 2409.17016, section 4).

Parameters are the paper's. Its GMAC, 0.221 and 0.345 (L), are 7 and 6 % above the 0.206 and 0.327 of the matrix
products and convolutions, and so is its 0.320 for the dense network (0.301): with the elements of norms and
activations they come to 0.220, 0.344 and 0.320.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2

from .._hosts import kaiming
from ..nn import NarrowInvertedResidual
from . import _options

# (t, c, n, s) of each stage: expansion, width, blocks, stride of the first (the paper's tables).
Setting = tuple[tuple[int, int, int, int], ...]
NETWORKS: dict[str, Setting] = {
    "mobilenet_v2_mod": (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ),
    "mobilenet_v2_mod_l": (
        (1, 16, 1, 1),
        (6, 32, 2, 2),
        (6, 64, 3, 2),
        (6, 96, 4, 2),
        (6, 128, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ),
}


class MoDMobileNetV2(MobileNetV2):
    """torchvision's MobileNetV2 with a :class:`mod_kernels.nn.MoDBlock` at every odd index of every stage.

    ``features`` is a flat row of blocks, as torchvision's, here a :class:`mod_kernels.nn.MoDStage`.

    Args:
        setting: (t, c, n, s) of each stage, as torchvision's ``inverted_residual_setting``.
        c: k = max(1, C // c) channels are processed.
        position: where MoD blocks add their result: ``"first"``, ``"last"`` or ``"original"``.
        **kwargs: torchvision's own (num_classes, width_mult, norm_layer, dropout, ...).
    """

    def __init__(self, setting: Setting, c: int = 16, position: str = "first", **kwargs: Any) -> None:
        _options.check(c, position)
        odd = iter([i % 2 == 1 for _, _, blocks, _ in setting for i in range(blocks)])

        def block(inp: int, oup: int, stride: int, expand_ratio: int, norm_layer: _Norm) -> nn.Module:
            # torchvision's constructor initialises every nn.Linear, and wants biases of them: the MoD blocks,
            # whose selectors keep PyTorch's values, come after it.
            if next(odd):
                return _Place(inp, expand_ratio, norm_layer)
            return InvertedResidual(inp, oup, stride, expand_ratio, norm_layer)

        super().__init__(inverted_residual_setting=[list(one) for one in setting], block=block, **kwargs)
        blocks = (
            _options.mod_block(one.channels, c, position, one.narrow) if isinstance(one, _Place) else one
            for one in self.features
        )
        self.features = _options.stage(blocks)


_Norm = Callable[[int], nn.Module]


class _Place(nn.Identity):
    """Where a MoD block goes."""

    def __init__(self, channels: int, expand: int, norm_layer: _Norm) -> None:
        super().__init__()
        self.channels, self.narrow = channels, partial(_narrow, expand=expand, norm_layer=norm_layer)


def _narrow(k: int, expand: int, norm_layer: _Norm) -> NarrowInvertedResidual:
    """Initialised as torchvision's MobileNetV2 does its blocks (norms start as PyTorch's)."""
    block = NarrowInvertedResidual(k, expand, norm_layer)
    kaiming(block)
    return block


def _builder(name: str) -> Callable[..., MoDMobileNetV2]:
    setting = NETWORKS[name]

    def build(c: int = 16, position: str = "first", num_classes: int = 1000, **kwargs: Any) -> MoDMobileNetV2:
        return MoDMobileNetV2(setting, c, position, num_classes=num_classes, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""(t, c, n, s) {setting}; arguments as :class:`MoDMobileNetV2`."""
    return build


mobilenet_v2_mod = _builder("mobilenet_v2_mod")
mobilenet_v2_mod_l = _builder("mobilenet_v2_mod_l")

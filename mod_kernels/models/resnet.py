"""ResNet-MoD: in each stage every block with an odd index is a MoD block (arXiv 2409.17016, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ..nn import MoDStage, NarrowBasicBlock, NarrowBottleneck
from . import _options

# name -> host block, blocks per stage (the paper's tables)
NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, int, int, int]]] = {
    "resnet18_mod": (BasicBlock, (2, 2, 2, 2)),
    "resnet26_mod": (BasicBlock, (2, 2, 3, 4)),
    "resnet34_mod": (BasicBlock, (3, 4, 6, 3)),
    "resnet42_mod": (BasicBlock, (3, 3, 6, 6)),
    "resnet50_mod": (Bottleneck, (3, 4, 6, 3)),
    "resnet75_mod": (Bottleneck, (3, 4, 14, 3)),
    "resnet86_mod": (Bottleneck, (3, 4, 18, 3)),
    "resnet101_mod": (Bottleneck, (3, 4, 23, 3)),
    "resnet152_mod": (Bottleneck, (3, 8, 36, 3)),
}
_NARROW = {BasicBlock: NarrowBasicBlock, Bottleneck: NarrowBottleneck}


class MoDResNet(ResNet):
    """torchvision's ResNet with a :class:`mod_kernels.nn.MoDBlock` at every odd index of every stage.

    Args:
        block: torchvision's BasicBlock or Bottleneck.
        layers: blocks per stage.
        c: k = max(1, C // c) channels are processed.
        position: where MoD blocks add their result: ``"first"``, ``"last"`` or ``"original"``.
        stem: ``"imagenet"`` (7x7 of stride 2, max pool) or ``"cifar"`` (3x3 of stride 1, no pool).
        **kwargs: torchvision's own (num_classes, norm_layer, zero_init_residual, ...).
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: tuple[int, ...],
        c: int = 64,
        position: str = "first",
        stem: str = "imagenet",
        **kwargs: Any,
    ) -> None:
        _options.check(c, position, stem)
        # Plain attributes, set first: ResNet's constructor calls _make_layer.
        self._c, self._position = c, position
        super().__init__(block, list(layers), **kwargs)
        if stem == "cifar":
            cifar_stem(self)
        if kwargs.get("zero_init_residual"):
            for module in self.modules():
                if isinstance(module, (NarrowBasicBlock, NarrowBottleneck)):
                    norm = module.layers()[-1][1]
                    if getattr(norm, "weight", None) is not None:
                        nn.init.zeros_(norm.weight)

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> MoDStage:
        """As torchvision's, but nothing is built that a MoD block would replace.

        The narrowed convolutions get torchvision's initial values from ResNet's constructor, which goes
        through all convolutions and norms; the selectors keep nn.Linear's.
        """
        first = super()._make_layer(block, planes, 1, stride, dilate)  # sets inplanes and dilation
        stage = list(first)
        channels, norm_layer = self.inplanes, self._norm_layer
        for i in range(1, blocks):
            if i % 2:
                narrow = partial(_NARROW[block], norm_layer=norm_layer)
                stage.append(_options.mod_block(channels, self._c, self._position, narrow))
            else:
                stage.append(
                    block(
                        channels,
                        planes,
                        groups=self.groups,
                        base_width=self.base_width,
                        dilation=self.dilation,
                        norm_layer=norm_layer,
                    )
                )
        return _options.stage(stage)


def cifar_stem(network: ResNet) -> None:
    """A 3x3 of stride 1 and no pool, for 32x32 input."""
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def _builder(name: str) -> Callable[..., MoDResNet]:
    block, layers = NETWORKS[name]

    def build(
        c: int = 64, position: str = "first", num_classes: int = 1000, stem: str = "imagenet", **kwargs: Any
    ) -> MoDResNet:
        return MoDResNet(block, layers, c, position, stem, num_classes=num_classes, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{block.__name__}, {layers} blocks per stage; arguments as :class:`MoDResNet`."""
    return build


resnet18_mod = _builder("resnet18_mod")
resnet26_mod = _builder("resnet26_mod")
resnet34_mod = _builder("resnet34_mod")
resnet42_mod = _builder("resnet42_mod")
resnet50_mod = _builder("resnet50_mod")
resnet75_mod = _builder("resnet75_mod")
resnet86_mod = _builder("resnet86_mod")
resnet101_mod = _builder("resnet101_mod")
resnet152_mod = _builder("resnet152_mod")

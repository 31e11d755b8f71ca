"""VGG-BN-MoD: in each stage every convolution with an odd index is a MoD block (arXiv 2409.17016, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torchvision.models.vgg import VGG, cfgs, make_layers

from .._hosts import narrow_conv
from . import _options

# name -> widths and poolings, torchvision's configurations of 16 and 19 layers
Configuration = list[str | int]
NETWORKS: dict[str, Configuration] = {"vgg16_bn_mod": cfgs["D"], "vgg19_bn_mod": cfgs["E"]}


class StemVGG(VGG):
    """torchvision's VGG with batch norm, for ImageNet or in the form that the paper has for CIFAR.

    That form's classifier is derived: 512 -> 512 -> 512 -> classes on the last pooled map gives the parameters
    that the paper prints for VGG16-BN and VGG19-BN, dense and MoD.

    Args:
        configuration: widths and poolings, as torchvision's ``cfgs`` have them.
        num_classes: outputs.
        stem: ``"imagenet"``, torchvision's classifier, or ``"cifar"``, the small one, for 32x32 input.
        dropout: between the layers of the classifier.
    """

    def __init__(
        self,
        configuration: Configuration,
        num_classes: int = 1000,
        stem: str = "imagenet",
        dropout: float = 0.5,
    ) -> None:
        _options.check_stem(stem)
        features = make_layers(configuration, batch_norm=True)
        # torchvision's classifier is 120 million parameters: not made in earnest only to be replaced.
        with torch.device("meta") if stem == "cifar" else nullcontext():
            super().__init__(features, num_classes, dropout=dropout)
        if stem == "cifar":
            width = next(entry for entry in reversed(configuration) if entry != "M")
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(
                nn.Linear(width, width),
                nn.ReLU(True),
                nn.Dropout(dropout),
                nn.Linear(width, width),
                nn.ReLU(True),
                nn.Dropout(dropout),
                nn.Linear(width, num_classes),
            )


class MoDVGG(StemVGG):
    """:class:`StemVGG` with a :class:`mod_kernels.nn.MoDBlock` for every odd-indexed convolution of a stage.

    A stage is what lies between two poolings. A MoD block stands for a convolution with its norm and its ReLU, in
    one place of ``features``, which is a flat row, as torchvision's, here a :class:`mod_kernels.nn.MoDStage`.

    Args:
        c: k = max(1, C // c) channels are processed.
        position: where MoD blocks add their result: ``"first"``, ``"last"`` or ``"original"``.
        configuration, num_classes, stem, dropout: as :class:`StemVGG`.
    """

    def __init__(
        self,
        configuration: Configuration,
        c: int = 64,
        position: str = "first",
        num_classes: int = 1000,
        stem: str = "imagenet",
        dropout: float = 0.5,
    ) -> None:
        _options.check(c, position, stem)
        super().__init__(configuration, num_classes, stem, dropout)
        layers, index = [], 0
        rest = iter(self.features)
        for layer in rest:
            if isinstance(layer, nn.MaxPool2d):
                index = 0
            elif isinstance(layer, nn.Conv2d):
                if index % 2:
                    norm, _ = next(rest), next(rest)  # and its ReLU
                    narrow = partial(narrow_conv, layer, norm)
                    layer = _options.mod_block(layer.out_channels, c, position, narrow)
                index += 1
            layers.append(layer)
        self.features = _options.stage(layers)


def _builder(name: str) -> Callable[..., MoDVGG]:
    configuration = NETWORKS[name]

    def build(
        c: int = 64,
        position: str = "first",
        num_classes: int = 1000,
        stem: str = "imagenet",
        dropout: float = 0.5,
    ) -> MoDVGG:
        return MoDVGG(configuration, c, position, num_classes, stem, dropout)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Widths and poolings {configuration}; arguments as :class:`MoDVGG`."""
    return build


vgg16_bn_mod = _builder("vgg16_bn_mod")
vgg19_bn_mod = _builder("vgg19_bn_mod")

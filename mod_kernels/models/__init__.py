"""The paper's networks and ConvNeXt's, built on torchvision's own classes (torchvision must be installed)."""

from . import convnext, mobilenet, resnet, vgg
from .convnext import MoDConvNeXt, convnext_small_mod, convnext_tiny_mod
from .mobilenet import MoDMobileNetV2, mobilenet_v2_mod, mobilenet_v2_mod_l
from .peers import PEERS, dense_peer
from .resnet import (
    MoDResNet,
    resnet18_mod,
    resnet26_mod,
    resnet34_mod,
    resnet42_mod,
    resnet50_mod,
    resnet75_mod,
    resnet86_mod,
    resnet101_mod,
    resnet152_mod,
)
from .vgg import MoDVGG, vgg16_bn_mod, vgg19_bn_mod

__all__ = [
    "PEERS",
    "MoDConvNeXt",
    "MoDMobileNetV2",
    "MoDResNet",
    "MoDVGG",
    "convnext_small_mod",
    "convnext_tiny_mod",
    "dense_peer",
    "list_models",
    "mobilenet_v2_mod",
    "mobilenet_v2_mod_l",
    "resnet18_mod",
    "resnet26_mod",
    "resnet34_mod",
    "resnet42_mod",
    "resnet50_mod",
    "resnet75_mod",
    "resnet86_mod",
    "resnet101_mod",
    "resnet152_mod",
    "vgg16_bn_mod",
    "vgg19_bn_mod",
]


def list_models() -> list[str]:
    """Names of the builders in this module."""
    return [name for family in (resnet, mobilenet, vgg, convnext) for name in family.NETWORKS]

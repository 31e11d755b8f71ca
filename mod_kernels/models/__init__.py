"""The paper's networks, built on torchvision's own classes (torchvision must be installed)."""

from .resnet import (
    NETWORKS,
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

__all__ = [
    "MoDResNet",
    "list_models",
    "resnet18_mod",
    "resnet26_mod",
    "resnet34_mod",
    "resnet42_mod",
    "resnet50_mod",
    "resnet75_mod",
    "resnet86_mod",
    "resnet101_mod",
    "resnet152_mod",
]


def list_models() -> list[str]:
    """Names of the builders in this module."""
    return list(NETWORKS)

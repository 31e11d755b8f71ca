"""The dense network that each MoD network is measured against: the paper's speed-up columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision.models as dense
from torch import nn
from torchvision.models.resnet import ResNet

from . import _options, vgg
from .resnet import cifar_stem


def _resnet(build: Callable[..., ResNet]) -> Callable[..., ResNet]:
    def peer(stem: str = "imagenet", **kwargs: Any) -> ResNet:
        _options.check_stem(stem)
        network = build(**kwargs)
        if stem == "cifar":
            cifar_stem(network)
        return network

    return peer


def _vgg(name: str) -> Callable[..., vgg.StemVGG]:
    def peer(**kwargs: Any) -> vgg.StemVGG:
        return vgg.StemVGG(vgg.NETWORKS[name], **kwargs)

    return peer


PEERS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "resnet18_mod": ("resnet18", _resnet(dense.resnet18)),
    "resnet26_mod": ("resnet18", _resnet(dense.resnet18)),
    "resnet34_mod": ("resnet34", _resnet(dense.resnet34)),
    "resnet42_mod": ("resnet34", _resnet(dense.resnet34)),
    "resnet50_mod": ("resnet50", _resnet(dense.resnet50)),
    "resnet75_mod": ("resnet50", _resnet(dense.resnet50)),
    "resnet86_mod": ("resnet50", _resnet(dense.resnet50)),
    "resnet101_mod": ("resnet101", _resnet(dense.resnet101)),
    "resnet152_mod": ("resnet101", _resnet(dense.resnet101)),
    "mobilenet_v2_mod": ("mobilenet_v2", dense.mobilenet_v2),
    "mobilenet_v2_mod_l": ("mobilenet_v2", dense.mobilenet_v2),
    "vgg16_bn_mod": ("vgg16_bn", _vgg("vgg16_bn_mod")),
    "vgg19_bn_mod": ("vgg19_bn", _vgg("vgg19_bn_mod")),
    "convnext_tiny_mod": ("convnext_tiny", dense.convnext_tiny),
    "convnext_small_mod": ("convnext_small", dense.convnext_small),
}


def dense_peer(name: str, **kwargs: Any) -> nn.Module:
    """The dense network, untrained, that the MoD network ``name`` is measured against.

    Arguments are those of the MoD network, without c and position: ``num_classes``, ResNets' and VGGs' ``stem``.

    Raises:
        ValueError: a name that :func:`mod_kernels.models.list_models` does not have.
    """
    if name not in PEERS:
        raise ValueError(f"name must be one of {', '.join(PEERS)}, got {name!r}")
    return PEERS[name][1](**kwargs)

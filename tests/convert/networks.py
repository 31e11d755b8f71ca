"""Small dense networks of every host, and what the tests of convert look at in them."""

import warnings
from collections import OrderedDict

import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mod_kernels import MoDBlock, convert, reference
from mod_kernels.nn import (
    NarrowBasicBlock,
    NarrowBottleneck,
    NarrowConv,
    NarrowConvNeXt,
    NarrowInvertedResidual,
)


def resnet(block=BasicBlock, layers=(2, 1, 3, 2), **kwargs):
    return ResNet(block, list(layers), num_classes=5, **kwargs)


def mobilenet(**kwargs):
    setting = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 32, 1, 2]]
    return MobileNetV2(num_classes=5, inverted_residual_setting=setting, **kwargs)


def vgg():
    layers = torchvision.models.vgg.make_layers([16, 16, "M", 32, 32, 32, "M", 32, "M"], batch_norm=True)
    return nn.Sequential(OrderedDict(features=layers, pool=nn.AdaptiveAvgPool2d(1)))


def convnext(**kwargs):
    setting = [CNBlockConfig(16, 32, 3), CNBlockConfig(32, None, 2)]
    return ConvNeXt(setting, num_classes=5, layer_scale=0.5, **kwargs)


# Builder -> the MoD blocks' names, their conv block.
HOSTS = {
    "basic": (resnet, ["layer1.1", "layer3.1", "layer4.1"], NarrowBasicBlock),
    "bottleneck": (
        lambda: resnet(Bottleneck, (2, 1, 1, 3)),
        ["layer1.1", "layer4.1"],
        NarrowBottleneck,
    ),
    "inverted_residual": (mobilenet, ["features.3", "features.5"], NarrowInvertedResidual),
    "vgg": (vgg, ["features.3", "features.8"], NarrowConv),
    "convnext": (convnext, ["features.1.1", "features.3.1"], NarrowConvNeXt),
}


def quietly(*args, **kwargs):
    """convert, where single-block stages are part of the architecture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="convert left", category=UserWarning)
        return convert(*args, **kwargs)


def mod_blocks(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoDBlock)}


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def by_hand(stage, x):
    """The stage, its MoD blocks in the reference's steps: where a selector's ReLU leaves zeros, logits tie."""
    for block in stage:
        if isinstance(block, MoDBlock):
            fc1, fc2 = block.selector.fc1.weight, block.selector.fc2.weight
            scores, index = reference.select_channels(x, fc1, fc2, block.k)
            z = block.conv_block(reference.gather_channels(x, index))
            x = reference.fuse_channels(x, z, scores, index, block.position)
        else:
            x = block(x)
    return x


class Plain(nn.Module):
    """A block of nobody's."""

    def __init__(self, channels, out=None, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, out or channels, 3, stride, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x))


class Network(nn.Module):
    def __init__(self, *blocks, row=nn.Sequential):
        super().__init__()
        self.stage = row(*blocks) if row is nn.Sequential else row(blocks)

    def forward(self, x):
        for block in self.stage:
            x = block(x)
        return x

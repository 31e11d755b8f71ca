"""MoD blocks and inputs that the tests of modules share."""

from __future__ import annotations

import torch
from torch import nn

from mod_kernels import MoDBlock
from mod_kernels.nn import NarrowBottleneck

CHANNELS, K = 32, 8


def make_block(conv_block=None, dtype=torch.float32, **options):
    """A block with a wide selector (no dead hidden layer, no ties) and BN statistics that are not trivial."""
    block = MoDBlock(CHANNELS, conv_block or NarrowBottleneck(K), K, **{"reduction": 2, **options})
    with torch.no_grad():
        block.selector.fc1.weight.mul_(8)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return block.to(dtype)


def feature_map(dtype=torch.float32):
    return torch.randn(3, CHANNELS, 7, 5, dtype=torch.float64).to(dtype)

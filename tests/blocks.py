"""MoD blocks and inputs that the tests of modules share."""

from __future__ import annotations

import torch
from torch import nn

from mod_kernels import MoDBlock
from mod_kernels.nn import NarrowBottleneck

CHANNELS, K = 32, 8


def make_block(conv_block=None, dtype=torch.float32, k=K, **options):
    """A block with a wide selector (no dead hidden layer, no ties) and BN statistics that are not trivial."""
    block = MoDBlock(CHANNELS, conv_block or NarrowBottleneck(k), k, **{"reduction": 2, **options})
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


def without_ties(model):
    """``model`` with selectors whose hidden layer is never dead: all of a sample's logits would be 0, and tie.

    In our models x is a ReLU's output, so positive weights leave every hidden unit positive.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoDBlock):
                module.selector.fc1.weight.abs_()
    return model

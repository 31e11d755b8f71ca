"""What the tests of exports share: networks to export, and a look at the graph."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from mod_kernels.nn import (
    MoDStage,
    NarrowBasicBlock,
    NarrowBottleneck,
    NarrowConv,
    NarrowConvNeXt,
    NarrowInvertedResidual,
)

from ..blocks import CHANNELS, K, make_block

# A runtime's float32 sums against ours, through up to fifty layers; a wrong layer is off by 1e-1.
AGREES = 1e-5

CONV_BLOCKS = {
    "bottleneck": NarrowBottleneck,
    "basic": NarrowBasicBlock,
    "inverted_residual": NarrowInvertedResidual,
    "conv": NarrowConv,
    "convnext": lambda k: NarrowConvNeXt(k, layer_scale=1.0),
}


def small_network(conv_block=None, **options):
    """A convolution and a stage of a residual block and a MoD block, (N, 3, H, W) to (N, CHANNELS, H, W)."""
    block = make_block(conv_block or NarrowBottleneck(K), overwrite_input=True, **options)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1), MoDStage(BasicBlock(CHANNELS, CHANNELS), block)
    ).eval()


def operators(program):
    """The names of the operators in an exported program, those of its subgraphs too."""
    return [
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and "getitem" not in str(node.target)
    ]

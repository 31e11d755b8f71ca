"""Modules: the channel selector, the MoD block, the narrowed conv blocks, and a stage that saves a pass."""

from ._endings import FoldedNorm
from ._folding import FoldedConvs, fold_batch_norm
from .conv_blocks import NarrowBasicBlock, NarrowBottleneck, NarrowConv, NarrowInvertedResidual
from .convnext import NarrowConvNeXt
from .mod_block import MoDBlock
from .selector import ChannelSelector
from .stage import MoDStage

__all__ = [
    "FUSED_CONV_BLOCKS",
    "ChannelSelector",
    "FoldedConvs",
    "FoldedNorm",
    "MoDBlock",
    "MoDStage",
    "NarrowBasicBlock",
    "NarrowBottleneck",
    "NarrowConv",
    "NarrowConvNeXt",
    "NarrowInvertedResidual",
    "fold_batch_norm",
]

# By exact class: what a subclass computes is not known.
FUSED_CONV_BLOCKS = (NarrowBottleneck, NarrowBasicBlock, NarrowInvertedResidual, NarrowConv, NarrowConvNeXt)

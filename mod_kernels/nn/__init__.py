"""Modules: the channel selector, the MoD block, the narrowed conv blocks, and a stage that saves a pass."""

from ._folding import FoldedConvs, fold_batch_norm
from .conv_blocks import NarrowBasicBlock, NarrowBottleneck
from .mod_block import MoDBlock
from .selector import ChannelSelector
from .stage import MoDStage

__all__ = [
    "ChannelSelector",
    "FoldedConvs",
    "MoDBlock",
    "MoDStage",
    "NarrowBasicBlock",
    "NarrowBottleneck",
    "fold_batch_norm",
]

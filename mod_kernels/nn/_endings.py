"""How the standard blocks end: an addition, a ReLU, or both, which can also pool for the MoD block after them.

The blocks are known by name, so that torchvision is not imported for it; by exact class, because a subclass may do
something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ._hooks import is_untouched


class Ending(NamedTuple):
    """What is left to do of a block: ``out + identity`` (None: no addition), then the ReLU if it has one.

    ``out`` may be written: nothing else reads it. ``in_place``: torchvision's own addition goes into it.
    """

    out: Tensor
    identity: Tensor | None
    relu: bool
    in_place: bool = True

    def plainly(self) -> Tensor:
        """As torchvision writes it: its roundings and its dtype where the two differ."""
        out = self.out
        if self.identity is not None and self.in_place:
            out += self.identity
        elif self.identity is not None:
            out = self.identity + out
        return F.relu(out, inplace=True) if self.relu else out


Parts = Callable[[nn.Module, Tensor], Ending]
Applies = Callable[[nn.Module, nn.Module | None], bool]  # of a block, and the module before it in the stage


def _basic_block(block: nn.Module, x: Tensor) -> Ending:
    out = block.relu(block.bn1(block.conv1(x)))
    return Ending(block.bn2(block.conv2(out)), _shortcut(block, x), True)


def _bottleneck(block: nn.Module, x: Tensor) -> Ending:
    out = block.relu(block.bn1(block.conv1(x)))
    out = block.relu(block.bn2(block.conv2(out)))
    return Ending(block.bn3(block.conv3(out)), _shortcut(block, x), True)


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def _ends_in_plain_relu(block: nn.Module, before: nn.Module | None) -> bool:
    return type(block.relu) is nn.ReLU and is_untouched(block.relu)


def _inverted_residual(block: nn.Module, x: Tensor) -> Ending:
    return Ending(block.conv(x), x, False, in_place=False)


def _adds_to_a_norms_output(block: nn.Module, before: nn.Module | None) -> bool:
    """Without an addition there is nothing to fuse. The sum is a fresh tensor in the plain form: nobody may hold
    the one it is written into here.
    """
    branch = block.conv
    return (
        block.use_res_connect and type(branch) is nn.Sequential and is_untouched(branch) and _is_norm(branch[-1])
    )


def _cn_block(block: nn.Module, x: Tensor) -> Ending:
    return Ending(block.stochastic_depth(block.layer_scale * block.block(x)), x, False)


def _relu(block: nn.Module, x: Tensor) -> Ending:
    return Ending(x, None, True)


def _writes_into_a_norms_output(block: nn.Module, before: nn.Module | None) -> bool:
    """The ReLU of a flat row of conv, norm and ReLU, as in VGG."""
    return block.inplace and before is not None and _is_norm(before)


class FoldedNorm(nn.Identity):
    """Where a batch norm was, which is folded into the convolution before it."""


def _is_norm(module: nn.Module) -> bool:
    """A norm, or the convolution it is folded into: the output is a fresh map that nobody has seen."""
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, FoldedNorm) and is_untouched(module)


def _always(block: nn.Module, before: nn.Module | None) -> bool:
    return True


_ENDINGS: dict[tuple[str, str], tuple[Parts, Applies]] = {
    ("torchvision.models.resnet", "BasicBlock"): (_basic_block, _ends_in_plain_relu),
    ("torchvision.models.resnet", "Bottleneck"): (_bottleneck, _ends_in_plain_relu),
    ("torchvision.models.mobilenetv2", "InvertedResidual"): (_inverted_residual, _adds_to_a_norms_output),
    ("torchvision.models.convnext", "CNBlock"): (_cn_block, _always),
    ("torch.nn.modules.activation", "ReLU"): (_relu, _writes_into_a_norms_output),
}


def parts_of(block: nn.Module, before: nn.Module | None) -> Parts | None:
    """What runs a standard block up to its ending, or None where it has to be called as it is."""
    entry = _ENDINGS.get((type(block).__module__, type(block).__qualname__))
    if entry is None or not is_untouched(block):
        return None
    parts, applies = entry
    return parts if applies(block, before) else None

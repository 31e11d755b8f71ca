"""A stage of alternating blocks in which a standard block's ending pools for the MoD block after it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from .._tracing import exporting
from ._hooks import is_untouched
from .mod_block import MoDBlock


def _basic_branch(block: nn.Module, x: Tensor) -> Tensor:
    out = block.relu(block.bn1(block.conv1(x)))
    return block.bn2(block.conv2(out))


def _bottleneck_branch(block: nn.Module, x: Tensor) -> Tensor:
    out = block.relu(block.bn1(block.conv1(x)))
    out = block.relu(block.bn2(block.conv2(out)))
    return block.bn3(block.conv3(out))


# A standard block's forward up to its ending (`out += identity`, ReLU), by exact class: a subclass may do
# something else. By name, so that torchvision is not imported for it.
_BRANCHES: dict[tuple[str, str], Callable[[nn.Module, Tensor], Tensor]] = {
    ("torchvision.models.resnet", "BasicBlock"): _basic_branch,
    ("torchvision.models.resnet", "Bottleneck"): _bottleneck_branch,
}


class MoDStage(nn.Sequential):
    """A ``nn.Sequential``, with the same keys and the same numbers, that saves the MoD blocks a pass over x.

    Where torchvision's own ``BasicBlock`` or ``Bottleneck`` stands before a :class:`MoDBlock`, its ending
    ``relu(out + identity)`` also takes the mean of every plane as it writes it
    (:func:`mod_kernels.functional.add_relu_pool_`), and the MoD block gets them. Every other block, and any
    block that has hooks, a replaced ``forward`` or a compiled one, is called as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if exporting() or _has_any_global_hook():
            return super().forward(x)
        blocks, pooled, done = list(self), None, False
        for block, following in zip(blocks, [*blocks, None][1:], strict=True):
            branch = _branch_of(block) if _takes_pooled(following) else None
            if done:  # with the block before
                done = False
            elif branch is not None:
                x, pooled, done = _run_with(following, block, branch, x)
            else:
                x, pooled = (block(x) if pooled is None else block(x, pooled)), None
        return x


def _run_with(
    following: MoDBlock, block: nn.Module, branch: Callable, x: Tensor
) -> tuple[Tensor, Tensor | None, bool]:
    """``block(x)``, the means of its planes for ``following``, False; or what following made of it, None, True."""
    out = branch(block, x)
    identity = x if block.downsample is None else block.downsample(x)
    if identity.dtype != out.dtype or identity.shape != out.shape:
        # Autocast may leave the two in different dtypes; the addition then rounds by PyTorch's own rules.
        out += identity
        return F.relu(out, inplace=True), None, False
    # Into out, as torchvision does: it is fresh from the norm layer.
    y = following.after_ending(out, identity)
    if y is not None:
        return y, None, True
    return *functional.add_relu_pool_(out, identity), False


def _takes_pooled(block: nn.Module | None) -> bool:
    return type(block) is MoDBlock and is_untouched(block)


def _branch_of(block: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """The branch of a standard block that may be run in parts, or None."""
    branch = _BRANCHES.get((type(block).__module__, type(block).__qualname__))
    if branch is None or not is_untouched(block):
        return None
    relu = block.relu
    return branch if type(relu) is nn.ReLU and is_untouched(relu) else None

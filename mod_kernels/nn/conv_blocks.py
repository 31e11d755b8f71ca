"""The narrowed conv blocks: a host network's residual branch at k channels, without its shortcut.

Each ends as its host's branch ends, at the last BN: the host's ReLU comes after its addition, and here the
fusion is the addition. ``final_relu=True`` is the other reading of the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from . import _conv_training
from ._folding import FoldedConvs, fold_batch_norm


class NarrowConvBlock(nn.Module):
    """What the blocks below share: a row of (conv, norm) pairs, a ReLU between, and its folded form."""

    kind: str  # of mod_kernels.spec.CONV_KINDS

    def __init__(self, k: int, final_relu: bool) -> None:
        super().__init__()
        self.k, self.final_relu = k, final_relu

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """The (conv, norm) pairs in the order they run."""
        raise NotImplementedError

    def folded(self) -> FoldedConvs:
        """This block in eval mode as plain convolutions with biases; detached, float32 (float64 for float64)."""
        weights, biases = zip(*(fold_batch_norm(conv, norm) for conv, norm in self.layers()), strict=True)
        return FoldedConvs(self.kind, weights, biases, self.final_relu)

    def forward(self, x: Tensor) -> Tensor:
        """(N, k, H, W) to the same."""
        layers = self.layers()
        z = _conv_training.run(layers, x, self.final_relu)
        if z is not None:
            return z
        for conv, norm in layers[:-1]:
            x = F.relu(norm(conv(x)), inplace=True)
        conv, norm = layers[-1]
        x = norm(conv(x))
        return F.relu(x, inplace=True) if self.final_relu else x

    def extra_repr(self) -> str:
        return "final_relu=True" if self.final_relu else ""


class NarrowBottleneck(NarrowConvBlock):
    """1x1 ``k -> m``, 3x3 ``m -> m``, 1x1 ``m -> k`` with m = max(1, k // 4); BN after each, ReLU between.

    Args:
        k: channels in and out.
        final_relu: a ReLU at the end.
        norm_layer: makes the norm from a number of channels (only BatchNorm2d can be folded).
    """

    kind = "bottleneck"

    def __init__(
        self, k: int, final_relu: bool = False, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__(k, final_relu)
        mid = max(1, k // 4)
        self.conv1 = nn.Conv2d(k, mid, 1, bias=False)
        self.bn1 = norm_layer(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, padding=1, bias=False)
        self.bn2 = norm_layer(mid)
        self.conv3 = nn.Conv2d(mid, k, 1, bias=False)
        self.bn3 = norm_layer(k)

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class NarrowBasicBlock(NarrowConvBlock):
    """Two 3x3 ``k -> k``; BN after each, ReLU between. Arguments as :class:`NarrowBottleneck`."""

    kind = "basic"

    def __init__(
        self, k: int, final_relu: bool = False, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__(k, final_relu)
        self.conv1 = nn.Conv2d(k, k, 3, padding=1, bias=False)
        self.bn1 = norm_layer(k)
        self.conv2 = nn.Conv2d(k, k, 3, padding=1, bias=False)
        self.bn2 = norm_layer(k)

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]

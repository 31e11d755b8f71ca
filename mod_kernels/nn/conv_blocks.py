"""The narrowed conv blocks of convolutions and batch norms: a host network's residual branch at k channels.

Without its shortcut: the fusion is the addition. Each ends as its host's branch ends. ConvNeXt's is in
:mod:`mod_kernels.nn.convnext`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import CONV_KINDS, EXPANSION
from . import _conv_training
from ._folding import FoldedConvs, fold_batch_norm, tensor_slots

NormLayer = Callable[[int], nn.Module]  # makes a norm from a number of channels


class NarrowConvBlock(nn.Module):
    """What :class:`mod_kernels.nn.MoDBlock` knows of a conv block that can run inside the fused op."""

    kind: str  # of mod_kernels.spec.CONV_KINDS

    def __init__(self, k: int, final_relu: bool = False) -> None:
        super().__init__()
        self.k, self.final_relu = k, final_relu

    def folded(self) -> FoldedConvs:
        """This block in eval mode as plain convolutions with biases; detached, float32 (float64 for float64)."""
        raise NotImplementedError

    def why_not_folded(self) -> str:
        """Why :meth:`folded` would not be what the block computes, by what it is made of; ``""`` if it would."""
        raise NotImplementedError

    def called(self) -> list[nn.Module]:
        """The modules that forward calls."""
        raise NotImplementedError

    def norms(self) -> list[nn.Module]:
        """Those of them whose ``eps`` and ``training`` count."""
        raise NotImplementedError

    def tensor_slots(self) -> Iterator[tuple[dict, str]]:
        """Where each tensor that goes into the folded form is held: (a module's table, its name there)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return "final_relu=True" if self.final_relu else ""


class ConvNormBlock(NarrowConvBlock):
    """A row of (conv, batch norm) pairs, with an activation between."""

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """The (conv, norm) pairs in the order they run."""
        raise NotImplementedError

    def called(self) -> list[nn.Module]:
        return [layer for pair in self.layers() for layer in pair]

    def norms(self) -> list[nn.Module]:
        return [norm for _, norm in self.layers()]

    def folded(self) -> FoldedConvs:
        weights, biases = zip(*(fold_batch_norm(conv, norm) for conv, norm in self.layers()), strict=True)
        return FoldedConvs(self.kind, weights, biases, self.final_relu)

    def tensor_slots(self) -> Iterator[tuple[dict, str]]:
        for layer in self.called():
            yield from tensor_slots(layer)
        for norm in self.norms():
            yield norm._buffers, "running_mean"
            yield norm._buffers, "running_var"
            # PyTorch's own batch norm writes the two above without counting it in their versions.
            if "num_batches_tracked" in norm._buffers:
                yield norm._buffers, "num_batches_tracked"

    def why_not_folded(self) -> str:
        shapes = CONV_KINDS[self.kind].shapes(self._mid_channels(), self.k)
        for i, ((conv, norm), shape) in enumerate(zip(self.layers(), shapes, strict=True), 1):
            if type(conv) is not nn.Conv2d:
                return f"conv{i} is a {type(conv).__name__}, not nn.Conv2d"
            if not _is_plain(conv):
                return f"conv{i} is not of stride 1, zero padding (kernel - 1) / 2, one group or depthwise: {conv}"
            if tuple(conv.weight.shape) != shape:
                return f"conv{i}'s weights do not fit a {self.kind!r} of k={self.k}"
            if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
                return f"bn{i} is a {type(norm).__name__}, not nn.BatchNorm2d"
            if norm.running_mean is None or norm.running_var is None:
                return f"bn{i} keeps no running statistics"
        return ""

    def _mid_channels(self) -> int:
        conv = self.layers()[0][0]
        return conv.weight.shape[0] if isinstance(conv, nn.Conv2d) else 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, k, H, W) to the same."""
        layers = self.layers()
        between = CONV_KINDS[self.kind].between
        if "relu6" not in between:
            z = _conv_training.run(layers, x, self.final_relu)
            if z is not None:
                return z
        for (conv, norm), then in zip(layers[:-1], between, strict=True):
            x = _ACTIVATIONS[then](norm(conv(x)), inplace=True)
        conv, norm = layers[-1]
        x = norm(conv(x))
        return F.relu(x, inplace=True) if self.final_relu else x


_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6}


def _is_plain(conv: nn.Conv2d) -> bool:
    """Stride 1, zero padding (kernel - 1) / 2, one group, or as many as there are channels."""
    kernel = conv.kernel_size
    return (
        kernel[0] % 2 == 1
        and conv.padding == tuple((size - 1) // 2 for size in kernel)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups in (1, conv.in_channels)
        and conv.padding_mode == "zeros"
    )


class NarrowBottleneck(ConvNormBlock):
    """1x1 ``k -> m``, 3x3 ``m -> m``, 1x1 ``m -> k`` with m = max(1, k // 4); BN after each, ReLU between.

    Args:
        k: channels in and out.
        final_relu: a ReLU at the end. The host's comes after its addition, so not by default; it is the other
            reading of the paper.
        norm_layer: makes the norm from a number of channels (only BatchNorm2d can be folded).
    """

    kind = "bottleneck"

    def __init__(self, k: int, final_relu: bool = False, norm_layer: NormLayer = nn.BatchNorm2d) -> None:
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


class NarrowBasicBlock(ConvNormBlock):
    """Two 3x3 ``k -> k``; BN after each, ReLU between. Arguments as :class:`NarrowBottleneck`."""

    kind = "basic"

    def __init__(self, k: int, final_relu: bool = False, norm_layer: NormLayer = nn.BatchNorm2d) -> None:
        super().__init__(k, final_relu)
        self.conv1 = nn.Conv2d(k, k, 3, padding=1, bias=False)
        self.bn1 = norm_layer(k)
        self.conv2 = nn.Conv2d(k, k, 3, padding=1, bias=False)
        self.bn2 = norm_layer(k)

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class NarrowInvertedResidual(ConvNormBlock):
    """MobileNetV2's: 1x1 ``k -> expand * k``, depthwise 3x3, 1x1 back to k; BN after each, ReLU6 between.

    Args:
        k: channels in and out.
        expand: hidden channels over k (the host's t).
        norm_layer: as :class:`NarrowBottleneck`.

    Raises:
        ValueError: expand is not an int of at least 1.
    """

    kind = "inverted_residual"

    def __init__(self, k: int, expand: int = EXPANSION, norm_layer: NormLayer = nn.BatchNorm2d) -> None:
        super().__init__(k)
        if not isinstance(expand, int) or isinstance(expand, bool) or expand < 1:
            raise ValueError(f"expand must be an int of at least 1, got {expand!r}")
        mid = expand * k
        self.conv1 = nn.Conv2d(k, mid, 1, bias=False)
        self.bn1 = norm_layer(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False)
        self.bn2 = norm_layer(mid)
        self.conv3 = nn.Conv2d(mid, k, 1, bias=False)
        self.bn3 = norm_layer(k)

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class NarrowConv(ConvNormBlock):
    """VGG's: one 3x3 ``k -> k``, BN, and the ReLU that its host's layer ends with (``final_relu=False``: none)."""

    kind = "conv"

    def __init__(
        self, k: int, final_relu: bool = True, bias: bool = False, norm_layer: NormLayer = nn.BatchNorm2d
    ) -> None:
        super().__init__(k, final_relu)
        self.conv1 = nn.Conv2d(k, k, 3, padding=1, bias=bias)
        self.bn1 = norm_layer(k)

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.conv1, self.bn1)]

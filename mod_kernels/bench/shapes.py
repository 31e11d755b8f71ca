"""The blocks that are measured: the paper's (k = C // c, selector width C // 16), and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._layout import CHANNELS_LAST, NCHW
from ..spec import CONV_KINDS, MoDSpec
from .check import exact_logits

BATCHES = (1, 8, 32)
FORMATS = {NCHW: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
# A branch a tenth as large as x: in-place blocks run again and again on one buffer, which has to stay finite
# from one refill to the next (timing.MAX_REPEATS calls).
BRANCH_SCALE = 0.1
# Gap that must separate neighbouring logits among the k + 1 largest, as a share of the largest: well above what
# float32 may do to either (1e-6 here), so that every right provider selects the same channels in the same order.
MIN_GAP = 1e-5
# c, the channels of which one is processed: for each host architecture one number.
CHANNELS_PER_PROCESSED = {"bottleneck": 64, "basic": 64, "inverted_residual": 16, "conv": 64, "convnext": 96}


@dataclass(frozen=True)
class Shape:
    """A MoD block and the size of its feature map."""

    kind: str
    channels: int
    height: int
    width: int

    @property
    def k(self) -> int:
        return max(1, self.channels // CHANNELS_PER_PROCESSED[self.kind])

    @property
    def hidden(self) -> int:
        return max(1, self.channels // 16)

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    def floor_bytes(self, batch: int, dtype: torch.dtype, training: bool = False) -> int:
        """What the block can't avoid moving: x read once, 3k/C of it, and the selector's weights.

        In training y is another tensor than x, dy is read and dx written: four maps, and the k channels twice.
        """
        plane, maps = batch * self.height * self.width, 4 if training else 1
        passes = maps * self.channels + (6 if training else 3) * self.k
        return (plane * passes + 2 * self.channels * self.hidden) * dtype.itemsize


BOTTLENECK = tuple(Shape("bottleneck", c, s, s) for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7)))
BASIC = tuple(Shape("basic", c, s, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)))
# MobileNetV2 (ImageNet), VGG-BN (CIFAR) and ConvNeXt-T (ImageNet).
INVERTED_RESIDUAL = tuple(
    Shape("inverted_residual", c, s, s) for c, s in ((24, 56), (32, 28), (64, 14), (96, 14), (160, 7))
)
CONV = tuple(Shape("conv", c, s, s) for c, s in ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2)))
CONVNEXT = tuple(Shape("convnext", c, s, s) for c, s in ((96, 56), (192, 28), (384, 14), (768, 7)))
SHAPES = {
    "bottleneck": BOTTLENECK,
    "basic": BASIC,
    "inverted_residual": INVERTED_RESIDUAL,
    "conv": CONV,
    "convnext": CONVNEXT,
}


def make_spec(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> MoDSpec:
    """A block with random weights, as the paper has it: no selector biases, position "first".

    VGG's alone ends in a ReLU, as its host's layer does.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    k, kind = shape.k, CONV_KINDS[shape.kind]
    sizes = kind.shapes(kind.host_mid(k), k)
    weights = [randn(*size) * (2.0 / (size[1] * size[2] * size[3])) ** 0.5 for size in sizes]
    biases = [randn(size[0]) * 0.1 for size in sizes]
    weights[-1], biases[-1] = weights[-1] * BRANCH_SCALE, biases[-1] * BRANCH_SCALE

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    return MoDSpec(
        place(randn(shape.hidden, shape.channels) * (2.0 / shape.channels) ** 0.5),
        place(randn(shape.channels, shape.hidden)),
        k,
        shape.kind,
        tuple(map(place, weights)),
        tuple(map(place, biases)),
        final_relu=shape.kind == "conv",
    )


def make_x(shape: Shape, batch: int, spec: MoDSpec, seed: int = 1, layout: str = NCHW) -> Tensor:
    """x (N, C, H, W), the same values in either layout, drawn again until no logits come near a tie.

    A selector without biases gives equal logits to every sample whose hidden layer is dead (one in sixteen at
    R = 4), and ``torch.topk`` promises nothing there: such samples would make right providers differ.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (shape.channels, shape.height, shape.width)
    x = torch.randn((batch, *size), generator=generator).to(spec.fc1_weight)
    for _ in range(1000):
        close = _near_tie(x, spec)
        if not close.numel():
            return x.contiguous(memory_format=FORMATS[layout])
        x[close] = torch.randn((len(close), *size), generator=generator).to(x)
    raise RuntimeError(f"no input without near ties was found for {shape.name}")


def _near_tie(x: Tensor, spec: MoDSpec) -> Tensor:
    """Samples with two neighbours closer than MIN_GAP among the k + 1 largest float64 logits."""
    logits = exact_logits(x, spec)
    largest = logits.topk(min(spec.k + 1, spec.channels), dim=1).values
    gap = (largest[:, :-1] - largest[:, 1:]).amin(1)
    return (gap <= MIN_GAP * largest.abs().amax(1)).nonzero().flatten()

"""Every variant that the launcher can choose for the paper's shapes: what is compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...spec import CONV_KINDS
from . import configs
from .configs import SCALAR_TYPES, align_of
from .tuning import DEFAULT, Tuning
from .variants import (
    Selector,
    Tail,
    Variant,
    add_relu_pool_variant,
    block_variants,
    fuse_variant,
    gather_variant,
    layers_variant,
    pair_variants,
    pool_variant,
    rank_variant,
    tail_variants,
)
from .variants_backward import (
    Needed,
    Parts,
    fuse_backward_variant,
    input_gradient_variant,
    select_backward_variants,
)


@dataclass(frozen=True)
class Shape:
    """One MoD block's sizes; ``mid`` is the width between the convolutions (k where all are 3x3)."""

    kind: str
    channels: int
    hidden: int
    k: int
    mid: int
    hw: int


def paper_shape(kind: str, channels: int, side: int, c: int = 64) -> Shape:
    """A block of the paper's: ``k = C / c``, ``R = C / 16``, the host architecture's width inside."""
    k = max(1, channels // c)
    return Shape(kind, channels, max(1, channels // 16), k, CONV_KINDS[kind].host_mid(k), side * side)


RESNET_SHAPES = tuple(
    paper_shape(kind, channels * (4 if kind == "bottleneck" else 1), side)
    for kind in ("bottleneck", "basic")
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))
)
MOBILENET_SHAPES = tuple(
    paper_shape("inverted_residual", channels, side, 16)
    for channels, side in ((24, 56), (32, 28), (64, 14), (96, 14), (160, 7))
)
# ImageNet's sizes, and the others of CIFAR's.
VGG_SHAPES = tuple(
    paper_shape("conv", channels, side)
    for channels, side in (
        (64, 224), (128, 112), (256, 56), (512, 28), (512, 14), (64, 32), (128, 16), (256, 8), (512, 4), (512, 2),
    )
)  # fmt: skip
CONVNEXT_SHAPES = tuple(
    paper_shape("convnext", channels, side, 96) for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7))
)
PAPER_SHAPES = (*RESNET_SHAPES, *MOBILENET_SHAPES, *VGG_SHAPES, *CONVNEXT_SHAPES)


def variants(
    shape: Shape, dtype: str, position: str = "first", channels_last: bool = False, tuning: Tuning = DEFAULT
) -> Iterator[Variant]:
    """Every variant that the ops launch for ``shape`` in ``dtype`` (a key of SCALAR_TYPES but float64).

    For dense x and z in one layout, weights of x's dtype and a selector without biases (the paper's), whatever the
    batch size, in place and out of place, with and without ``pooled``.
    """
    x = SCALAR_TYPES[dtype]
    aligns = align_of(shape.channels * shape.hw), align_of(shape.hw)
    tail = Tail(
        tuning, x, shape.channels, shape.k, shape.mid, shape.hw, *aligns, shape.kind, False, position,
        channels_last,
    )  # fmt: skip
    apart = configs.second_layer_apart(tuning, shape.channels, shape.hidden)
    selector = Selector(
        tuning, (x,) * 5, shape.channels, shape.hidden, shape.k, shape.hw, *aligns, channels_last, apart=apart
    )
    tail_apart = configs.tail_apart(tuning, shape.kind, shape.k, shape.mid, shape.hw)
    batches = () if tail_apart else (1, tuning.batch_samples + 1)
    ways = dict.fromkeys(configs.shared_out(tuning, shape.channels, shape.hidden, samples) for samples in batches)
    for copy in (False, True):
        for pooled in (False, True):
            for way in ways:
                block = replace(selector, copy=copy, pooled=pooled, fused=True, apart=way == "layers")
                yield from block_variants(block, tail, way).there()
    if "layers" in ways:  # fed with slots by the ending before it
        for has_b, relu in itertools.product((False, True), repeat=2):
            yield from pair_variants(replace(selector, apart=True), tail, has_b, relu)
    for copy in (False, True) if tail_apart else (False,):
        for pooled in (False, True):
            yield pool_variant(replace(selector, pooled=pooled, copy=copy))
    if apart:
        yield layers_variant(selector)
    yield rank_variant(selector)
    yield from tail_variants(tail)
    yield from plane_variants(shape, dtype, position, channels_last, tuning)


def plane_variants(
    shape: Shape, dtype: str, position: str = "first", channels_last: bool = False, tuning: Tuning = DEFAULT
) -> Iterator[Variant]:
    """Those of gather, fuse and add_relu_pool, for dense x and z in one layout; ``dtype`` may be float64."""
    x, hw_align = SCALAR_TYPES[dtype], align_of(shape.hw)
    stride = shape.channels * shape.hw
    for has_b in (False, True):
        for relu in (False, True):
            yield add_relu_pool_variant(
                tuning, x, shape.channels, shape.hw, align_of(stride), hw_align, channels_last, has_b, relu
            )
    sizes = (tuning, x, shape.channels, shape.k, shape.hw)
    yield gather_variant(*sizes, align_of(stride), hw_align, channels_last)
    for in_place in (False, True):
        aligns = align_of(stride), align_of(shape.k * shape.hw), hw_align
        # z of one channel fits both layouts, and counts as NCHW.
        z_channels_last = channels_last and shape.k > 1
        yield fuse_variant(*sizes, *aligns, position, channels_last, z_channels_last, in_place)


# What training asks of input_gradient: a block by itself, fed, fed and the first to read its input; add_relu_pool
# with and without its ReLU; both together, out of place and in place. The last has the most to hold.
INPUT_GRADIENTS = (
    Parts(dpooled=True, dgathered=True),
    Parts(dgathered=True),
    Parts(dpooled=True),
    Parts(dpooled=True, y=True),
    Parts(dpooled=True, dgathered=True, y=True),
    Parts(dpooled=True, dgathered=True, y=True, overwritten=True),
)


def backward_variants(
    shape: Shape, dtype: str, position: str = "first", channels_last: bool = False, tuning: Tuning = DEFAULT
) -> Iterator[Variant]:
    """Those of the backward, for dense maps in one layout and weights of x's dtype.

    Of input_gradient the ones of INPUT_GRADIENTS; of the selector all of its gradients, with and without biases.
    """
    x = SCALAR_TYPES[dtype]
    yield from plane_backward_variants(shape, dtype, position, channels_last, tuning)
    for biases in (False, True):
        needed = Needed(fc1_bias=biases, fc2_bias=biases)
        yield from select_backward_variants(tuning, x, x, shape.channels, shape.hidden, shape.k, needed)


def plane_backward_variants(
    shape: Shape, dtype: str, position: str = "first", channels_last: bool = False, tuning: Tuning = DEFAULT
) -> Iterator[Variant]:
    """Those of fuse_channels_backward and input_gradient; ``dtype`` may be float64."""
    x, stride, k_stride = SCALAR_TYPES[dtype], shape.channels * shape.hw, shape.k * shape.hw
    sizes, hw_align = (x, shape.channels, shape.k, shape.hw), align_of(shape.hw)
    for needed in ((True, True), (True, False), (False, True)):
        align = align_of(stride, k_stride)
        yield fuse_backward_variant(*sizes, align, hw_align, position, channels_last, *needed)
    for parts in INPUT_GRADIENTS:
        narrow = parts.dgathered or parts.overwritten
        aligns = align_of(stride), align_of(k_stride if narrow else 0), hw_align
        k, where = (shape.k if narrow else 1), (position if parts.overwritten else "first")
        yield input_gradient_variant(tuning, x, shape.channels, k, shape.hw, aligns, where, channels_last, parts)

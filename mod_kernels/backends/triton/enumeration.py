"""Every variant that the launcher can choose for the paper's shapes: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
    pool_variant,
    rank_variant,
    tail_variants,
)


@dataclass(frozen=True)
class Shape:
    """One MoD block's sizes; ``mid`` is the width between the convolutions (k for a basic block)."""

    kind: str
    channels: int
    hidden: int
    k: int
    mid: int
    hw: int


def paper_shape(kind: str, channels: int, side: int) -> Shape:
    """A block of the paper's ResNets: ``k = C / 64``, ``R = C / 16``, a quarter of k inside a bottleneck."""
    k = max(1, channels // 64)
    mid = max(1, k // 4) if kind == "bottleneck" else k
    return Shape(kind, channels, channels // 16, k, mid, side * side)


PAPER_SHAPES = tuple(
    paper_shape(kind, channels * (4 if kind == "bottleneck" else 1), side)
    for kind in ("bottleneck", "basic")
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))
)


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
        tuning, x, shape.channels, shape.k, shape.mid, shape.hw, *aligns, shape.kind == "bottleneck", False,
        position, channels_last,
    )  # fmt: skip
    apart = configs.second_layer_apart(tuning, shape.channels, shape.hidden)
    selector = Selector(
        tuning, (x,) * 5, shape.channels, shape.hidden, shape.k, shape.hw, *aligns, channels_last, apart=apart
    )
    batches = (1, tuning.batch_samples + 1)
    ways = dict.fromkeys(configs.shared_out(tuning, shape.channels, shape.hidden, samples) for samples in batches)
    for copy in (False, True):
        for pooled in (False, True):
            for way in ways:
                block = replace(selector, copy=copy, pooled=pooled, fused=True, apart=way == "layers")
                yield from block_variants(block, tail, way).there()
    for pooled in (False, True):
        yield pool_variant(replace(selector, pooled=pooled))
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

"""What a call launches, worked out once for its sizes: variants, numbers of programs, integer arguments, scratch.

The tuning that was in force is a part of what a plan is remembered by. :mod:`.launch` has the launches.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..._layout import CHANNELS_LAST, layout_of
from ...spec import read_form
from . import configs, variants
from .configs import align_of
from .tuning import Tuning
from .variants import Selector, Tail, Variant

TYPE_NAMES = {getattr(torch, name): kind for name, kind in configs.SCALAR_TYPES.items()}
# Remembered for each op: sizes a process meets, batch sizes included.
MOST_PLANS = 1024


def sample_stride(x: Tensor) -> int:
    """Elements from sample to sample."""
    n, channels, h, w = x.shape
    return x.stride(0) if n > 1 else channels * h * w


def _units(elements: int) -> int:
    """Sixteens that hold so many float32 values: sections of scratch start at such a multiple."""
    return -(-elements // 16)


class Launch(NamedTuple):
    """A variant, how many programs of it, and its integer arguments."""

    variant: Variant
    programs: int
    scalars: tuple[int, ...]


class Map(NamedTuple):
    """What a plan depends on in a feature map."""

    dtype: torch.dtype
    n: int
    channels: int
    height: int
    width: int
    stride: int  # from sample to sample, in elements
    channels_last: bool

    @property
    def hw(self) -> int:
        return self.height * self.width

    @property
    def align(self) -> int:
        """What the compiler is told to divide the stride."""
        return align_of(self.stride)

    @property
    def hw_align(self) -> int:
        return align_of(self.hw)

    @property
    def hw_units(self) -> int:
        return self.hw // self.hw_align


def map_of(x: Tensor) -> Map:
    return Map(x.dtype, *x.shape, sample_stride(x), layout_of(x) == CHANNELS_LAST)


class SelectorKey(NamedTuple):
    """What a plan depends on in a selector; ``types``: fc1, fc2, fc1_bias, fc2_bias."""

    types: tuple[torch.dtype, ...]
    hidden: int
    k: int
    biases: tuple[bool, bool]
    pooled: bool

    def on(self, tuning: Tuning, x: Map, **fields: bool) -> Selector:
        names = tuple(TYPE_NAMES[dtype] for dtype in (x.dtype, *self.types))
        sizes = (x.channels, self.hidden, self.k, x.hw, x.align, x.hw_align, x.channels_last)
        return Selector(tuning, names, *sizes, self.biases, self.pooled, **fields)


class SelectPlan(NamedTuple):
    """Launches of the selector; ``layers`` None where whoever ranks does the second layer."""

    pool: Launch
    layers: Launch | None
    rank: Launch
    scratch_units: int


@functools.lru_cache(MOST_PLANS)
def select_plan(tuning: Tuning, x: Map, key: SelectorKey, copy: bool = False) -> SelectPlan:
    selector = key.on(tuning, x, copy=copy, apart=configs.second_layer_apart(tuning, x.channels, key.hidden))
    keys_units = _units(x.n * selector.pool.shares * key.hidden)
    keys = 2 * x.n * selector.slices * selector.keep if selector.apart else 0  # an int64 is two float32 wide
    layers = None
    if selector.apart:
        layers = Launch(variants.layers_variant(selector), x.n * selector.slices, (keys_units,))
    return SelectPlan(
        Launch(variants.pool_variant(selector), x.n * selector.pool.shares, (x.stride // x.align, x.hw_units)),
        layers,
        Launch(variants.rank_variant(selector), x.n, (keys_units,)),
        keys_units + _units(keys),
    )


class PairPlan(NamedTuple):
    """Launches of an ending that does the first layer too, and of the block after it."""

    ending: Launch
    finish: Launch
    scratch_units: int


@functools.lru_cache(MOST_PLANS)
def pair_plan(
    tuning: Tuning, a: Map, key: SelectorKey, b_stride: int | None, relu: bool, form: str
) -> PairPlan | None:
    """Where the block would begin with a launch of its own for the first layer; None elsewhere.

    ``b_stride``: None without b.
    """
    kind, mid, _, _ = read_form(form)
    tail = _tail_of(tuning, a, key.k, form)  # what is too large is refused here, before the ending is written
    apart = configs.tail_apart(tuning, kind, key.k, mid, a.hw)
    if apart or configs.shared_out(tuning, a.channels, key.hidden, a.n) != "layers":
        return None
    strides = (a.stride, a.stride if b_stride is None else b_stride, a.stride)
    align = align_of(*strides)
    selector = replace(key.on(tuning, a, apart=True), align=align)
    ending, finish = variants.pair_variants(selector, tail, b_stride is not None, relu)
    shares = selector.pool.shares
    keys_units = _units(a.n * shares * key.hidden)
    mid_units = keys_units + _units(2 * a.n * selector.slices * selector.keep)
    scalars = keys_units, mid_units, a.stride // a.align, a.hw_units, a.width
    return PairPlan(
        Launch(ending, a.n * shares, (*(stride // align for stride in strides), a.hw_units)),
        Launch(finish, a.n * selector.slices, scalars),
        mid_units + _units(a.n * tail.planes * a.hw),
    )


def _tail_of(tuning: Tuning, x: Map, k: int, form: str) -> Tail:
    kind, mid, final_relu, position = read_form(form)
    sizes = (x.channels, k, mid, x.hw, x.align, x.hw_align)
    tail = Tail(tuning, TYPE_NAMES[x.dtype], *sizes, kind, final_relu, position, x.channels_last)
    if tail.planes * x.hw >= 2**31:  # offsets inside a sample are int32 in the kernels
        size = f"{tail.planes} channels of {x.height}x{x.width}"
        raise ValueError(f"the Triton kernels take fewer than 2^31 values between the convolutions, got {size}")
    return tail


class TailPlan(NamedTuple):
    """Launches of ``tail_`` in order, and the channels of its scratch."""

    launches: tuple[Launch, ...]
    planes: int


@functools.lru_cache(MOST_PLANS)
def tail_plan(tuning: Tuning, x: Map, k: int, form: str) -> TailPlan:
    tail = _tail_of(tuning, x, k, form)
    scalars = (x.stride // x.align, x.hw_units, x.width, tail.programs)
    chosen = variants.tail_variants(tail)
    return TailPlan(tuple(Launch(variant, x.n * tail.programs, scalars) for variant in chosen), tail.planes)


class ApartPlan(NamedTuple):
    """Of a block whose tail is launched apart."""

    select: SelectPlan
    tail: TailPlan


class BlockPlan(NamedTuple):
    """Launches of a block in order: ``pool`` and ``layers`` (both, over the batch) where there are any."""

    pool: Launch | None
    layers: tuple[Launch, ...]
    finish: Launch
    scratch_units: int


@functools.lru_cache(MOST_PLANS)
def block_plan(
    tuning: Tuning, x: Map, key: SelectorKey, y_stride: int, copy: bool, form: str
) -> BlockPlan | ApartPlan:
    kind, mid, _, _ = read_form(form)
    if configs.tail_apart(tuning, kind, key.k, mid, x.hw):
        tail = tail_plan(tuning, x._replace(stride=y_stride), key.k, form)
        return ApartPlan(select_plan(tuning, x, key, copy), tail)
    shared_out = configs.shared_out(tuning, x.channels, key.hidden, x.n)
    # The samples that the last launch is told the stride of: where it makes a copy, its y is dense.
    last = x if shared_out == "pool" else x._replace(stride=y_stride)
    selector = key.on(tuning, x, copy=copy, apart=shared_out == "layers", fused=True)
    tail = _tail_of(tuning, last, key.k, form)
    chosen = variants.block_variants(selector, tail, shared_out)
    # Where the slots would lie the batch's hidden layer does, where there is one; it is no larger.
    keys_units = _units(x.n * selector.pool.shares * key.hidden)
    mid_units = keys_units + _units(2 * x.n * selector.slices * selector.keep if shared_out == "layers" else 0)
    scratch_units = mid_units + _units(x.n * tail.planes * x.hw)
    pool = None
    if chosen.pool is not None:
        pool = Launch(chosen.pool, x.n * chosen.pool_shares, (x.stride // x.align, x.hw_units))
    layers = tuple(Launch(one, variants.linear_programs(one, x.n), (x.n,)) for one in chosen.layers)
    programs = {"pool": selector.pool.shares, "layers": selector.slices, "nothing": 1}[shared_out]
    scalars = keys_units, mid_units, last.stride // last.align, last.hw_units, x.width
    return BlockPlan(pool, layers, Launch(chosen.finish, x.n * programs, scalars), scratch_units)

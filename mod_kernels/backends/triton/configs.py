"""Launch configurations as data, and the kernel variants they lead to.

A :class:`Variant` is all that decides what Triton compiles: kernel, argument types, constants, options. The
launcher (:mod:`.launch`) takes its variants from the functions here and so does the ahead-of-time check
(:mod:`.compile`), so what is checked is what runs. Neither Triton nor a GPU is needed to enumerate them.

Batch, height and width are run-time values: other image sizes reuse a variant as long as they fall into the
same block sizes and the same alignment. Nothing depends on the batch size but the number of programs, so a
sample's result does not depend on the batch it is in. Nothing depends on the architecture:
no kernel uses shared memory or registers to a degree that differs between compute capabilities 8.0 and 12.0
(``test_ahead_of_time.py`` holds this). The block sizes are those that came out best, over the paper's shapes in
float16 at N = 1 to 256, in a sweep on an H100 whose figures were not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

# Widest factor of the row length told to the compiler: 16 elements are 32 bytes in float16, more than one load.
MAX_ALIGN = 16
# float32 values a program keeps per tile: 32 registers a thread at 128 threads.
TILE = 4096
MAX_BLOCK_HW = 1024
# (planes up to so many pixels, pixels at a time, channels a program), with 8 warps. Longer planes take more passes
# over their block.
POOL_BLOCKS = ((64, 64, 64), (256, 64, 32), (1024, 256, 8), (None, 2048, 4))
# Weights of the second layer, C * R, that one program reads for a sample; more are shared out over programs by
# a launch of their own. 16384 is C = 512 at the paper's R: above, one program takes longer than a launch.
MAX_LAYER_WEIGHTS = 16384
# Channels whose logits and first ranking one program of that launch makes.
SLICE = 256
# Programs of the tail's first launch, at least: each makes the selection anew, so no more than fill a GPU.
FIRST_PROGRAMS = 512

# torch's names to Triton's, for the dtypes this engine serves.
SCALAR_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Variant:
    """One thing to compile: ``signature`` types the run-time arguments, ``constexprs`` are the constants."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    num_warps: int
    # The tail writes through pointers that it also reads: no software pipelining across its iterations.
    num_stages: int = 1

    @functools.cached_property
    def compiled(self) -> dict[int, tuple[object, tuple[object, ...]]]:
        """By device index: what Triton made of this for 16-byte aligned pointers, and the constants' values.

        Kept here, by identity, because to hash a variant at every launch would cost as much as the launch.
        """
        return {}

    @functools.cached_property
    def tensors(self) -> int:
        """How many of the run-time arguments are tensors: the first ones."""
        return sum(kind.startswith("*") for _, kind in self.signature)

    @functools.cached_property
    def arguments(self) -> dict[str, object]:
        """Keyword arguments of the launch beside the run-time ones."""
        return dict(self.constexprs) | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class PoolConfig:
    """A program pools ``chunk_channels``, ``block_hw`` pixels at a time, for ``block_units`` units at a time."""

    chunk_channels: int
    chunks: int
    block_hw: int
    block_units: int
    num_warps: int


@dataclass(frozen=True)
class LayersConfig:
    """How the layers are run: ``apart``, a launch of their own for slices of channels, or by whoever ranks.

    ``block_slots`` x R slots and ``block_channels`` x R weights at a time.
    """

    apart: bool
    slice_channels: int
    block_slots: int
    block_channels: int
    num_warps: int


@dataclass(frozen=True)
class TailConfig:
    """Pixels a program holds at a time, for all k (or m) channels; ``split``: two launches."""

    block_hw: int
    num_warps: int
    split: bool


@dataclass(frozen=True)
class PlaneConfig:
    """``block_channels`` planes x ``block_hw`` pixels a program, one pass."""

    block_channels: int
    block_hw: int
    num_warps: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is no smaller than ``value``."""
    return 1 << (value - 1).bit_length()


def align_of(*lengths: int) -> int:
    """The largest power of two, at most MAX_ALIGN, that divides every length."""
    return gcd(MAX_ALIGN, *lengths)


@functools.lru_cache
def pool_config(channels: int, hidden: int, hw: int) -> PoolConfig:
    """Block sizes of the pooling."""
    _, block_hw, chunk = next(row for row in POOL_BLOCKS if row[0] is None or hw <= row[0])
    block_hw, chunk = min(block_hw, power_of_two(hw)), min(chunk, power_of_two(channels))
    return PoolConfig(
        chunk_channels=chunk,
        chunks=-(-channels // chunk),
        block_hw=block_hw,
        block_units=min(power_of_two(hidden), max(1, TILE // chunk)),
        num_warps=8,
    )


@functools.lru_cache
def layers_config(channels: int, hidden: int, chunks: int) -> LayersConfig:
    """Tiles of the layers after pooling.

    Weights are loaded four tiles at a time, 128 values a thread, all in flight at once: a program does little
    else but wait for them.
    """
    hidden_pad, channels_pad = power_of_two(hidden), power_of_two(channels)
    apart = channels * hidden > MAX_LAYER_WEIGHTS
    slice_channels = min(channels_pad, SLICE) if apart else channels_pad
    return LayersConfig(
        apart=apart,
        slice_channels=slice_channels,
        block_slots=min(power_of_two(chunks), max(1, TILE // hidden_pad)),
        block_channels=min(slice_channels, max(1, 4 * TILE // hidden_pad)),
        num_warps=4,
    )


@functools.lru_cache
def tail_config(k: int, mid: int, hw: int) -> TailConfig:
    """Block sizes of the tail: k (or m) x block_hw float32 values within two tiles, at least 16 pixels.

    A sample that fits one block takes one program, which then needs no second launch. For one channel half as many
    pixels: nine addresses for each of eight a thread made ptxas spill on 12.0.
    """
    rows = power_of_two(max(k, mid))
    block_hw = max(16, min(power_of_two(hw), MAX_BLOCK_HW, MAX_BLOCK_HW // 2 * rows, 2 * TILE // rows))
    return TailConfig(block_hw, num_warps=4, split=hw > block_hw)


@functools.lru_cache
def plane_config(channels: int, hw: int, one_plane: bool) -> PlaneConfig:
    """Block sizes of gather and fuse: a pass over memory, 16 elements a thread."""
    block_hw = min(power_of_two(hw), MAX_BLOCK_HW)
    block_channels = 1 if one_plane else max(1, min(power_of_two(channels), 2 * MAX_BLOCK_HW // block_hw))
    return PlaneConfig(block_channels, block_hw, num_warps=4 if block_channels * block_hw > 512 else 1)


@dataclass(frozen=True)
class Selector:
    """What the selector's variants depend on; ``types`` (Triton's names): x, fc1, fc2, fc1_bias, fc2_bias.

    A bias that is not there is typed, and passed, as its layer's weight.
    """

    types: tuple[str, str, str, str, str]
    channels: int
    hidden: int
    k: int
    hw: int
    align: int
    biases: tuple[bool, bool] = (False, False)
    pooled: bool = False
    copy: bool = False

    @property
    def pool(self) -> PoolConfig:
        return pool_config(self.channels, self.hidden, self.hw)

    @property
    def layers(self) -> LayersConfig:
        return layers_config(self.channels, self.hidden, self.pool.chunks)

    @property
    def source(self) -> str:
        """SELECTION of whoever ranks."""
        return "keys" if self.layers.apart else "slots"

    @property
    def keep(self) -> int:
        """Keys that a slice leaves to the ranking."""
        return min(power_of_two(self.k), self.layers.slice_channels)

    @property
    def slices(self) -> int:
        return -(-self.channels // self.layers.slice_channels)

    def constants(self) -> dict[str, object]:
        """Those that :func:`.select.select_sample` takes."""
        layers = self.layers
        return {
            "C": self.channels, "R": self.hidden, "K": self.k, "C_PAD": power_of_two(self.channels),
            "R_PAD": power_of_two(self.hidden), "K_PAD": power_of_two(self.k), "CHUNKS": self.pool.chunks,
            "BLOCK_SLOTS": layers.block_slots, "BLOCK_C": layers.block_channels, "SLICE_C": layers.slice_channels,
            "KEEP": self.keep, "HAS_FC1_BIAS": self.biases[0], "HAS_FC2_BIAS": self.biases[1],
        }  # fmt: skip


def pool_variant(selector: Selector) -> Variant:
    config = selector.pool
    x, fc1, *_ = selector.types
    pointers = {"x_ptr": x, "y_ptr": x, "pooled_ptr": "fp32", "fc1_weight_ptr": fc1, "partial_ptr": "fp32"}
    scalars = {"stride_xn": "i64", "hw_units": "i32"}
    constants = {
        "C": selector.channels, "R": selector.hidden, "ALIGN": selector.align, "CHUNK_C": config.chunk_channels,
        "BLOCK_HW": config.block_hw, "BLOCK_R": config.block_units, "POOLED": selector.pooled,
        "COPY": selector.copy,
    }  # fmt: skip
    return _variant("pool_fwd_kernel", pointers, scalars, constants, config.num_warps)


def layers_variant(selector: Selector, store_hidden: bool) -> Variant:
    """The second layer's own launch; ``store_hidden``: the hidden layer is wanted too."""
    constants = selector.constants() | {"STORE_HIDDEN": store_hidden}
    del constants["K"], constants["K_PAD"]
    pointers, scalars = _layer_pointers(selector), {"keys_units": "i64"}
    warps = selector.layers.num_warps
    return _variant("layers_fwd_kernel", pointers, scalars, constants, warps)


def rank_variant(selector: Selector) -> Variant:
    pointers = _layer_pointers(selector) | {"index_ptr": "i64", "scores_ptr": "fp32"}
    constants = selector.constants() | {"SELECTION": selector.source}
    scalars, warps = {"keys_units": "i64"}, selector.layers.num_warps
    return _variant("rank_fwd_kernel", pointers, scalars, constants, warps)


def _layer_pointers(selector: Selector) -> dict[str, str]:
    _, _, fc2, bias1, bias2 = selector.types
    return {
        "scratch_ptr": "fp32", "fc1_bias_ptr": bias1, "fc2_weight_ptr": fc2, "fc2_bias_ptr": bias2,
        "hidden_ptr": "fp32", "logits_ptr": "fp32",
    }  # fmt: skip


@dataclass(frozen=True)
class Tail:
    """What the tail's variants depend on; ``selection``: None where index and scores are given."""

    x: str
    channels: int
    k: int
    mid: int
    hw: int
    align: int
    bottleneck: bool
    final_relu: bool
    position: str
    selection: Selector | None = None

    @property
    def config(self) -> TailConfig:
        return tail_config(self.k, self.mid, self.hw)


def tail_variants(tail: Tail) -> tuple[Variant, ...]:
    """The tail's launches in order."""
    config, selector = tail.config, tail.selection
    fc2, bias1, bias2 = ("fp32",) * 3 if selector is None else (selector.types[2], *selector.types[3:])
    pointers = {
        "x_ptr": tail.x, "index_ptr": "i64", "scores_ptr": "fp32", "logits_ptr": "fp32", "conv_ptr": "fp32",
        "scratch_ptr": "fp32", "fc1_bias_ptr": bias1, "fc2_weight_ptr": fc2, "fc2_bias_ptr": bias2,
    }  # fmt: skip
    scalars = {"keys_units": "i64", "mid_units": "i64", "stride_xn": "i64"}
    scalars |= dict.fromkeys(("hw_units", "width", "programs"), "i32")
    if selector is None:
        unread = ("R", "C_PAD", "R_PAD", "CHUNKS", "BLOCK_SLOTS", "BLOCK_C", "SLICE_C", "KEEP", "HAS_FC1_BIAS")
        constants = dict.fromkeys((*unread, "HAS_FC2_BIAS"), 0)
        constants |= {"C": tail.channels, "K": tail.k, "K_PAD": power_of_two(tail.k)}
    else:
        constants = selector.constants()
    constants |= {
        "M": tail.mid, "M_PAD": power_of_two(tail.mid), "ALIGN": tail.align, "BLOCK_HW": config.block_hw,
        "BOTTLENECK": tail.bottleneck, "FINAL_RELU": tail.final_relu, "POSITION": tail.position,
        "SELECTION": "given" if selector is None else selector.source,
    }  # fmt: skip
    launches = ((True, False), (False, True)) if config.split else ((True, True),)
    return tuple(
        _variant(
            "tail_fwd_kernel",
            pointers,
            scalars,
            constants | {"FIRST": first, "REST": rest},
            config.num_warps,
        )
        for first, rest in launches
    )


def tail_programs(tail: Tail, samples: int) -> tuple[int, ...]:
    """Programs per sample of each launch of :func:`tail_variants`."""
    if not tail.config.split:
        return (1,)
    tiles = -(-tail.hw // tail.config.block_hw)
    first = tiles if tail.selection is None else min(tiles, -(-FIRST_PROGRAMS // samples))
    return first, tiles


def gather_variant(x: str, channels: int, k: int, hw: int, align: int) -> Variant:
    """The gather's, for x's type."""
    config = plane_config(channels, hw, one_plane=True)
    pointers = {"x_ptr": x, "index_ptr": "i64", "out_ptr": x}
    scalars = {"stride_xn": "i64", "hw_units": "i32", "tiles": "i32"}
    constants = {"C": channels, "K": k, "ALIGN": align, "BLOCK_HW": config.block_hw}
    return _variant("gather_channels_fwd_kernel", pointers, scalars, constants, config.num_warps)


def fuse_variant(
    x: str, channels: int, k: int, hw: int, align: int, position: str, z_channels_last: bool, in_place: bool
) -> Variant:
    """The fuse's, out of place or in place, for x's type."""
    config = plane_config(channels, hw, one_plane=in_place)
    # Only "original" reads an index; for the others scores stands in.
    index = "i64" if position == "original" else "fp32"
    pointers = {"x_ptr": x, "z_ptr": x, "scores_ptr": "fp32", "index_ptr": index}
    scalars = {"stride_xn": "i64", "stride_zn": "i64", "hw_units": "i32", "tiles": "i32"}
    constants = {
        "C": channels, "K": k, "ALIGN": align, "BLOCK_HW": config.block_hw, "POSITION": position,
        "Z_CHANNELS_LAST": z_channels_last,
    }  # fmt: skip
    if in_place:
        constants |= {"K_PAD": power_of_two(k)}
        return _variant("fuse_channels_inplace_fwd_kernel", pointers, scalars, constants, config.num_warps)
    pointers |= {"y_ptr": x}
    constants |= {"BLOCK_CH": config.block_channels}
    return _variant("fuse_channels_fwd_kernel", pointers, scalars, constants, config.num_warps)


def add_relu_pool_variant(x: str, channels: int, hw: int, align: int, has_b: bool, relu: bool) -> Variant:
    """That of add_relu_pool, in place or not; its blocks are the pooling's."""
    config = pool_config(channels, 1, hw)
    pointers = {"a_ptr": x, "b_ptr": x, "y_ptr": x, "pooled_ptr": "fp32"}
    scalars = dict.fromkeys(("stride_an", "stride_bn", "stride_yn"), "i64") | {"hw_units": "i32"}
    constants = {
        "C": channels, "ALIGN": align, "CHUNK_C": config.chunk_channels, "BLOCK_HW": config.block_hw,
        "HAS_B": has_b, "RELU": relu,
    }  # fmt: skip
    return _variant("add_relu_pool_fwd_kernel", pointers, scalars, constants, config.num_warps)


def _variant(kernel: str, pointers: dict, scalars: dict, constants: dict, num_warps: int) -> Variant:
    signature = {name: "*" + kind for name, kind in pointers.items()} | scalars
    return Variant(kernel, tuple(signature.items()), tuple(constants.items()), num_warps)


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


def variants(shape: Shape, dtype: str, position: str = "first") -> Iterator[Variant]:
    """Every variant that the ops launch for ``shape`` in ``dtype`` (a key of SCALAR_TYPES).

    For contiguous x and z in NCHW, weights of x's dtype and a selector without biases (the paper's), whatever
    the batch size, in place and out of place, with and without ``pooled``.
    """
    x = SCALAR_TYPES[dtype]
    align = align_of(shape.hw, shape.channels * shape.hw)
    tail = Tail(
        x, shape.channels, shape.k, shape.mid, shape.hw, align, shape.kind == "bottleneck", False, position, None,
    )  # fmt: skip
    selector = Selector((x,) * 5, shape.channels, shape.hidden, shape.k, shape.hw, align)
    for copy in (False, True):
        for pooled in (False, True):
            yield pool_variant(replace(selector, copy=copy, pooled=pooled))
    if selector.layers.apart:
        yield layers_variant(selector, True)
        yield layers_variant(selector, False)
    yield rank_variant(selector)
    yield from tail_variants(tail)
    yield from tail_variants(replace(tail, selection=selector))
    for has_b in (False, True):
        for relu in (False, True):
            yield add_relu_pool_variant(x, shape.channels, shape.hw, align, has_b, relu)
    plain = (x, shape.channels, shape.k, shape.hw, align)
    yield gather_variant(*plain)
    for in_place in (False, True):
        yield fuse_variant(*plain, position, False, in_place)

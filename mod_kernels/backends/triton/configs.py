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
# (pixels of a sample up to, pixels at a time, channels a program) of add_relu_pool with 8 warps: 8 to 32 values a
# thread. In channels_last a program takes fewer channels the more pixels they have, down to 32 bytes of float16,
# one sector: else small batches would have few programs. Those of channels_last, here and below, and the runs of
# short planes were chosen by the width of their loads and their registers; they have not been timed.
ADD_RELU_POOL_BLOCKS = ((64, 64, 64), (256, 64, 32), (1024, 256, 8), (None, 2048, 4))
ADD_RELU_POOL_BLOCKS_CHANNELS_LAST = ((64, 64, 64), (256, 128, 32), (None, 256, 16))
# Channels that a program of gather or fuse takes at most in channels_last: of C, where all of it is copied, and of
# the k, which in every pixel lie apart from the next pixel's.
PLANE_CHANNELS = 128
PLANE_K = 32
# Weights of the second layer, C * R, that one program reads for a sample; more are shared out over programs by
# a launch of their own. 16384 is C = 512 at the paper's R: above, one program takes longer than a launch.
MAX_LAYER_WEIGHTS = 16384
# Channels whose logits and first ranking one program of that launch makes.
SLICE = 256
# In channels_last a program pools 64 channels, 128 bytes of each pixel in float16, so that a warp's loads take
# whole lines; a sample's pixels are then split, to about as many programs as in NCHW.
CHANNELS_LAST_CHUNK = 64
POOL_SHARES = 64
# Weights of the second layer up to which a block is one launch, whose last program of a sample reads them all:
# C = 1024 at the paper's R. At C = 2048 that program would read 0.5 MB by itself (estimated before anything was
# built: 18 us against 11 for two launches, float16, N = 1, H100; no GPU has run it).
ONE_LAUNCH_WEIGHTS = 65536
# Warps of a block's last launch: the last program of a sample does the whole tail, faster the more threads it has.
# Half of them for planes of 7 x 7.
BLOCK_WARPS = 16
# By warps: (channels up to so many, values of the tail a thread). With more, ptxas spills a few registers on one
# architecture or another, though far from its limit: each value has an address and a place in x beside it.
TAIL_VALUES = {
    2: ((None, 8),),
    4: ((4, 8), (None, 4)),
    8: ((8, 1), (16, 2), (None, 4)),
    16: ((4, 8), (16, 4), (None, 2)),
}
# Above so many samples the layers of a larger selector go over the batch: to read its weights for each sample
# would cost more than to read x (estimated, too: from 60 to 100 samples on).
BATCH_SAMPLES = 64
# (samples, inputs, outputs) of a program's tile there. The first layer has few outputs: small tiles, for enough
# programs; the second many.
FIRST_LAYER_TILE = (16, 64, 16)
SECOND_LAYER_TILE = (32, 32, 64)

# torch's names to Triton's, for the dtypes this engine serves.
SCALAR_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
SCALAR_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
WIDEST_LOAD = 16  # bytes a thread


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
    """A program pools ``chunk_channels``, one of ``parts`` of their pixels, ``block_hw`` at a time.

    With ``run``, all at once as so many values in a row, of which ``lanes`` threads sum a channel. Then it takes
    ``block_units`` units of the first layer at a time.
    """

    chunk_channels: int
    parts: int
    shares: int  # programs of a sample
    block_hw: int
    run: int
    lanes: int
    block_units: int
    num_warps: int


@dataclass(frozen=True)
class LayersConfig:
    """``slice_channels`` a program, ``block_slots`` x R slots and ``block_channels`` x R weights at a time."""

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
    """``block_channels`` x ``block_hw`` pixels a program, in one pass; ``chunks`` and ``tiles`` of them."""

    block_channels: int
    chunks: int
    block_hw: int
    tiles: int
    num_warps: int


@dataclass(frozen=True)
class AddReluPoolConfig:
    """``chunk_channels`` a program, ``block_hw`` pixels at a time.

    With ``run``, the chunk's planes at once as so many values in a row, of which ``lanes`` threads sum a channel.
    """

    chunk_channels: int
    chunks: int
    block_hw: int
    run: int
    lanes: int
    num_warps: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is no smaller than ``value``."""
    return 1 << (value - 1).bit_length()


def align_of(*lengths: int) -> int:
    """The largest power of two, at most MAX_ALIGN, that divides every length."""
    return gcd(MAX_ALIGN, *lengths)


@functools.lru_cache
def pool_config(
    x: str, channels: int, hidden: int, hw: int, hw_align: int, channels_last: bool, split_pixels: bool
) -> PoolConfig:
    """Block sizes of the pooling, for x's type; where rows are narrow, those of add_relu_pool.

    ``split_pixels``: nobody needs a channel's whole sum in one program.
    """
    parts, run, lanes = 1, 0, 0
    narrow = add_relu_pool_config(x, channels, hw, hw_align, channels_last)
    if narrow.run:
        chunk, block_hw, run, lanes = narrow.chunk_channels, narrow.block_hw, narrow.run, narrow.lanes
    elif channels_last:
        chunk = min(CHANNELS_LAST_CHUNK, power_of_two(channels))
        block_hw = min(2 * TILE // chunk, power_of_two(hw))
        if split_pixels:
            parts = min(-(-hw // block_hw), max(1, POOL_SHARES // -(-channels // chunk)))
    else:
        _, block_hw, chunk = next(row for row in POOL_BLOCKS if row[0] is None or hw <= row[0])
        block_hw, chunk = min(block_hw, power_of_two(hw)), min(chunk, power_of_two(channels))
    return PoolConfig(
        chunk_channels=chunk,
        parts=parts,
        shares=-(-channels // chunk) * parts,
        block_hw=block_hw,
        run=run,
        lanes=lanes,
        block_units=min(power_of_two(hidden), max(1, TILE // chunk)),
        num_warps=8,
    )


@functools.lru_cache
def layers_config(channels: int, hidden: int, shares: int, apart: bool) -> LayersConfig:
    """Tiles of the layers after pooling.

    Weights are loaded four tiles at a time, 64 values a thread, all in flight at once: a program does little
    else but wait for them.
    """
    hidden_pad, channels_pad = power_of_two(hidden), power_of_two(channels)
    slice_channels = min(channels_pad, SLICE) if apart else channels_pad
    return LayersConfig(
        slice_channels=slice_channels,
        block_slots=min(power_of_two(shares), max(1, TILE // hidden_pad)),
        block_channels=min(slice_channels, max(1, 4 * TILE // hidden_pad)),
        num_warps=8,
    )


@functools.lru_cache
def tail_config(k: int, mid: int, hw: int, num_warps: int) -> TailConfig:
    """Block sizes of the tail: TAIL_VALUES a thread of the k (or m) x block_hw float32 values, at least 16 pixels.

    And 2 pixels a thread at most, 1 where both convolutions are 3x3 (mid = k). A sample that fits one block takes
    one program of ``tail_``, which then needs no second launch.
    """
    rows, threads = power_of_two(max(k, mid)), 32 * num_warps
    values = next(values for most, values in TAIL_VALUES[num_warps] if most is None or rows <= most)
    pixels = threads if mid == k else 2 * threads
    block_hw = max(16, min(power_of_two(hw), pixels, values * threads // rows))
    return TailConfig(block_hw, num_warps, split=hw > block_hw)


@functools.lru_cache
def plane_config(channels: int, hw: int, most: int, channels_last: bool) -> PlaneConfig:
    """Block sizes of gather and fuse, a pass over memory with 16 elements a thread: ``most`` channels a program.

    The block is long where the layout is dense: in NCHW along the pixels, in channels_last along the channels.
    """
    block_hw, block_channels = min(power_of_two(hw), MAX_BLOCK_HW), min(power_of_two(channels), most)
    if channels_last:
        block_hw = min(block_hw, 2 * MAX_BLOCK_HW // block_channels)
    else:
        block_channels = min(block_channels, 2 * MAX_BLOCK_HW // block_hw)
    warps = 4 if block_channels * block_hw > 512 else 1
    return PlaneConfig(block_channels, -(-channels // block_channels), block_hw, -(-hw // block_hw), warps)


def gather_config(k: int, hw: int, channels_last: bool) -> PlaneConfig:
    return plane_config(k, hw, PLANE_K if channels_last else 1, channels_last)


def fuse_config(channels: int, k: int, hw: int, position: str, channels_last: bool, in_place: bool) -> PlaneConfig:
    if not in_place:
        return plane_config(channels, hw, PLANE_CHANNELS if channels_last else MAX_BLOCK_HW, channels_last)
    # "original" compares a program's channels with all k, and they lie anywhere: one at a time.
    together = channels_last and position != "original"
    return plane_config(k, hw, PLANE_K if together else 1, channels_last)


@functools.lru_cache
def add_relu_pool_config(x: str, channels: int, hw: int, hw_align: int, channels_last: bool) -> AddReluPoolConfig:
    """Block sizes of add_relu_pool, for x's type.

    In a run where the planes' own alignment gives narrow loads and at least 16 planes fit a tile: 16 planes begin
    at a multiple of 16 elements whatever H*W is.
    """
    warps = 8
    channels_pad, hw_pad = power_of_two(channels), power_of_two(hw)
    narrow = not channels_last and hw_align * SCALAR_BYTES[x] < WIDEST_LOAD
    if narrow and 16 * hw <= TILE:
        chunk = min(channels_pad, 64, power_of_two(TILE // hw + 1) // 2)
        run, block_hw = power_of_two(chunk * hw), hw_pad
    else:
        blocks = ADD_RELU_POOL_BLOCKS_CHANNELS_LAST if channels_last else ADD_RELU_POOL_BLOCKS
        _, block_hw, chunk = next(row for row in blocks if row[0] is None or hw <= row[0])
        block_hw = block_hw // 2 if x == "fp64" else block_hw  # two registers a value
        run, block_hw, chunk = 0, min(block_hw, hw_pad), min(chunk, channels_pad)
    lanes = min(block_hw, 32 * warps // chunk) if run else 0
    return AddReluPoolConfig(chunk, -(-channels // chunk), block_hw, run, lanes, warps)


@dataclass(frozen=True)
class Selector:
    """What the selector's variants depend on; ``types`` (Triton's names): x, fc1, fc2, fc1_bias, fc2_bias.

    A bias that is not there is typed, and passed, as its layer's weight. ``apart``: the second layer is shared out
    by slices of channels; else whoever ranks a sample does all of it. ``fused``: inside a block, where the pooled
    vector is needed by nobody else.
    """

    types: tuple[str, str, str, str, str]
    channels: int
    hidden: int
    k: int
    hw: int
    align: int  # of the samples' stride
    hw_align: int
    channels_last: bool = False
    biases: tuple[bool, bool] = (False, False)
    pooled: bool = False
    copy: bool = False
    apart: bool = False
    fused: bool = False

    @property
    def pool(self) -> PoolConfig:
        sizes = (self.channels, self.hidden, self.hw, self.hw_align)
        return pool_config(self.types[0], *sizes, self.channels_last, self.fused)

    @property
    def layers(self) -> LayersConfig:
        return layers_config(self.channels, self.hidden, self.pool.shares, self.apart)

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
            "R_PAD": power_of_two(self.hidden), "K_PAD": power_of_two(self.k), "SHARES": self.pool.shares,
            "BLOCK_SLOTS": layers.block_slots, "BLOCK_C": layers.block_channels, "SLICE_C": layers.slice_channels,
            "KEEP": self.keep, "HAS_FC1_BIAS": self.biases[0], "HAS_FC2_BIAS": self.biases[1],
        }  # fmt: skip


def second_layer_apart(channels: int, hidden: int) -> bool:
    """Of select_channels: whether the second layer is a launch of its own."""
    return channels * hidden > MAX_LAYER_WEIGHTS


def pool_variant(selector: Selector, layer: bool = True) -> Variant:
    """The pooling launch; without ``layer`` the pooled vectors are all it makes."""
    config = selector.pool
    x, fc1, *_ = selector.types
    pointers = {"x_ptr": x, "y_ptr": x, "pooled_ptr": "fp32", "fc1_weight_ptr": fc1, "slots_ptr": "fp32"}
    scalars = {"stride_xn": "i64", "hw_units": "i32"}
    constants = {
        "C": selector.channels, "R": selector.hidden if layer else 0, "ALIGN": selector.align,
        "HW_ALIGN": selector.hw_align, "RUN": config.run, "LANES": config.lanes,
        "CHUNK_C": config.chunk_channels, "PARTS": config.parts, "BLOCK_HW": config.block_hw,
        "BLOCK_R": config.block_units, "POOLED": selector.pooled, "COPY": selector.copy,
        "STORE_POOLED": not selector.fused, "CHANNELS_LAST": selector.channels_last,
    }  # fmt: skip
    return _variant("pool_fwd_kernel", pointers, scalars, constants, config.num_warps)


def layers_variant(selector: Selector) -> Variant:
    """The second layer's own launch."""
    constants = selector.constants()
    del constants["K"], constants["K_PAD"]
    pointers, scalars = _layer_pointers(selector), {"keys_units": "i64"}
    warps = selector.layers.num_warps
    return _variant("layers_fwd_kernel", pointers, scalars, constants, warps)


def rank_variant(selector: Selector) -> Variant:
    pointers = _layer_pointers(selector) | {"index_ptr": "i64", "scores_ptr": "fp32"}
    constants = selector.constants() | {"SELECTION": "keys" if selector.apart else "slots"}
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
    """What the tail's variants depend on."""

    x: str
    channels: int
    k: int
    mid: int
    hw: int
    align: int  # of the samples' stride
    hw_align: int
    bottleneck: bool
    final_relu: bool
    position: str
    channels_last: bool = False

    def constants(self) -> dict[str, object]:
        """Those of every kernel that has a tail, but for its block of pixels."""
        return {
            "C": self.channels, "K": self.k, "M": self.mid, "K_PAD": power_of_two(self.k),
            "M_PAD": power_of_two(self.mid), "ALIGN": self.align, "HW_ALIGN": self.hw_align,
            "BOTTLENECK": self.bottleneck, "FINAL_RELU": self.final_relu, "POSITION": self.position,
            "CHANNELS_LAST": self.channels_last,
        }  # fmt: skip


def own_tail_config(tail: Tail) -> TailConfig:
    """That of ``tail_``: half as many warps for planes of 7 x 7."""
    return tail_config(tail.k, tail.mid, tail.hw, num_warps=2 if tail.hw <= 64 else 4)


def tail_variants(tail: Tail) -> tuple[Variant, ...]:
    """The launches of ``tail_`` in order."""
    config = own_tail_config(tail)
    pointers = {"x_ptr": tail.x, "index_ptr": "i64"} | dict.fromkeys(("scores_ptr", "conv_ptr", "mid_ptr"), "fp32")
    scalars = {"stride_xn": "i64"} | dict.fromkeys(("hw_units", "width", "programs"), "i32")
    constants = tail.constants() | {"BLOCK_HW": config.block_hw}
    launches = ((True, False), (False, True)) if config.split else ((True, True),)
    parts = ({"FIRST": first, "REST": rest} for first, rest in launches)
    return tuple(
        _variant("tail_fwd_kernel", pointers, scalars, constants | part, config.num_warps) for part in parts
    )


def tail_programs(tail: Tail) -> int:
    """Programs per sample of each launch of :func:`tail_variants`."""
    return -(-tail.hw // own_tail_config(tail).block_hw)


def shared_out(channels: int, hidden: int, samples: int) -> str:
    """What the programs of a block's last launch have shares of (``SHARED_OUT`` in block.py).

    "pool": one launch for the whole block; "layers": two; "nothing": the layers go over the batch, four launches.
    """
    if channels * hidden <= ONE_LAUNCH_WEIGHTS:
        return "pool"
    return "layers" if samples <= BATCH_SAMPLES else "nothing"


def block_variants(selector: Selector, tail: Tail, shared_out: str) -> tuple[Variant, ...]:
    """The launches of a block in order; ``selector`` is ``fused``, and ``apart`` where ``shared_out`` is "layers".

    But for "pool" the last launch works in y alone: there is a launch between the copy and it.
    """
    if shared_out == "pool":
        return (_block_variant(selector, tail, shared_out),)
    last = _block_variant(replace(selector, pooled=False, copy=False), tail, shared_out)
    if shared_out == "layers":
        return pool_variant(selector), last
    # The pooled vectors go to memory: a channel's pixels are not split.
    pool = (pool_variant(replace(selector, fused=False), layer=False),) if needs_pass(selector) else ()
    return *pool, *linear_variants(selector), last


def needs_pass(selector: Selector) -> bool:
    """Whether x is gone through at all."""
    return selector.copy or not selector.pooled


def _block_variant(selector: Selector, tail: Tail, shared_out: str) -> Variant:
    x, fc1, fc2, bias1, bias2 = selector.types
    pool = selector.pool
    num_warps = BLOCK_WARPS // 2 if shared_out == "pool" and tail.hw <= 64 else BLOCK_WARPS
    pointers = {
        "x_ptr": x, "y_ptr": x, "pooled_ptr": "fp32", "fc1_weight_ptr": fc1, "fc1_bias_ptr": bias1,
        "fc2_weight_ptr": fc2, "fc2_bias_ptr": bias2, "conv_ptr": "fp32", "logits_ptr": "fp32", "index_ptr": "i64",
        "scratch_ptr": "fp32", "counters_ptr": "i32",
    }  # fmt: skip
    scalars = {"keys_units": "i64", "mid_units": "i64", "stride_xn": "i64", "hw_units": "i32", "width": "i32"}
    constants = selector.constants() | tail.constants()
    constants |= {
        "CHUNK_C": pool.chunk_channels, "PARTS": pool.parts, "POOL_HW": pool.block_hw, "RUN": pool.run,
        "LANES": pool.lanes, "BLOCK_R": pool.block_units,
        "TAIL_HW": tail_config(tail.k, tail.mid, tail.hw, num_warps).block_hw, "POOLED": selector.pooled,
        "COPY": selector.copy, "SHARED_OUT": shared_out,
    }  # fmt: skip
    return _variant("block_fwd_kernel", pointers, scalars, constants, num_warps)


def linear_variants(selector: Selector) -> tuple[Variant, Variant]:
    """The selector's two layers over the batch."""
    _, fc1, fc2, bias1, bias2 = selector.types
    channels, hidden = selector.channels, selector.hidden
    layers = (
        (fc1, bias1, channels, hidden, FIRST_LAYER_TILE, selector.biases[0], True),
        (fc2, bias2, hidden, channels, SECOND_LAYER_TILE, selector.biases[1], False),
    )
    pointers = ("in_ptr", "weight_ptr", "bias_ptr", "out_ptr")
    return tuple(
        _variant(
            "linear_fwd_kernel",
            dict(zip(pointers, ("fp32", weight, bias, "fp32"), strict=True)),
            {"samples": "i32"},
            {"INPUTS": inputs, "OUTPUTS": outputs}
            | dict(zip(("BLOCK_N", "BLOCK_IN", "BLOCK_OUT"), tile, strict=True))
            | {"HAS_BIAS": has_bias, "RELU": relu},
            num_warps=4,
        )
        for weight, bias, inputs, outputs, tile, has_bias, relu in layers
    )


def linear_programs(variant: Variant, samples: int) -> int:
    constants = dict(variant.constexprs)
    return -(-samples // constants["BLOCK_N"]) * -(-constants["OUTPUTS"] // constants["BLOCK_OUT"])


# align: of the samples' strides; hw_align: of H*W.


def gather_variant(
    x: str, channels: int, k: int, hw: int, align: int, hw_align: int, channels_last: bool
) -> Variant:
    """The gather's, for x's type."""
    config = gather_config(k, hw, channels_last)
    pointers = {"x_ptr": x, "index_ptr": "i64", "out_ptr": x}
    scalars = {"stride_xn": "i64", "hw_units": "i32", "tiles": "i32"}
    constants = {
        "C": channels, "K": k, "ALIGN": align, "HW_ALIGN": hw_align, "BLOCK_K": config.block_channels,
        "BLOCK_HW": config.block_hw, "CHANNELS_LAST": channels_last,
    }  # fmt: skip
    return _variant("gather_channels_fwd_kernel", pointers, scalars, constants, config.num_warps)


def fuse_variant(
    x: str, channels: int, k: int, hw: int, align: int, hw_align: int, position: str, channels_last: bool,
    z_channels_last: bool, in_place: bool,
) -> Variant:  # fmt: skip
    """The fuse's, out of place or in place, for x's type."""
    config = fuse_config(channels, k, hw, position, channels_last, in_place)
    scores = accumulator(x)
    # Only "original" reads an index; for the others scores stands in.
    index = "i64" if position == "original" else scores
    pointers = {"x_ptr": x, "z_ptr": x, "scores_ptr": scores, "index_ptr": index}
    scalars = {"stride_xn": "i64", "stride_zn": "i64", "hw_units": "i32", "tiles": "i32"}
    constants = {
        "C": channels, "K": k, "ALIGN": align, "HW_ALIGN": hw_align, "BLOCK_HW": config.block_hw,
        "POSITION": position, "CHANNELS_LAST": channels_last, "Z_CHANNELS_LAST": z_channels_last,
    }  # fmt: skip
    if in_place:
        constants |= {"K_PAD": power_of_two(k), "BLOCK_K": config.block_channels}
        return _variant("fuse_channels_inplace_fwd_kernel", pointers, scalars, constants, config.num_warps)
    pointers |= {"y_ptr": x}
    constants |= {"BLOCK_CH": config.block_channels}
    return _variant("fuse_channels_fwd_kernel", pointers, scalars, constants, config.num_warps)


def add_relu_pool_variant(
    x: str, channels: int, hw: int, align: int, hw_align: int, channels_last: bool, has_b: bool, relu: bool
) -> Variant:
    """That of add_relu_pool, in place or not."""
    config = add_relu_pool_config(x, channels, hw, hw_align, channels_last)
    pointers = {"a_ptr": x, "b_ptr": x, "y_ptr": x, "pooled_ptr": accumulator(x)}
    scalars = dict.fromkeys(("stride_an", "stride_bn", "stride_yn"), "i64") | {"hw_units": "i32"}
    constants = {
        "C": channels, "ALIGN": align, "HW_ALIGN": hw_align, "CHUNK_C": config.chunk_channels,
        "BLOCK_HW": config.block_hw, "RUN": config.run, "LANES": config.lanes, "CHANNELS_LAST": channels_last,
        "HAS_B": has_b, "RELU": relu,
    }  # fmt: skip
    return _variant("add_relu_pool_fwd_kernel", pointers, scalars, constants, config.num_warps)


def accumulator(x: str) -> str:
    """Triton's name of the type that values of type ``x`` are summed in."""
    return "fp64" if x == "fp64" else "fp32"


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


def variants(shape: Shape, dtype: str, position: str = "first", channels_last: bool = False) -> Iterator[Variant]:
    """Every variant that the ops launch for ``shape`` in ``dtype`` (a key of SCALAR_TYPES but float64).

    For dense x and z in one layout, weights of x's dtype and a selector without biases (the paper's), whatever the
    batch size, in place and out of place, with and without ``pooled``.
    """
    x = SCALAR_TYPES[dtype]
    aligns = align_of(shape.channels * shape.hw), align_of(shape.hw)
    tail = Tail(
        x, shape.channels, shape.k, shape.mid, shape.hw, *aligns, shape.kind == "bottleneck", False, position,
        channels_last,
    )  # fmt: skip
    apart = second_layer_apart(shape.channels, shape.hidden)
    selector = Selector(
        (x,) * 5, shape.channels, shape.hidden, shape.k, shape.hw, *aligns, channels_last, apart=apart
    )
    ways = dict.fromkeys(shared_out(shape.channels, shape.hidden, samples) for samples in (1, BATCH_SAMPLES + 1))
    for copy in (False, True):
        for pooled in (False, True):
            for way in ways:
                block = replace(selector, copy=copy, pooled=pooled, fused=True, apart=way == "layers")
                yield from block_variants(block, tail, way)
    for pooled in (False, True):
        yield pool_variant(replace(selector, pooled=pooled))
    if apart:
        yield layers_variant(selector)
    yield rank_variant(selector)
    yield from tail_variants(tail)
    yield from plane_variants(shape, dtype, position, channels_last)


def plane_variants(
    shape: Shape, dtype: str, position: str = "first", channels_last: bool = False
) -> Iterator[Variant]:
    """Those of gather, fuse and add_relu_pool, for dense x and z in one layout; ``dtype`` may be float64."""
    x, hw_align = SCALAR_TYPES[dtype], align_of(shape.hw)
    stride = shape.channels * shape.hw
    for has_b in (False, True):
        for relu in (False, True):
            yield add_relu_pool_variant(
                x, shape.channels, shape.hw, align_of(stride), hw_align, channels_last, has_b, relu
            )
    sizes = (x, shape.channels, shape.k, shape.hw)
    yield gather_variant(*sizes, align_of(stride), hw_align, channels_last)
    for in_place in (False, True):
        align = align_of(stride, shape.k * shape.hw)
        # z of one channel fits both layouts, and counts as NCHW.
        z_channels_last = channels_last and shape.k > 1
        yield fuse_variant(*sizes, align, hw_align, position, channels_last, z_channels_last, in_place)

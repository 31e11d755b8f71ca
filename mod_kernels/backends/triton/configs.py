"""Launch configurations as data, and the kernel variants they lead to.

A :class:`Variant` is all that decides what Triton compiles: kernel, argument types, constants, options. The
launcher (:mod:`.launch`) takes its variants from the functions here and so does the ahead-of-time check
(:mod:`.compile`), so what is checked is what runs. Neither Triton nor a GPU is needed to enumerate them.

Batch, height and width are run-time values: other image sizes reuse a variant as long as they fall into the
same block sizes and the same alignment. Nothing depends on the batch size but the number of programs and
whether the tail is one launch or two, neither of which changes a result: a sample's result does not depend
on the batch it is in. Nothing depends on the architecture yet: no kernel uses shared memory or registers to
a degree that differs between compute capabilities 8.0 and 12.0 (``test_ahead_of_time.py`` holds this).

The block sizes follow from counting registers and programs, not from timings on a device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

# Widest factor of the row length told to the compiler: 16 elements are 32 bytes in float16, more than one load.
MAX_ALIGN = 16
# float32 values a program keeps per tile: 32 registers a thread at 128 threads.
TILE = 4096
# From here on one more program per sample is worth less than a wider load.
MAX_BLOCK_HW = 1024
# Two launches of the tail (each over many programs) instead of one program per sample: when a sample has
# several tiles and the samples alone leave most of a GPU (72 to 170 multiprocessors) idle.
SPLIT_BELOW_SAMPLES = 64

# torch's names to Triton's, for the dtypes this engine serves.
SCALAR_TYPES = {"float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Variant:
    """One thing to compile: ``signature`` types the run-time arguments, ``constexprs`` are the constants."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    num_warps: int
    # The tail writes through pointers it also reads: no software pipelining across its iterations.
    num_stages: int = 1

    @functools.cached_property
    def arguments(self) -> dict[str, object]:
        """Keyword arguments of the launch beside the run-time ones."""
        return dict(self.constexprs) | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class SelectConfig:
    """A program pools ``chunk_channels`` x ``block_hw`` at a time; the last one of a sample runs the layers."""

    chunk_channels: int
    block_hw: int
    block_units: int
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
def select_config(channels: int, hidden: int, hw: int) -> SelectConfig:
    """Block sizes of the selector.

    Rows longer than a block are added up over several loads, so fewer channels a program keep its share near
    12 thousand elements (25 KB in float16: long enough to hide a launch, 64 programs a sample at 256x56x56).
    At most 64 channels a program, lest small maps leave too few programs.
    """
    block_hw = min(power_of_two(hw), MAX_BLOCK_HW)
    budget = TILE if hw > block_hw else 2 * TILE
    chunk = max(1, min(budget // block_hw, power_of_two(channels), 64))
    chunks = -(-channels // chunk)
    hidden_pad = power_of_two(hidden)
    # The last program of a sample alone reads R * C weights: from C = 512 on more threads pay.
    num_warps = 8 if chunk * block_hw > TILE or channels >= 512 else 4
    weights = TILE * num_warps // 4
    return SelectConfig(
        chunk_channels=chunk,
        block_hw=block_hw,
        block_units=min(hidden_pad, max(1, TILE // chunk)),
        block_slots=min(power_of_two(chunks), max(1, TILE // hidden_pad)),
        block_channels=min(power_of_two(channels), max(1, weights // hidden_pad)),
        num_warps=num_warps,
    )


@functools.lru_cache
def tail_config(samples: int, k: int, mid: int, hw: int) -> TailConfig:
    """Block sizes of the tail: k (or m) x block_hw float32 values within TILE, at least 16 pixels."""
    rows = power_of_two(max(k, mid))
    block_hw = max(16, min(power_of_two(hw), MAX_BLOCK_HW, TILE // rows))
    split = samples < SPLIT_BELOW_SAMPLES and hw > block_hw
    # Nine taps of addresses and masks are kept per pixel, whatever the number of rows: 4 pixels a thread.
    num_warps = 8 if block_hw >= 512 or rows * block_hw > TILE // 2 else 4
    return TailConfig(block_hw, num_warps, split)


@functools.lru_cache
def plane_config(channels: int, hw: int, one_plane: bool) -> PlaneConfig:
    """Block sizes of gather and fuse: a pass over memory, 16 elements a thread."""
    block_hw = min(power_of_two(hw), MAX_BLOCK_HW)
    block_channels = 1 if one_plane else max(1, min(power_of_two(channels), 2 * MAX_BLOCK_HW // block_hw))
    return PlaneConfig(block_channels, block_hw, num_warps=4 if block_channels * block_hw > 512 else 1)


def select_variant(
    dtypes: tuple[str, ...],
    channels: int,
    hidden: int,
    k: int,
    hw: int,
    align: int,
    biases: tuple[bool, bool],
    pooled: bool,
    copy: bool,
) -> Variant:
    """The selector's; ``dtypes`` (Triton's names): x, fc1_weight, fc2_weight, fc1_bias, fc2_bias.

    A bias that is not there is typed, and passed, as its layer's weight.
    """
    config = select_config(channels, hidden, hw)
    x, fc1, fc2, bias1, bias2 = dtypes
    pointers = {
        "x_ptr": x, "y_ptr": x, "pooled_ptr": "fp32", "fc1_weight_ptr": fc1, "fc2_weight_ptr": fc2,
        "fc1_bias_ptr": bias1, "fc2_bias_ptr": bias2, "partial_ptr": "fp32", "counter_ptr": "i32",
        "scores_ptr": "fp32", "index_ptr": "i64", "logits_ptr": "fp32", "hidden_ptr": "fp32",
    }  # fmt: skip
    constants = {
        "C": channels, "R": hidden, "K": k, "C_PAD": power_of_two(channels), "R_PAD": power_of_two(hidden),
        "K_PAD": power_of_two(k), "ALIGN": align, "CHUNK_C": config.chunk_channels, "BLOCK_HW": config.block_hw,
        "BLOCK_R": config.block_units, "BLOCK_SLOTS": config.block_slots, "BLOCK_C": config.block_channels,
        "HAS_FC1_BIAS": biases[0], "HAS_FC2_BIAS": biases[1], "POOLED": pooled, "COPY": copy,
    }  # fmt: skip
    scalars = {"stride_xn": "i64", "hw_units": "i32"}
    return _variant("select_channels_fwd_kernel", pointers, scalars, constants, config.num_warps)


def tail_variants(
    dtypes: tuple[str, ...],
    samples: int,
    channels: int,
    k: int,
    mid: int,
    hw: int,
    align: int,
    bottleneck: bool,
    final_relu: bool,
    position: str,
) -> tuple[Variant, ...]:
    """The tail's launches in order; ``dtypes``: x, then weight and bias of each convolution in turn (three)."""
    config = tail_config(samples, k, mid, hw)
    x, *convs = dtypes
    names = ("weight1_ptr", "bias1_ptr", "weight2_ptr", "bias2_ptr", "weight3_ptr", "bias3_ptr")
    pointers = {"x_ptr": x, "scores_ptr": "fp32", "index_ptr": "i64"}
    pointers |= dict(zip(names, convs, strict=True)) | {"mid_ptr": "fp32"}
    scalars = {"stride_xn": "i64", "hw_units": "i32", "width": "i32", "programs": "i32"}
    constants = {
        "C": channels, "K": k, "M": mid, "K_PAD": power_of_two(k), "M_PAD": power_of_two(mid), "ALIGN": align,
        "BLOCK_HW": config.block_hw, "BOTTLENECK": bottleneck, "FINAL_RELU": final_relu, "POSITION": position,
    }  # fmt: skip
    launches = ((True, False), (False, True)) if config.split else ((True, True),)
    return tuple(
        _variant(
            "tail_fwd_kernel", pointers, scalars, constants | {"FIRST": first, "REST": rest}, config.num_warps
        )
        for first, rest in launches
    )


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
    """Every variant that the ops launch for ``shape`` in ``dtype`` ("float16", "float32").

    For contiguous x and z in NCHW, weights of x's dtype and a selector without biases (the paper's), whatever
    the batch size, in place and out of place, with and without ``pooled``.
    """
    x = SCALAR_TYPES[dtype]
    align = align_of(shape.hw, shape.channels * shape.hw)
    sizes = (shape.channels, shape.hidden, shape.k, shape.hw, align)
    for copy in (False, True):
        for pooled in (False, True):
            yield select_variant((x,) * 5, *sizes, (False, False), pooled, copy)
    tails = {}
    for samples in (1, SPLIT_BELOW_SAMPLES):
        for variant in tail_variants(
            (x,) * 7, samples, shape.channels, shape.k, shape.mid, shape.hw, align,
            shape.kind == "bottleneck", False, position,
        ):  # fmt: skip
            tails[variant] = None
    yield from tails
    plain = (x, shape.channels, shape.k, shape.hw, align)
    yield gather_variant(*plain)
    for in_place in (False, True):
        yield fuse_variant(*plain, position, False, in_place)

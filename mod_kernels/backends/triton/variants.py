"""Kernel variants: all that decides what Triton compiles, from what a call is.

The launcher (:mod:`.launch`) takes its variants from the functions here, and so does the enumeration for the
paper's shapes (:mod:`.enumeration`): what is checked ahead of time is what runs. Neither Triton nor a GPU is
needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import configs, held_registers
from .configs import accumulator, power_of_two
from .tuning import Tuning


@dataclass(frozen=True)
class Variant:
    """One thing to compile: ``signature`` types the run-time arguments, ``constexprs`` are the constants."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    num_warps: int
    # The tail writes through pointers that it also reads: no software pipelining across its iterations.
    num_stages: int = 1
    max_registers: int | None = None  # a thread; None: ptxas decides

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
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return dict(self.constexprs) | options


@dataclass(frozen=True)
class Selector:
    """What the selector's variants depend on; ``types`` (Triton's names): x, fc1, fc2, fc1_bias, fc2_bias.

    A bias that is not there is typed, and passed, as its layer's weight. ``apart``: the second layer is shared out
    by slices of channels; else whoever ranks a sample does all of it. ``fused``: inside a block, where the pooled
    vector is needed by nobody else.
    """

    tuning: Tuning
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
    def pool(self) -> configs.PoolConfig:
        sizes = (self.channels, self.hw, self.hw_align)
        return configs.pool_config(self.tuning, self.types[0], *sizes, self.channels_last, self.fused)

    @property
    def layers(self) -> configs.LayersConfig:
        return configs.layers_config(self.tuning, self.channels, self.hidden, self.pool.shares, self.apart)

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
        "BLOCK_R": config.units(selector.hidden), "POOLED": selector.pooled, "COPY": selector.copy,
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

    tuning: Tuning
    x: str
    channels: int
    k: int
    mid: int
    hw: int
    align: int  # of the samples' stride
    hw_align: int
    kind: str
    final_relu: bool
    position: str
    channels_last: bool = False

    def constants(self, config: configs.TailConfig) -> dict[str, object]:
        """Those of every kernel that has a tail, but for its block of pixels."""
        return {
            "C": self.channels, "K": self.k, "M": self.mid, "K_PAD": power_of_two(self.k),
            "PLANES": self.planes, "BLOCK_M": config.block_mid, "ALIGN": self.align, "HW_ALIGN": self.hw_align,
            "KIND": self.kind, "FINAL_RELU": self.final_relu, "POSITION": self.position,
            "CHANNELS_LAST": self.channels_last,
        }  # fmt: skip

    @property
    def planes(self) -> int:
        """Of scratch, a sample: what the first convolution gives, and the rest reads."""
        return self.k if self.kind == "convnext" else self.mid

    @property
    def config(self) -> configs.TailConfig:
        """Of ``tail_``."""
        return configs.own_tail_config(self.tuning, self.kind, self.k, self.mid, self.hw)

    @property
    def programs(self) -> int:
        """Of ``tail_``, per sample, in each of its launches."""
        return -(-self.hw // self.config.block_hw)


def tail_variants(tail: Tail) -> tuple[Variant, ...]:
    """The launches of ``tail_`` in order."""
    config = tail.config
    pointers = {"x_ptr": tail.x, "index_ptr": "i64"} | dict.fromkeys(("scores_ptr", "conv_ptr", "mid_ptr"), "fp32")
    scalars = {"stride_xn": "i64"} | dict.fromkeys(("hw_units", "width", "programs"), "i32")
    constants = tail.constants(config) | {"BLOCK_HW": config.block_hw}
    launches = ((True, False), (False, True)) if config.split else ((True, True),)
    parts = ({"FIRST": first, "REST": rest} for first, rest in launches)
    held = held_registers.of_tail(tail.x, tail.hw, tail.channels_last, tail.kind)
    return tuple(
        replace(
            _variant("tail_fwd_kernel", pointers, scalars, constants | part, config.num_warps), max_registers=held
        )
        for part in parts
    )


class BlockVariants(NamedTuple):
    """The launches of a block in order; ``pool_shares`` programs of a sample in the first."""

    pool: Variant | None
    pool_shares: int
    layers: tuple[Variant, ...]  # over the batch
    finish: Variant

    def there(self) -> Iterator[Variant]:
        """Those that there are."""
        yield from (variant for variant in (self.pool, *self.layers, self.finish) if variant is not None)


def block_variants(selector: Selector, tail: Tail, shared_out: str) -> BlockVariants:
    """``selector`` is ``fused``, and ``apart`` where ``shared_out`` is "layers".

    But for "pool" the last launch works in y alone: there is a launch between the copy and it.
    """
    if shared_out == "pool":
        return BlockVariants(None, 0, (), _block_variant(selector, tail, shared_out))
    finish = _block_variant(replace(selector, pooled=False, copy=False), tail, shared_out)
    if shared_out == "layers":
        return BlockVariants(pool_variant(selector), selector.pool.shares, (), finish)
    # The pooled vectors go to memory: a channel's pixels are not split. Fed and in place x is not gone through.
    whole = replace(selector, fused=False)
    pool = None if selector.pooled and not selector.copy else pool_variant(whole, layer=False)
    return BlockVariants(pool, whole.pool.shares, linear_variants(selector), finish)


class PairVariants(NamedTuple):
    """The launches of an ending and the block after it, in order."""

    ending: Variant
    finish: Variant


def pair_variants(selector: Selector, tail: Tail, has_b: bool, relu: bool) -> PairVariants:
    """``selector`` is ``apart`` and not ``fused``: its shares are those that the ending pools."""
    ending = add_relu_layer_variant(selector, has_b, relu)
    return PairVariants(ending, _block_variant(selector, tail, "layers"))


def _block_variant(selector: Selector, tail: Tail, shared_out: str) -> Variant:
    x, fc1, fc2, bias1, bias2 = selector.types
    pool = selector.pool
    num_warps = configs.block_warps(tail.tuning, shared_out, tail.hw)
    pointers = {
        "x_ptr": x, "y_ptr": x, "pooled_ptr": "fp32", "fc1_weight_ptr": fc1, "fc1_bias_ptr": bias1,
        "fc2_weight_ptr": fc2, "fc2_bias_ptr": bias2, "conv_ptr": "fp32", "logits_ptr": "fp32", "index_ptr": "i64",
        "scratch_ptr": "fp32", "counters_ptr": "i32",
    }  # fmt: skip
    scalars = {"keys_units": "i64", "mid_units": "i64", "stride_xn": "i64", "hw_units": "i32", "width": "i32"}
    tail_config = configs.tail_config(tail.tuning, tail.kind, tail.k, tail.mid, tail.hw, num_warps)
    constants = selector.constants() | tail.constants(tail_config)
    constants |= {
        "CHUNK_C": pool.chunk_channels, "PARTS": pool.parts, "POOL_HW": pool.block_hw, "RUN": pool.run,
        "LANES": pool.lanes, "BLOCK_R": pool.units(selector.hidden), "TAIL_HW": tail_config.block_hw,
        "POOLED": selector.pooled, "COPY": selector.copy, "SHARED_OUT": shared_out,
    }  # fmt: skip
    variant = _variant("block_fwd_kernel", pointers, scalars, constants, num_warps)
    copies_only = selector.pooled and selector.copy
    form = (selector.channels_last, tail.kind, copies_only, shared_out)
    held = held_registers.of_block(selector.tuning, x, tail.hw, *form)
    return replace(variant, max_registers=held)


def linear_variants(selector: Selector) -> tuple[Variant, Variant]:
    """The selector's two layers over the batch."""
    _, fc1, fc2, bias1, bias2 = selector.types
    channels, hidden, tuning = selector.channels, selector.hidden, selector.tuning
    layers = (
        (fc1, bias1, channels, hidden, tuning.first_layer_tile, selector.biases[0], True),
        (fc2, bias2, hidden, channels, tuning.second_layer_tile, selector.biases[1], False),
    )
    pointers = ("in_ptr", "weight_ptr", "bias_ptr", "out_ptr")
    return tuple(
        replace(
            _variant(
                "linear_fwd_kernel",
                dict(zip(pointers, ("fp32", weight, bias, "fp32"), strict=True)),
                {"samples": "i32"},
                {"INPUTS": inputs, "OUTPUTS": outputs}
                | dict(zip(("BLOCK_N", "BLOCK_IN", "BLOCK_OUT"), tile, strict=True))
                | {"HAS_BIAS": has_bias, "RELU": relu},
                num_warps=tuning.linear_warps,
            ),
            max_registers=held_registers.of_linear(weight, relu),
        )
        for weight, bias, inputs, outputs, tile, has_bias, relu in layers
    )


def linear_programs(variant: Variant, samples: int) -> int:
    constants = dict(variant.constexprs)
    return -(-samples // constants["BLOCK_N"]) * -(-constants["OUTPUTS"] // constants["BLOCK_OUT"])


# align: of the samples' strides (z_align: of z's); hw_align: of H*W.


def gather_variant(
    tuning: Tuning, x: str, channels: int, k: int, hw: int, align: int, hw_align: int, channels_last: bool
) -> Variant:
    """The gather's, for x's type."""
    config = configs.gather_config(tuning, x, k, hw, channels_last)
    pointers = {"x_ptr": x, "index_ptr": "i64", "out_ptr": x}
    scalars = {"stride_xn": "i64", "hw_units": "i32", "tiles": "i32"}
    constants = {
        "C": channels, "K": k, "ALIGN": align, "HW_ALIGN": hw_align, "BLOCK_K": config.block_channels,
        "BLOCK_HW": config.block_hw, "CHANNELS_LAST": channels_last,
    }  # fmt: skip
    return _variant("gather_channels_fwd_kernel", pointers, scalars, constants, config.num_warps)


def fuse_variant(
    tuning: Tuning, x: str, channels: int, k: int, hw: int, align: int, z_align: int, hw_align: int, position: str,
    channels_last: bool, z_channels_last: bool, in_place: bool,
) -> Variant:  # fmt: skip
    """The fuse's, out of place or in place, for x's type."""
    config = configs.fuse_config(
        tuning, x, channels, k, hw, hw_align, position, channels_last, z_channels_last, in_place
    )
    scores = accumulator(x)
    pointers = {"x_ptr": x, "z_ptr": x, "scores_ptr": scores}
    scalars = {"stride_xn": "i64", "stride_zn": "i64", "hw_units": "i32", "tiles": "i32"}
    constants = {
        "C": channels, "K": k, "ALIGN": align, "Z_ALIGN": z_align, "HW_ALIGN": hw_align, "POSITION": position,
    }  # fmt: skip
    if config.flat:
        pointers |= {"y_ptr": x}
        constants |= {"BLOCK": config.block_hw, "IN_PLACE": in_place}
        return _variant("fuse_channels_flat_fwd_kernel", pointers, scalars, constants, config.num_warps)
    # Only "original" reads an index; for the others scores stands in.
    pointers |= {"index_ptr": "i64" if position == "original" else scores}
    constants |= {
        "BLOCK_HW": config.block_hw, "CHANNELS_LAST": channels_last, "Z_CHANNELS_LAST": z_channels_last,
    }  # fmt: skip
    if in_place:
        constants |= {"K_PAD": power_of_two(k), "BLOCK_K": config.block_channels}
        return _variant("fuse_channels_inplace_fwd_kernel", pointers, scalars, constants, config.num_warps)
    pointers |= {"y_ptr": x}
    constants |= {"BLOCK_CH": config.block_channels}
    return _variant("fuse_channels_fwd_kernel", pointers, scalars, constants, config.num_warps)


def add_relu_pool_variant(
    tuning: Tuning, x: str, channels: int, hw: int, align: int, hw_align: int, channels_last: bool, has_b: bool,
    relu: bool,
) -> Variant:  # fmt: skip
    """That of add_relu_pool, in place or not."""
    config = configs.pool_config(tuning, x, channels, hw, hw_align, channels_last)
    constants = {
        "C": channels, "ALIGN": align, "HW_ALIGN": hw_align, "CHUNK_C": config.chunk_channels,
        "BLOCK_HW": config.block_hw, "RUN": config.run, "LANES": config.lanes, "CHANNELS_LAST": channels_last,
        "HAS_B": has_b, "RELU": relu,
    }  # fmt: skip
    pointers = {"a_ptr": x, "b_ptr": x, "y_ptr": x, "pooled_ptr": accumulator(x)}
    variant = _variant("add_relu_pool_fwd_kernel", pointers, _ENDING_SCALARS, constants, config.num_warps)
    return replace(variant, max_registers=held_registers.of_add_relu_pool(x, hw, channels_last))


_ENDING_SCALARS = dict.fromkeys(("stride_an", "stride_bn", "stride_yn"), "i64") | {"hw_units": "i32"}


def add_relu_layer_variant(selector: Selector, has_b: bool, relu: bool) -> Variant:
    """That of an ending that also does the first layer of ``selector``, which is not ``fused``."""
    x, fc1, *_ = selector.types
    sizes = (selector.channels, selector.hw, selector.align, selector.hw_align, selector.channels_last)
    ending = add_relu_pool_variant(selector.tuning, x, *sizes, has_b, relu)
    constants = dict(ending.constexprs) | {"R": selector.hidden, "BLOCK_R": selector.pool.units(selector.hidden)}
    pointers = {
        "a_ptr": x, "b_ptr": x, "y_ptr": x, "pooled_ptr": "fp32", "fc1_weight_ptr": fc1, "slots_ptr": "fp32",
    }  # fmt: skip
    variant = _variant("add_relu_layer_fwd_kernel", pointers, _ENDING_SCALARS, constants, ending.num_warps)
    return replace(variant, max_registers=ending.max_registers)


def _variant(kernel: str, pointers: dict, scalars: dict, constants: dict, num_warps: int) -> Variant:
    signature = {name: "*" + kind for name, kind in pointers.items()} | scalars
    return Variant(kernel, tuple(signature.items()), tuple(constants.items()), num_warps)

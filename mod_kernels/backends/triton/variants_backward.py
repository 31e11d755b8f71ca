"""Variants of the backward kernels; :mod:`.variants` says what those are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from . import configs_backward
from .configs import accumulator
from .tuning import Tuning
from .variants import Variant, _variant


def fuse_backward_variant(
    x: str, channels: int, k: int, hw: int, align: int, hw_align: int, position: str, channels_last: bool,
    z_needed: bool, scores_needed: bool,
) -> Variant:  # fmt: skip
    """``align``: of the strides of dy's and z's samples."""
    config = configs_backward.fuse_backward_config(x, k, hw, channels_last)
    scores = accumulator(x)
    # Only "original" reads an index; for the others scores stands in.
    index = "i64" if position == "original" else scores
    pointers = {"dy_ptr": x, "z_ptr": x, "scores_ptr": scores, "index_ptr": index}
    pointers |= {"dz_ptr": x, "dscores_ptr": scores}
    scalars = {"stride_dyn": "i64", "stride_zn": "i64", "hw_units": "i32"}
    constants = {
        "C": channels, "K": k, "ALIGN": align, "HW_ALIGN": hw_align, "BLOCK_K": config.block_k,
        "BLOCK_HW": config.block_hw, "POSITION": position, "CHANNELS_LAST": channels_last, "Z_NEEDED": z_needed,
        "SCORES_NEEDED": scores_needed,
    }  # fmt: skip
    return _variant("fuse_channels_bwd_kernel", pointers, scalars, constants, config.num_warps)


class Needed(NamedTuple):
    """Gradients that select_channels_backward is to make, in its outputs' order."""

    pooled: bool = True
    fc1: bool = True
    fc2: bool = True
    fc1_bias: bool = True
    fc2_bias: bool = True

    @property
    def logits(self) -> bool:
        """Whether any of them is made of the logits' gradient, as a matrix."""
        return self.fc2 or self.fc2_bias

    @property
    def hidden(self) -> bool:
        """Whether any is made of the hidden layer's."""
        return self.pooled or self.fc1 or self.fc1_bias


def select_backward_variants(
    tuning: Tuning, fc1: str, fc2: str, channels: int, hidden: int, k: int, needed: Needed
) -> tuple[Variant, Variant]:
    """The two launches in order, for the weights' types."""
    config = configs_backward.select_backward_config(tuning, channels, hidden, k)
    floats = dict.fromkeys
    first = _variant(
        "select_hidden_bwd_kernel",
        floats(("dscores_ptr", "scores_ptr"), "fp32")
        | {"index_ptr": "i64", "hidden_ptr": "fp32", "fc2_weight_ptr": fc2}
        | floats(("dlogits_ptr", "dhidden_ptr"), "fp32"),
        {},
        {
            "C": channels, "R": hidden, "K": k, "BLOCK_K": config.block_k, "BLOCK_R": config.block_units,
            "BLOCK_C": config.block_channels, "LOGITS": needed.logits, "HIDDEN": needed.hidden,
        },
        config.num_warps,
    )  # fmt: skip
    second = _variant(
        "select_weights_bwd_kernel",
        floats(("dlogits_ptr", "dhidden_ptr", "hidden_ptr", "pooled_ptr"), "fp32")
        | {"fc1_weight_ptr": fc1}
        | floats(("dpooled_ptr", "dfc1_weight_ptr", "dfc2_weight_ptr", "dfc1_bias_ptr", "dfc2_bias_ptr"), "fp32"),
        {"samples": "i32"},
        {"C": channels, "R": hidden}
        | dict(zip(("BLOCK_N", "BLOCK_C", "BLOCK_R"), config.tile, strict=True))
        | {name.upper(): one for name, one in needed._asdict().items()},
        config.num_warps,
    )
    return first, second


def select_weights_programs(variant: Variant, samples: int) -> int:
    """Of the second launch."""
    constants = dict(variant.constexprs)
    channel_blocks = -(-constants["C"] // constants["BLOCK_C"])
    programs = 0
    if any(constants[name] for name in ("FC1", "FC2", "FC1_BIAS", "FC2_BIAS")):
        programs += channel_blocks * -(-constants["R"] // constants["BLOCK_R"])
    if constants["POOLED"]:
        programs += channel_blocks * -(-samples // constants["BLOCK_N"])
    return programs


@dataclass(frozen=True)
class Parts:
    """What input_gradient adds to dy, and by what it masks."""

    dpooled: bool = False
    dgathered: bool = False
    y: bool = False
    overwritten: bool = False

    def reads_index(self, position: str) -> bool:
        return self.dgathered or (self.overwritten and position == "original")


def input_gradient_variant(
    tuning: Tuning, x: str, channels: int, k: int, hw: int, aligns: tuple[int, int, int], position: str,
    channels_last: bool, parts: Parts,
) -> Variant:  # fmt: skip
    """``aligns``: of the strides of dy and y, of those of dgathered and overwritten, of H*W.

    k is 1 and position "first" where no part depends on them. For a part that is not there dy is passed.
    """
    config = configs_backward.input_gradient_config(tuning, x, channels, k, hw, aligns[2], channels_last)
    pointers = {
        "dy_ptr": x, "dpooled_ptr": accumulator(x) if parts.dpooled else x, "dgathered_ptr": x,
        "index_ptr": "i64" if parts.reads_index(position) else x, "y_ptr": x, "overwritten_ptr": x, "dx_ptr": x,
    }  # fmt: skip
    strides = ("stride_dyn", "stride_yn", "stride_gathered", "stride_overwritten")
    scalars = dict.fromkeys(strides, "i64") | {"hw_units": "i32", "tiles": "i32"}
    constants = {
        "C": channels, "K": k, "ALIGN": aligns[0], "K_ALIGN": aligns[1], "HW_ALIGN": aligns[2],
        "CHUNK_C": config.chunk_channels, "BLOCK_K": config.block_k, "BLOCK_HW": config.block_hw,
        "STEPS": config.steps, "RUN": config.run, "POSITION": position, "CHANNELS_LAST": channels_last,
        "HAS_DPOOLED": parts.dpooled, "HAS_DGATHERED": parts.dgathered, "HAS_Y": parts.y,
        "HAS_OVERWRITTEN": parts.overwritten,
    }  # fmt: skip
    return _variant("input_gradient_bwd_kernel", pointers, scalars, constants, config.num_warps)

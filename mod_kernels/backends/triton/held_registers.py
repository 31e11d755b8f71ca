"""Registers a thread that ptxas is held to, for variants it spills a few of if left alone; None for all others.

It does so far from any limit, to have a program more on a multiprocessor or for no reason to be seen; given a
number it spills nothing. The numbers were found by trial with Triton 3.8, on the architectures named; what has one
has it on all six, and spills on none (``mod-kernels resources``). With others, larger ones too, some variant
spills. What differs from class to class is in a tuning (``Tuning.block_registers``).
"""

from __future__ import annotations

from .tuning import Tuning


def of_block(
    tuning: Tuning, x: str, hw: int, channels_last: bool, kind: str, copies_only: bool, shared_out: str
) -> int | None:
    """A block's last launch.

    In NCHW short planes: ConvNeXt's (8.0, 10.0, 12.0), and VGG's of 4x4 in half precision (8.0). In channels_last:
    float32 bottlenecks where x is copied but not pooled (8.6, 8.9) or neither (10.0); in half precision planes of
    7x7 (9.0, and 10.0 where the layers went over the batch); ConvNeXt's short planes (8.0, 8.6); VGG's of 16x16 in
    float16 (9.0).
    """
    if channels_last:
        if shared_out == "nothing":
            return 88 if x == "bf16" else 80
        if x == "fp32" and kind == "bottleneck" and copies_only:
            return 80
        if x == "bf16" and hw <= 64:
            return 64
        if hw <= 256 and (kind == "convnext" or (kind == "conv" and hw > 196 and x == "fp16")):
            return 64
    elif hw <= 256 if kind == "convnext" else kind == "conv" and hw <= 16 and x != "fp32":
        return 64
    if shared_out != "pool" or not 512 < hw <= 1024:
        return None
    takes_more = kind == "convnext" or (channels_last and x == "fp32")
    return None if takes_more else tuning.block_registers


def of_tail(x: str, hw: int, channels_last: bool, kind: str) -> int | None:
    """The tail by itself: ConvNeXt's of 7x7 (8.0)."""
    return 96 if kind == "convnext" and channels_last and x == "fp32" and hw <= 64 else None


def of_linear(weight: str, relu: bool) -> int | None:
    """A layer over the batch: the second one of float32 weights (10.0)."""
    return 96 if weight == "fp32" and not relu else None


def of_add_relu_pool(x: str, hw: int, channels_last: bool) -> int | None:
    """The ending of the block before: MobileNetV2's 160 channels of 7x7 (8.6, 8.9)."""
    return 80 if x == "fp32" and channels_last and hw <= 64 else None

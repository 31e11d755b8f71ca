"""The raw ops on the host: outputs and scratch allocated, variant looked up, kernel launched.

Functions carry the raw ops' arguments (:data:`mod_kernels._library.OPS`), workspace last where there is one.
Arguments have been checked and laid out by :mod:`mod_kernels.functional`.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from ..._layout import CHANNELS_LAST, layout_of
from . import configs
from .configs import Variant, align_of

_TYPE_NAMES = {getattr(torch, name): kind for name, kind in configs.SCALAR_TYPES.items()}


@functools.cache
def kernels() -> dict[str, object]:
    """Every kernel by its name; the first call imports Triton."""
    from . import fuse, gather, select, tail

    return {
        "select_channels_fwd_kernel": select.select_channels_fwd_kernel,
        "tail_fwd_kernel": tail.tail_fwd_kernel,
        "gather_channels_fwd_kernel": gather.gather_channels_fwd_kernel,
        "fuse_channels_fwd_kernel": fuse.fuse_channels_fwd_kernel,
        "fuse_channels_inplace_fwd_kernel": fuse.fuse_channels_inplace_fwd_kernel,
    }


def run(variant: Variant, programs: int, arguments: dict[str, object]) -> None:
    """Launch ``programs`` programs of a variant on the current device and stream."""
    kernels()[variant.kernel][(programs,)](**arguments, **variant.arguments)


def _on_device_of(x: Tensor):
    """Triton launches on the current device: make it x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _plane_geometry(x: Tensor) -> tuple[int, int, int]:
    """(H*W, elements from sample to sample, alignment of both)."""
    _, c, h, w = x.shape
    stride = x.stride(0) if x.shape[0] > 1 else c * h * w
    return h * w, stride, align_of(h * w, stride)


_select_variant = functools.lru_cache(maxsize=1024)(configs.select_variant)
_tail_variants = functools.lru_cache(maxsize=1024)(configs.tail_variants)
_gather_variant = functools.lru_cache(maxsize=1024)(configs.gather_variant)
_fuse_variant = functools.lru_cache(maxsize=1024)(configs.fuse_variant)


def _select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, workspace, y=None):
    """The selector; with ``y``, x is copied into it on the way. Returns what select_channels does."""
    n, channels = x.shape[:2]
    hidden_size = fc1_weight.shape[0]
    scores = x.new_empty((n, k), dtype=torch.float32)
    index = x.new_empty((n, k), dtype=torch.int64)
    logits = x.new_empty((n, channels), dtype=torch.float32)
    hidden = x.new_empty((n, hidden_size), dtype=torch.float32)
    pooled_out = x.new_empty((n, channels) if pooled is None else (0,), dtype=torch.float32)
    if n == 0:
        return scores, index, logits, hidden, pooled_out
    if workspace.numel() < n:
        raise RuntimeError(f"workspace must hold a counter per sample: {n} are needed, got {workspace.numel()}")
    hw, stride, align = _plane_geometry(x)
    bias1 = fc1_weight if fc1_bias is None else fc1_bias
    bias2 = fc2_weight if fc2_bias is None else fc2_bias
    types = tuple(_TYPE_NAMES[t.dtype] for t in (x, fc1_weight, fc2_weight, bias1, bias2))
    biases = (fc1_bias is not None, fc2_bias is not None)
    variant = _select_variant(
        types, channels, hidden_size, k, hw, align, biases, pooled is not None, y is not None
    )
    chunks = -(-channels // configs.select_config(channels, hidden_size, hw).chunk_channels)
    arguments = {
        "x_ptr": x,
        "y_ptr": x if y is None else y,
        "pooled_ptr": pooled_out if pooled is None else pooled,
        "fc1_weight_ptr": fc1_weight,
        "fc2_weight_ptr": fc2_weight,
        "fc1_bias_ptr": bias1,
        "fc2_bias_ptr": bias2,
        "partial_ptr": torch.empty((n, chunks, hidden_size), dtype=torch.float32, device=x.device),
        "counter_ptr": workspace,
        "scores_ptr": scores,
        "index_ptr": index,
        "logits_ptr": logits,
        "hidden_ptr": hidden,
        "stride_xn": stride // align,
        "hw_units": hw // align,
    }
    with _on_device_of(x):
        run(variant, n * chunks, arguments)
    return scores, index, logits, hidden, pooled_out


def select_channels(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, workspace):
    return _select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, workspace)


def gather_channels(x, index):
    n, channels, h, w = x.shape
    k = index.shape[1]
    out = torch.empty((n, k, h, w), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    hw, stride, align = _plane_geometry(x)
    variant = _gather_variant(_TYPE_NAMES[x.dtype], channels, k, hw, align)
    tiles = -(-hw // configs.plane_config(channels, hw, one_plane=True).block_hw)
    arguments = {
        "x_ptr": x,
        "index_ptr": index,
        "out_ptr": out,
        "stride_xn": stride // align,
        "hw_units": hw // align,
        "tiles": tiles,
    }
    with _on_device_of(x):
        run(variant, n * k * tiles, arguments)
    return out


def _fuse(x, z, scores, index, position, y):
    """The fuse, into ``y`` or, with ``y`` None, in place."""
    n, channels = x.shape[:2]
    k = z.shape[1]
    if x.numel() == 0:
        return
    hw, stride, align = _plane_geometry(x)
    in_place = y is None
    z_channels_last = layout_of(z) == CHANNELS_LAST
    variant = _fuse_variant(_TYPE_NAMES[x.dtype], channels, k, hw, align, position, z_channels_last, in_place)
    config = configs.plane_config(channels, hw, one_plane=in_place)
    tiles = -(-hw // config.block_hw)
    arguments = {
        "x_ptr": x,
        "z_ptr": z,
        "scores_ptr": scores,
        # Read for position "original" alone; else scores stands in, as the signature says.
        "index_ptr": index if position == "original" else scores,
        "stride_xn": stride // align,
        "stride_zn": z.stride(0) if n > 1 else k * hw,
        "hw_units": hw // align,
        "tiles": tiles,
    }
    if in_place:
        programs = n * k * tiles
    else:
        programs = n * -(-channels // config.block_channels) * tiles
        arguments["y_ptr"] = y
    with _on_device_of(x):
        run(variant, programs, arguments)


def fuse_channels(x, z, scores, index, position):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _fuse(x, z, scores, index, position, y)
    return y


def fuse_channels_(x, z, scores, index, position):
    _fuse(x, z, scores, index, position, None)


def tail_(x, scores, index, conv_weights, conv_biases, kind, final_relu, position):
    n, channels, h, w = x.shape
    if x.numel() == 0:
        return
    bottleneck = kind == "bottleneck"
    mid_channels = conv_weights[0].shape[0]
    k = index.shape[1]
    convs = [tensor for pair in zip(conv_weights, conv_biases, strict=True) for tensor in pair]
    if not bottleneck:
        convs += convs[2:]  # a basic block has no third convolution: its second's tensors stand in, unread
    hw, stride, align = _plane_geometry(x)
    types = tuple(_TYPE_NAMES[t.dtype] for t in (x, *convs))
    launches = _tail_variants(types, n, channels, k, mid_channels, hw, align, bottleneck, final_relu, position)
    weight1, bias1, weight2, bias2, weight3, bias3 = convs
    programs = -(-hw // configs.tail_config(n, k, mid_channels, hw).block_hw) if len(launches) > 1 else 1
    arguments = {
        "x_ptr": x,
        "scores_ptr": scores,
        "index_ptr": index,
        "weight1_ptr": weight1,
        "bias1_ptr": bias1,
        "weight2_ptr": weight2,
        "bias2_ptr": bias2,
        "weight3_ptr": weight3,
        "bias3_ptr": bias3,
        "mid_ptr": torch.empty((n, mid_channels, h, w), dtype=torch.float32, device=x.device),
        "stride_xn": stride // align,
        "hw_units": hw // align,
        "width": w,
        "programs": programs,
    }
    with _on_device_of(x):
        for variant in launches:
            run(variant, n * programs, arguments)


def mod_block(
    x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k,
    conv_weights, conv_biases, kind, final_relu, position, workspace,
):  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    selection = _select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, workspace, y)
    scores, index, logits = selection[:3]
    tail_(y, scores, index, conv_weights, conv_biases, kind, final_relu, position)
    return y, scores, index, logits


def mod_block_(
    x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k,
    conv_weights, conv_biases, kind, final_relu, position, workspace,
):  # fmt: skip
    scores, index, logits = _select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, workspace)[:3]
    tail_(x, scores, index, conv_weights, conv_biases, kind, final_relu, position)
    return scores, index, logits

"""The raw ops on the host: outputs and scratch allocated, variants looked up, kernels launched.

Functions carry the raw ops' arguments (:data:`mod_kernels._library.OPS`), which have been checked and laid out by
:mod:`mod_kernels.functional`. Which variants a call needs is worked out once for its sizes (the plans below).
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..._layout import CHANNELS_LAST, layout_of
from ...spec import read_form
from . import configs
from .configs import Selector, Tail, Variant, align_of

_TYPE_NAMES = {getattr(torch, name): kind for name, kind in configs.SCALAR_TYPES.items()}
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_PLANS = 1024  # remembered for each op: sizes a process meets, batch sizes included


@functools.cache
def kernels() -> dict[str, object]:
    """Every kernel by its name; the first call imports Triton."""
    from . import add_relu_pool, fuse, gather, select, tail

    return {
        "pool_fwd_kernel": select.pool_fwd_kernel,
        "layers_fwd_kernel": select.layers_fwd_kernel,
        "rank_fwd_kernel": select.rank_fwd_kernel,
        "add_relu_pool_fwd_kernel": add_relu_pool.add_relu_pool_fwd_kernel,
        "tail_fwd_kernel": tail.tail_fwd_kernel,
        "gather_channels_fwd_kernel": gather.gather_channels_fwd_kernel,
        "fuse_channels_fwd_kernel": fuse.fuse_channels_fwd_kernel,
        "fuse_channels_inplace_fwd_kernel": fuse.fuse_channels_inplace_fwd_kernel,
    }


def run(variant: Variant, programs: int, *arguments: Tensor | int) -> None:
    """Launch ``programs`` programs of a variant on the current device and stream.

    ``arguments``: the run-time ones in the signature's order, tensors first. Triton's own launch works out types,
    alignment and constants of some thirty arguments at every call, some 30 us; here they are known, so where
    every tensor starts at a multiple of 16 bytes, as torch's allocator gives them, the compiled kernel is kept and
    called with addresses. Other views go Triton's way, which compiles a variant with narrower loads for them.
    """
    kernel = kernels()[variant.kernel]
    if _INTERPRETING:
        kernel[(programs,)](*arguments, **variant.arguments)
        return
    tensors = arguments[: variant.tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]
    if functools.reduce(operator.or_, addresses) % 16:
        kernel[(programs,)](*arguments, **variant.arguments)
        return
    device = torch.cuda.current_device()
    found = variant.compiled.get(device)
    if found is None:
        compiled = kernel.warmup(*arguments, **variant.arguments, grid=(1,))
        constants = dict(variant.constexprs)
        found = compiled, tuple(constants[name] for name in kernel.arg_names if name in constants)
        variant.compiled[device] = found
    compiled, constants = found
    compiled[(programs, 1, 1)](*addresses, *arguments[variant.tensors :], *constants)


def _on_device_of(x: Tensor):
    """Triton launches on the current device: make it x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _sample_stride(x: Tensor) -> int:
    """Elements from sample to sample."""
    n, channels, h, w = x.shape
    return x.stride(0) if n > 1 else channels * h * w


def _units(elements: int) -> int:
    """Sixteens that hold so many float32 values: sections of scratch start at such a multiple."""
    return -(-elements // 16)


# ---- select


class _SelectPlan(NamedTuple):
    """Launches of the selector with their programs; ``layers`` None where the layers are not apart."""

    selector: Selector
    pool: Variant
    pool_programs: int
    layers: Variant | None
    layers_programs: int
    rank: Variant
    keys_units: int  # where the keys begin in scratch
    scratch_units: int


@functools.lru_cache(_PLANS)
def _select_plan(
    types: tuple[torch.dtype, ...], n: int, channels: int, hidden: int, k: int, hw: int, stride: int,
    biases: tuple[bool, bool], pooled: bool, copy: bool, store_hidden: bool,
) -> _SelectPlan:  # fmt: skip
    names = tuple(_TYPE_NAMES[dtype] for dtype in types)
    selector = Selector(names, channels, hidden, k, hw, align_of(hw, stride), biases, pooled, copy)
    chunks, slices = selector.pool.chunks, selector.slices
    keys_units = _units(n * chunks * hidden)
    apart = selector.layers.apart
    return _SelectPlan(
        selector,
        configs.pool_variant(selector),
        n * chunks,
        configs.layers_variant(selector, store_hidden) if apart else None,
        n * slices,
        configs.rank_variant(selector),
        keys_units,
        keys_units + (_units(2 * n * slices * selector.keep) if apart else 0),
    )


def _check_size(x: Tensor) -> None:
    """Offsets inside a sample are int32 in the kernels; between samples they are int64."""
    if x.shape[1:].numel() >= 2**31:
        raise ValueError(f"the Triton kernels take samples of fewer than 2^31 elements, got {tuple(x.shape)}")


def _selector_key(x, fc1_weight, fc2_weight, bias1, bias2, biases, pooled, k):
    """What :func:`_select_plan` depends on; a bias that is not there is given as its layer's weight."""
    n, channels, h, w = x.shape
    types = (x.dtype, fc1_weight.dtype, fc2_weight.dtype, bias1.dtype, bias2.dtype)
    hw, stride = h * w, _sample_stride(x)
    return types, n, channels, fc1_weight.shape[0], k, hw, stride, biases, pooled is not None


def _run_layers(plan, x, y, pooled, scratch, fc1_weight, fc2_weight, bias1, bias2, hidden, logits):
    """Pooling with the first layer's parts and, where it is apart, the second layer."""
    align = plan.selector.align
    units, stride = x.shape[2] * x.shape[3] // align, _sample_stride(x) // align
    run(plan.pool, plan.pool_programs, x, y, pooled, fc1_weight, scratch, stride, units)
    if plan.layers is not None:
        pointers = (scratch, bias1, fc2_weight, bias2, hidden, logits)
        run(plan.layers, plan.layers_programs, *pointers, plan.keys_units)


def _select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, saving):
    """scores and index; ``saving``: logits, hidden and pooled_out too, which else are scratch."""
    n, channels = x.shape[:2]
    hidden_size = fc1_weight.shape[0]
    scores = x.new_empty((n, k), dtype=torch.float32)
    index = x.new_empty((n, k), dtype=torch.int64)
    logits = x.new_empty((n, channels), dtype=torch.float32)
    hidden = x.new_empty((n, hidden_size), dtype=torch.float32)
    # Pooled values may lie where the logits will: a launch ends between the last read and the first write.
    pooled_out = logits
    if saving:
        pooled_out = x.new_empty((n, channels) if pooled is None else (0,), dtype=torch.float32)
    outputs = (scores, index, logits, hidden, pooled_out) if saving else (scores, index)
    if n == 0:
        return outputs
    _check_size(x)
    biases = (fc1_bias is not None, fc2_bias is not None)
    bias1, bias2 = (fc1_bias if biases[0] else fc1_weight), (fc2_bias if biases[1] else fc2_weight)
    key = _selector_key(x, fc1_weight, fc2_weight, bias1, bias2, biases, pooled, k)
    plan = _select_plan(*key, copy=False, store_hidden=True)
    scratch = x.new_empty((16 * plan.scratch_units,), dtype=torch.float32)
    given = pooled_out if pooled is None else pooled
    with _on_device_of(x):
        _run_layers(plan, x, x, given, scratch, fc1_weight, fc2_weight, bias1, bias2, hidden, logits)
        pointers = (scratch, bias1, fc2_weight, bias2, hidden, logits, index, scores)
        run(plan.rank, n, *pointers, plan.keys_units)
    return outputs


def select_channels(*arguments):
    return _select(*arguments, saving=False)


def select_channels_saving(*arguments):
    return _select(*arguments, saving=True)


# ---- gather and fuse

_gather_variant = functools.lru_cache(_PLANS)(configs.gather_variant)
_fuse_variant = functools.lru_cache(_PLANS)(configs.fuse_variant)


def gather_channels(x, index):
    n, channels, h, w = x.shape
    k = index.shape[1]
    out = torch.empty((n, k, h, w), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    hw, stride = h * w, _sample_stride(x)
    align = align_of(hw, stride)
    variant = _gather_variant(_TYPE_NAMES[x.dtype], channels, k, hw, align)
    tiles = -(-hw // configs.plane_config(channels, hw, one_plane=True).block_hw)
    with _on_device_of(x):
        run(variant, n * k * tiles, x, index, out, stride // align, hw // align, tiles)
    return out


def _fuse(x, z, scores, index, position, y):
    """The fuse, into ``y`` or, with ``y`` None, in place."""
    n, channels, h, w = x.shape
    k = z.shape[1]
    if x.numel() == 0:
        return
    hw, stride = h * w, _sample_stride(x)
    align = align_of(hw, stride)
    in_place = y is None
    z_channels_last = layout_of(z) == CHANNELS_LAST
    variant = _fuse_variant(_TYPE_NAMES[x.dtype], channels, k, hw, align, position, z_channels_last, in_place)
    config = configs.plane_config(channels, hw, one_plane=in_place)
    tiles = -(-hw // config.block_hw)
    # Read for position "original" alone; else scores stands in, as the signature says.
    index = index if position == "original" else scores
    pointers = (x, z, scores, index) if in_place else (x, z, scores, index, y)
    stride_zn = z.stride(0) if n > 1 else k * hw
    programs = n * tiles * (k if in_place else -(-channels // config.block_channels))
    with _on_device_of(x):
        run(variant, programs, *pointers, stride // align, stride_zn, hw // align, tiles)


def fuse_channels(x, z, scores, index, position):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _fuse(x, z, scores, index, position, y)
    return y


def fuse_channels_(x, z, scores, index, position):
    _fuse(x, z, scores, index, position, None)


# ---- the ending of the block before

_add_relu_pool_variant = functools.lru_cache(_PLANS)(configs.add_relu_pool_variant)


def _add_relu_pool(a, b, relu, y):
    """Into ``y``, which is a itself in place; returns pooled."""
    _check_size(a)
    n, channels, h, w = a.shape
    pooled = a.new_empty((n, channels), dtype=torch.float32)
    if a.numel() == 0:
        return pooled
    second = a if b is None else b
    hw, strides = h * w, tuple(map(_sample_stride, (a, second, y)))
    align = align_of(hw, *strides)
    variant = _add_relu_pool_variant(_TYPE_NAMES[a.dtype], channels, hw, align, b is not None, relu)
    programs = n * configs.pool_config(channels, 1, hw).chunks
    scalars = (*(stride // align for stride in strides), hw // align)
    with _on_device_of(a):
        run(variant, programs, a, second, y, pooled, *scalars)
    return pooled


def add_relu_pool(a, b, relu):
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    return y, _add_relu_pool(a, b, relu, y)


def add_relu_pool_(a, b, relu):
    return _add_relu_pool(a, b, relu, a)


# ---- the tail, and the whole block


@functools.lru_cache(_PLANS)
def _tail_plan(
    dtype: torch.dtype, n: int, channels: int, k: int, mid: int, hw: int, stride: int, kind: str,
    final_relu: bool, position: str, selection: Selector | None,
) -> list[tuple[Variant, int]]:  # fmt: skip
    """Each launch's variant and programs per sample."""
    align = align_of(hw, stride)
    bottleneck = kind == "bottleneck"
    tail = Tail(_TYPE_NAMES[dtype], channels, k, mid, hw, align, bottleneck, final_relu, position, selection)
    return list(zip(configs.tail_variants(tail), configs.tail_programs(tail, n), strict=True))


def _run_tail(plan, x, index, scores, logits, conv_parameters, scratch, bias1, fc2, bias2, keys_units, mid_units):
    n, _, h, w = x.shape
    stride = _sample_stride(x)
    align = align_of(h * w, stride)
    pointers = (x, index, scores, logits, conv_parameters, scratch, bias1, fc2, bias2)
    for variant, programs in plan:
        scalars = (keys_units, mid_units, stride // align, h * w // align, w, programs)
        run(variant, n * programs, *pointers, *scalars)


def tail_(x, scores, index, conv_parameters, form):
    n, channels, h, w = x.shape
    if x.numel() == 0:
        return
    kind, mid_channels, final_relu, position = read_form(form)
    plan = _tail_plan(
        x.dtype, n, channels, index.shape[1], mid_channels, h * w, _sample_stride(x), kind, final_relu, position,
        None,
    )  # fmt: skip
    scratch = x.new_empty((n * mid_channels * h * w,), dtype=torch.float32)
    unread = (scratch, scratch, scratch)
    with _on_device_of(x):
        _run_tail(plan, x, index, scores, scratch, conv_parameters, scratch, *unread, 0, 0)


@functools.lru_cache(_PLANS)
def _block_plan(selector_key, y_stride, copy, mid, kind, final_relu, position):
    """The selector's plan and the tail's."""
    select = _select_plan(*selector_key, copy, False)
    (x_dtype, *_), n, channels, _, k, hw, *_ = selector_key
    sizes = (x_dtype, n, channels, k, mid, hw, y_stride)
    return select, _tail_plan(*sizes, kind, final_relu, position, select.selector)


def _block(x, y, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv_parameters, form):
    """The block on x into y, which is x itself in place; returns the logits."""
    n, channels, h, w = x.shape
    index = x.new_empty((n, k), dtype=torch.int64)
    logits = x.new_empty((n, channels), dtype=torch.float32)
    if n == 0:
        return logits
    _check_size(x)
    kind, mid_channels, final_relu, position = read_form(form)
    biases = (fc1_bias is not None, fc2_bias is not None)
    bias1, bias2 = (fc1_bias if biases[0] else fc1_weight), (fc2_bias if biases[1] else fc2_weight)
    key = _selector_key(x, fc1_weight, fc2_weight, bias1, bias2, biases, pooled, k)
    select, tail = _block_plan(key, _sample_stride(y), y is not x, mid_channels, kind, final_relu, position)
    mid_units = select.scratch_units
    scratch = x.new_empty((16 * mid_units + n * mid_channels * h * w,), dtype=torch.float32)
    # Pooled values may lie where the logits will: a launch ends between the last read and the first write.
    given = logits if pooled is None else pooled
    layers = (fc1_weight, fc2_weight, bias1, bias2, logits, logits)
    selected = (index, logits, logits, conv_parameters, scratch, bias1, fc2_weight, bias2)
    with _on_device_of(x):
        _run_layers(select, x, y, given, scratch, *layers)
        _run_tail(tail, y, *selected, select.keys_units, mid_units)
    return logits


def mod_block(x, *arguments):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _block(x, y, *arguments)


def mod_block_(x, *arguments):
    return _block(x, x, *arguments)

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
    alignment and constants of some thirty arguments at every call; here they are known, so where every tensor
    starts at a multiple of 16 bytes, as torch's allocator gives them, the compiled kernel is kept and called with
    addresses. Other views go Triton's way, which compiles a variant with narrower loads for them.
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


class _Launch(NamedTuple):
    """A variant, how many programs of it, and its integer arguments."""

    variant: Variant
    programs: int
    scalars: tuple[int, ...]

    def on(self, *tensors: Tensor) -> None:
        run(self.variant, self.programs, *tensors, *self.scalars)


class _SelectPlan(NamedTuple):
    """Launches of the selector; ``layers`` None where the layers are not apart."""

    selector: Selector
    pool: _Launch
    layers: _Launch | None
    rank: _Launch
    keys_units: int  # where the keys begin in scratch
    scratch_units: int


@functools.lru_cache(_PLANS)
def _select_plan(
    types: tuple[torch.dtype, ...], n: int, channels: int, hidden: int, k: int, hw: int, stride: int,
    biases: tuple[bool, bool], pooled: bool, copy: bool, store_hidden: bool,
) -> _SelectPlan:  # fmt: skip
    names = tuple(_TYPE_NAMES[dtype] for dtype in types)
    align = align_of(hw, stride)
    selector = Selector(names, channels, hidden, k, hw, align, biases, pooled, copy)
    chunks, slices = selector.pool.chunks, selector.slices
    keys_units = scratch_units = _units(n * chunks * hidden)
    layers = None
    if selector.layers.apart:
        layers = _Launch(configs.layers_variant(selector, store_hidden), n * slices, (keys_units,))
        scratch_units += _units(2 * n * slices * selector.keep)  # an int64 is two float32 wide
    return _SelectPlan(
        selector,
        _Launch(configs.pool_variant(selector), n * chunks, (stride // align, hw // align)),
        layers,
        _Launch(configs.rank_variant(selector), n, (keys_units,)),
        keys_units,
        scratch_units,
    )


def _check_size(x: Tensor) -> None:
    """Offsets inside a sample are int32 in the kernels; between samples they are int64."""
    if x.shape[1:].numel() >= 2**31:
        raise ValueError(f"the Triton kernels take samples of fewer than 2^31 elements, got {tuple(x.shape)}")


def _selector_key(x, fc1_weight, fc2_weight, bias1, bias2, biases, pooled, k):
    """All but the last two of :func:`_select_plan`'s; a bias that is not there is given as its layer's weight."""
    n, channels, h, w = x.shape
    types = (x.dtype, fc1_weight.dtype, fc2_weight.dtype, bias1.dtype, bias2.dtype)
    return types, n, channels, fc1_weight.shape[0], k, h * w, _sample_stride(x), biases, pooled is not None


def _run_layers(plan, x, y, pooled, scratch, fc1_weight, fc2_weight, bias1, bias2, hidden, logits):
    """Pooling with the first layer's parts and, where it is apart, the second layer."""
    plan.pool.on(x, y, pooled, fc1_weight, scratch)
    if plan.layers is not None:
        plan.layers.on(scratch, bias1, fc2_weight, bias2, hidden, logits)


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
        plan.rank.on(scratch, bias1, fc2_weight, bias2, hidden, logits, index, scores)
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


def _tail_launches(
    dtype: torch.dtype, size: tuple[int, int, int, int], k: int, stride: int, form: str,
    selection: _SelectPlan | None,
) -> tuple[_Launch, ...]:  # fmt: skip
    """Of the tail on x of such a ``size``; what it selects from and mid lie where ``selection`` has them."""
    n, channels, h, w = size
    kind, mid, final_relu, position = read_form(form)
    align = align_of(h * w, stride)
    selector = None if selection is None else selection.selector
    bottleneck = kind == "bottleneck"
    tail = Tail(_TYPE_NAMES[dtype], channels, k, mid, h * w, align, bottleneck, final_relu, position, selector)
    units = (0, 0) if selection is None else (selection.keys_units, selection.scratch_units)
    launches = zip(configs.tail_variants(tail), configs.tail_programs(tail, n), strict=True)
    scalars = (*units, stride // align, h * w // align, w)
    return tuple(_Launch(variant, n * programs, (*scalars, programs)) for variant, programs in launches)


_tail_plan = functools.lru_cache(_PLANS)(_tail_launches)


def tail_(x, scores, index, conv_parameters, form):
    if x.numel() == 0:
        return
    n, _, h, w = size = x.shape
    plan = _tail_plan(x.dtype, size, index.shape[1], _sample_stride(x), form, None)
    scratch = x.new_empty((n * read_form(form).mid_channels * h * w,), dtype=torch.float32)
    with _on_device_of(x):
        for launch in plan:
            launch.on(x, index, scores, scratch, conv_parameters, scratch, scratch, scratch, scratch)


@functools.lru_cache(_PLANS)
def _block_plan(selector_key, size, y_stride, copy, form) -> tuple[_SelectPlan, tuple[_Launch, ...]]:
    """The selector's plan and the tail's."""
    select = _select_plan(*selector_key, copy=copy, store_hidden=False)
    (dtype, *_), k = selector_key[0], selector_key[4]
    return select, _tail_launches(dtype, size, k, y_stride, form, select)


def _block(x, y, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv_parameters, form):
    """The block on x into y, which is x itself in place; returns the logits."""
    n, channels, h, w = x.shape
    index = x.new_empty((n, k), dtype=torch.int64)
    logits = x.new_empty((n, channels), dtype=torch.float32)
    if n == 0:
        return logits
    _check_size(x)
    biases = (fc1_bias is not None, fc2_bias is not None)
    bias1, bias2 = (fc1_bias if biases[0] else fc1_weight), (fc2_bias if biases[1] else fc2_weight)
    key = _selector_key(x, fc1_weight, fc2_weight, bias1, bias2, biases, pooled, k)
    select, tail = _block_plan(key, x.shape, _sample_stride(y), y is not x, form)
    mid = n * read_form(form).mid_channels * h * w
    scratch = x.new_empty((16 * select.scratch_units + mid,), dtype=torch.float32)
    # Pooled values may lie where the logits will: a launch ends between the last read and the first write.
    given = logits if pooled is None else pooled
    with _on_device_of(x):
        _run_layers(select, x, y, given, scratch, fc1_weight, fc2_weight, bias1, bias2, logits, logits)
        for launch in tail:
            launch.on(y, index, logits, logits, conv_parameters, scratch, bias1, fc2_weight, bias2)
    return logits


def mod_block(x, *arguments):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _block(x, y, *arguments)


def mod_block_(x, *arguments):
    return _block(x, x, *arguments)

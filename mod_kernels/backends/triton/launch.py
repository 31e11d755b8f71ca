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

from ..._layout import CHANNELS_LAST, layout_of, memory_format_of
from ..._library import accumulation_dtype
from ...spec import read_form
from . import configs, variants
from .configs import align_of
from .variants import Selector, Tail, Variant

_TYPE_NAMES = {getattr(torch, name): kind for name, kind in configs.SCALAR_TYPES.items()}
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_PLANS = 1024  # remembered for each op: sizes a process meets, batch sizes included


@functools.cache
def kernels() -> dict[str, object]:
    """Every kernel by its name; the first call imports Triton."""
    from . import add_relu_pool, block, fuse, gather, linear, select, tail

    return {
        "block_fwd_kernel": block.block_fwd_kernel,
        "linear_fwd_kernel": linear.linear_fwd_kernel,
        "pool_fwd_kernel": select.pool_fwd_kernel,
        "layers_fwd_kernel": select.layers_fwd_kernel,
        "rank_fwd_kernel": select.rank_fwd_kernel,
        "add_relu_pool_fwd_kernel": add_relu_pool.add_relu_pool_fwd_kernel,
        "tail_fwd_kernel": tail.tail_fwd_kernel,
        "gather_channels_fwd_kernel": gather.gather_channels_fwd_kernel,
        "fuse_channels_fwd_kernel": fuse.fuse_channels_fwd_kernel,
        "fuse_channels_inplace_fwd_kernel": fuse.fuse_channels_inplace_fwd_kernel,
        "fuse_channels_flat_fwd_kernel": fuse.fuse_channels_flat_fwd_kernel,
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


class _Map(NamedTuple):
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


def _map_of(x: Tensor) -> _Map:
    return _Map(x.dtype, *x.shape, _sample_stride(x), layout_of(x) == CHANNELS_LAST)


class _SelectorKey(NamedTuple):
    """What a plan depends on in a selector; ``types``: fc1, fc2, fc1_bias, fc2_bias."""

    types: tuple[torch.dtype, ...]
    hidden: int
    k: int
    biases: tuple[bool, bool]
    pooled: bool

    def on(self, x: _Map, **fields: bool) -> Selector:
        names = tuple(_TYPE_NAMES[dtype] for dtype in (x.dtype, *self.types))
        sizes = (x.channels, self.hidden, self.k, x.hw, x.align, x.hw_align, x.channels_last)
        return Selector(names, *sizes, self.biases, self.pooled, **fields)


class _Weights(NamedTuple):
    """A selector's tensors; a bias that is not there is given as its layer's weight, and not read."""

    fc1: Tensor
    fc2: Tensor
    bias1: Tensor
    bias2: Tensor


def _selector_of(fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k) -> tuple[_Weights, _SelectorKey]:
    biases = (fc1_bias is not None, fc2_bias is not None)
    weights = _Weights(
        fc1_weight, fc2_weight, fc1_bias if biases[0] else fc1_weight, fc2_bias if biases[1] else fc2_weight
    )
    types = tuple(tensor.dtype for tensor in weights)
    return weights, _SelectorKey(types, fc1_weight.shape[0], k, biases, pooled is not None)


def _check_size(x: Tensor) -> None:
    """Offsets inside a sample are int32 in the kernels; between samples they are int64."""
    if x.shape[1:].numel() >= 2**31:
        raise ValueError(f"the Triton kernels take samples of fewer than 2^31 elements, got {tuple(x.shape)}")


class _SelectPlan(NamedTuple):
    """Launches of the selector; ``layers`` None where whoever ranks does the second layer."""

    pool: _Launch
    layers: _Launch | None
    rank: _Launch
    scratch_units: int


@functools.lru_cache(_PLANS)
def _select_plan(x: _Map, key: _SelectorKey) -> _SelectPlan:
    selector = key.on(x, apart=configs.second_layer_apart(x.channels, key.hidden))
    keys_units = _units(x.n * selector.pool.shares * key.hidden)
    keys = 2 * x.n * selector.slices * selector.keep if selector.apart else 0  # an int64 is two float32 wide
    layers = None
    if selector.apart:
        layers = _Launch(variants.layers_variant(selector), x.n * selector.slices, (keys_units,))
    return _SelectPlan(
        _Launch(variants.pool_variant(selector), x.n * selector.pool.shares, (x.stride // x.align, x.hw_units)),
        layers,
        _Launch(variants.rank_variant(selector), x.n, (keys_units,)),
        keys_units + _units(keys),
    )


def _select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, saving):
    """scores and index; ``saving``: logits, hidden and pooled_out too, which else are scratch."""
    n, channels = x.shape[:2]
    scores = x.new_empty((n, k), dtype=torch.float32)
    index = x.new_empty((n, k), dtype=torch.int64)
    logits = x.new_empty((n, channels), dtype=torch.float32)
    hidden = x.new_empty((n, fc1_weight.shape[0]), dtype=torch.float32)
    # Pooled values may lie where the logits will: a launch ends between the last read and the first write.
    pooled_out = logits
    if saving:
        pooled_out = x.new_empty((n, channels) if pooled is None else (0,), dtype=torch.float32)
    outputs = (scores, index, logits, hidden, pooled_out) if saving else (scores, index)
    if n == 0:
        return outputs
    _check_size(x)
    weights, key = _selector_of(fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
    plan = _select_plan(_map_of(x), key)
    scratch = x.new_empty((16 * plan.scratch_units,), dtype=torch.float32)
    with _on_device_of(x):
        plan.pool.on(x, x, pooled_out if pooled is None else pooled, weights.fc1, scratch)
        if plan.layers is not None:
            plan.layers.on(scratch, weights.bias1, weights.fc2, weights.bias2, hidden, logits)
        plan.rank.on(scratch, weights.bias1, weights.fc2, weights.bias2, hidden, logits, index, scores)
    return outputs


def select_channels(*arguments):
    return _select(*arguments, saving=False)


def select_channels_saving(*arguments):
    return _select(*arguments, saving=True)


# ---- gather and fuse

_gather_variant = functools.lru_cache(_PLANS)(variants.gather_variant)
_fuse_variant = functools.lru_cache(_PLANS)(variants.fuse_variant)


def gather_channels(x, index):
    n, channels, h, w = x.shape
    k = index.shape[1]
    out = _like(x, k)
    if out.numel() == 0:
        return out
    hw, stride = h * w, _sample_stride(x)
    align, hw_align = align_of(stride), align_of(hw)
    x_type, channels_last = _TYPE_NAMES[x.dtype], layout_of(x) == CHANNELS_LAST
    variant = _gather_variant(x_type, channels, k, hw, align, hw_align, channels_last)
    config = configs.gather_config(x_type, k, hw, channels_last)
    with _on_device_of(x):
        programs = n * config.chunks * config.tiles
        run(variant, programs, x, index, out, stride // align, hw // hw_align, config.tiles)
    return out


def _like(x: Tensor, channels: int) -> Tensor:
    """A fresh tensor of so many channels, dense in x's layout."""
    n, _, h, w = x.shape
    shape = (n, channels, h, w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _fuse(x, z, scores, index, position, y):
    """The fuse, into ``y`` or, with ``y`` None, in place."""
    n, channels, h, w = x.shape
    k = z.shape[1]
    if x.numel() == 0:
        return
    hw, stride, stride_z = h * w, _sample_stride(x), _sample_stride(z)
    align, z_align, hw_align = map(align_of, (stride, stride_z, hw))
    in_place = y is None
    channels_last, z_channels_last = (layout_of(tensor) == CHANNELS_LAST for tensor in (x, z))
    x_type, form = _TYPE_NAMES[x.dtype], (position, channels_last, z_channels_last, in_place)
    variant = _fuse_variant(x_type, channels, k, hw, align, z_align, hw_align, *form)
    config = configs.fuse_config(x_type, channels, k, hw, hw_align, *form)
    if config.flat:
        pointers = (x, z, scores, x if in_place else y)
    else:
        # Read for position "original" alone; else scores stands in, as the signature says.
        index = index if position == "original" else scores
        pointers = (x, z, scores, index) if in_place else (x, z, scores, index, y)
    programs = n * config.chunks * config.tiles
    with _on_device_of(x):
        run(variant, programs, *pointers, stride // align, stride_z // z_align, hw // hw_align, config.tiles)


def fuse_channels(x, z, scores, index, position):
    y = _like(x, x.shape[1])
    _fuse(x, z, scores, index, position, y)
    return y


def fuse_channels_(x, z, scores, index, position):
    _fuse(x, z, scores, index, position, None)


# ---- the ending of the block before

_add_relu_pool_variant = functools.lru_cache(_PLANS)(variants.add_relu_pool_variant)


def _add_relu_pool(a, b, relu, y):
    """Into ``y``, which is a itself in place; returns pooled."""
    _check_size(a)
    n, channels, h, w = a.shape
    pooled = a.new_empty((n, channels), dtype=accumulation_dtype(a.dtype))
    if a.numel() == 0:
        return pooled
    second = a if b is None else b
    hw, strides = h * w, tuple(map(_sample_stride, (a, second, y)))
    align, hw_align = align_of(*strides), align_of(hw)
    sizes = (_TYPE_NAMES[a.dtype], channels, hw)
    channels_last = layout_of(a) == CHANNELS_LAST
    variant = _add_relu_pool_variant(*sizes, align, hw_align, channels_last, b is not None, relu)
    programs = n * configs.pool_config(*sizes, hw_align, channels_last).shares
    scalars = (*(stride // align for stride in strides), hw // hw_align)
    with _on_device_of(a):
        run(variant, programs, a, second, y, pooled, *scalars)
    return pooled


def add_relu_pool(a, b, relu):
    y = _like(a, a.shape[1])
    return y, _add_relu_pool(a, b, relu, y)


def add_relu_pool_(a, b, relu):
    return _add_relu_pool(a, b, relu, a)


# ---- the tail, and the whole block


def _tail_of(x: _Map, k: int, form: str) -> Tail:
    kind, mid, final_relu, position = read_form(form)
    sizes = (x.channels, k, mid, x.hw, x.align, x.hw_align)
    return Tail(_TYPE_NAMES[x.dtype], *sizes, kind == "bottleneck", final_relu, position, x.channels_last)


@functools.lru_cache(_PLANS)
def _tail_plan(x: _Map, k: int, form: str) -> tuple[_Launch, ...]:
    tail = _tail_of(x, k, form)
    scalars = (x.stride // x.align, x.hw_units, x.width, tail.programs)
    return tuple(_Launch(variant, x.n * tail.programs, scalars) for variant in variants.tail_variants(tail))


def tail_(x, scores, index, conv_parameters, form):
    if x.numel() == 0:
        return
    _check_size(x)
    plan = _tail_plan(_map_of(x), index.shape[1], form)
    n, _, h, w = x.shape
    mid = x.new_empty((n, read_form(form).mid_channels, h, w), dtype=torch.float32)
    with _on_device_of(x):
        for launch in plan:
            launch.on(x, index, scores, conv_parameters, mid)


class _BlockPlan(NamedTuple):
    """Launches of a block in order: ``pool`` and ``layers`` (both, over the batch) where there are any."""

    pool: _Launch | None
    layers: tuple[_Launch, ...]
    finish: _Launch
    scratch_units: int


@functools.lru_cache(_PLANS)
def _block_plan(x: _Map, key: _SelectorKey, y_stride: int, copy: bool, form: str) -> _BlockPlan:
    shared_out = configs.shared_out(x.channels, key.hidden, x.n)
    # The samples that the last launch is told the stride of: where it makes a copy, its y is dense.
    last = x if shared_out == "pool" else x._replace(stride=y_stride)
    selector = key.on(x, copy=copy, apart=shared_out == "layers", fused=True)
    tail = _tail_of(last, key.k, form)
    chosen = variants.block_variants(selector, tail, shared_out)
    # Where the slots would lie the batch's hidden layer does, where there is one; it is no larger.
    keys_units = _units(x.n * selector.pool.shares * key.hidden)
    mid_units = keys_units + _units(2 * x.n * selector.slices * selector.keep if shared_out == "layers" else 0)
    scratch_units = mid_units + _units(x.n * tail.mid * x.hw)
    pool = None
    if chosen.pool is not None:
        pool = _Launch(chosen.pool, x.n * chosen.pool_shares, (x.stride // x.align, x.hw_units))
    layers = tuple(_Launch(one, variants.linear_programs(one, x.n), (x.n,)) for one in chosen.layers)
    programs = {"pool": selector.pool.shares, "layers": selector.slices, "nothing": 1}[shared_out]
    scalars = keys_units, mid_units, last.stride // last.align, last.hw_units, x.width
    return _BlockPlan(pool, layers, _Launch(chosen.finish, x.n * programs, scalars), scratch_units)


def _block(x, y, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv_parameters, form, counters):
    """The block on x into y, which is x itself in place; returns the logits."""
    n, channels = x.shape[:2]
    index = x.new_empty((n, k), dtype=torch.int64)
    logits = x.new_empty((n, channels), dtype=torch.float32)
    if n == 0:
        return logits
    _check_size(x)
    weights, key = _selector_of(fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
    plan = _block_plan(_map_of(x), key, _sample_stride(y), y is not x, form)
    scratch = x.new_empty((16 * plan.scratch_units,), dtype=torch.float32)
    # Pooled values may lie where the logits will: a launch ends between the last read and the first write.
    means = logits if pooled is None else pooled
    with _on_device_of(x):
        if plan.pool is not None:
            plan.pool.on(x, y, means, weights.fc1, scratch)
        if plan.layers:
            first, second = plan.layers
            first.on(means, weights.fc1, weights.bias1, scratch)
            second.on(scratch, weights.fc2, weights.bias2, logits)
        source = x if plan.pool is None and not plan.layers else y
        selector = (weights.fc1, weights.bias1, weights.fc2, weights.bias2)
        plan.finish.on(source, y, means, *selector, conv_parameters, logits, index, scratch, counters)
    return logits


def mod_block(x, *arguments):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return y, _block(x, y, *arguments)


def mod_block_(x, *arguments):
    return _block(x, x, *arguments)

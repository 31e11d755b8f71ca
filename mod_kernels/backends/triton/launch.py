"""The raw ops on the host: outputs and scratch allocated, variants looked up, kernels launched.

Functions carry the raw ops' arguments (:data:`mod_kernels._library.OPS`), which have been checked and laid out by
:mod:`mod_kernels.functional`. Which variants a call needs is worked out once for its sizes (:mod:`.plans`).
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._layout import CHANNELS_LAST, layout_of, memory_format_of
from ..._library import accumulation_dtype
from . import configs, variants
from .configs import align_of
from .in_force import tuning_for
from .plans import (
    MOST_PLANS,
    TYPE_NAMES,
    ApartPlan,
    Launch,
    SelectorKey,
    SelectPlan,
    TailPlan,
    block_plan,
    map_of,
    pair_plan,
    sample_stride,
    select_plan,
    tail_plan,
)
from .variants import Variant

_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def kernels() -> dict[str, object]:
    """Every kernel by its name; the first call imports Triton."""
    from . import add_relu_layer, add_relu_pool, block, fuse, gather, linear, select, tail
    from .fuse_backward import fuse_channels_bwd_kernel
    from .input_gradient import input_gradient_bwd_kernel
    from .select_backward import select_hidden_bwd_kernel, select_weights_bwd_kernel

    return {
        "block_fwd_kernel": block.block_fwd_kernel,
        "linear_fwd_kernel": linear.linear_fwd_kernel,
        "pool_fwd_kernel": select.pool_fwd_kernel,
        "layers_fwd_kernel": select.layers_fwd_kernel,
        "rank_fwd_kernel": select.rank_fwd_kernel,
        "add_relu_pool_fwd_kernel": add_relu_pool.add_relu_pool_fwd_kernel,
        "add_relu_layer_fwd_kernel": add_relu_layer.add_relu_layer_fwd_kernel,
        "tail_fwd_kernel": tail.tail_fwd_kernel,
        "gather_channels_fwd_kernel": gather.gather_channels_fwd_kernel,
        "fuse_channels_fwd_kernel": fuse.fuse_channels_fwd_kernel,
        "fuse_channels_inplace_fwd_kernel": fuse.fuse_channels_inplace_fwd_kernel,
        "fuse_channels_flat_fwd_kernel": fuse.fuse_channels_flat_fwd_kernel,
        "fuse_channels_bwd_kernel": fuse_channels_bwd_kernel,
        "select_hidden_bwd_kernel": select_hidden_bwd_kernel,
        "select_weights_bwd_kernel": select_weights_bwd_kernel,
        "input_gradient_bwd_kernel": input_gradient_bwd_kernel,
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


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Variant, int]]]:
    """Inside, nothing is launched: the variants and numbers of programs that would be, in their order."""
    global run
    launched, before = [], run

    def record(variant: Variant, programs: int, *arguments: Tensor | int) -> None:
        launched.append((variant, programs))

    run = record
    try:
        yield launched
    finally:
        run = before


def _launch(one: Launch, *tensors: Tensor) -> None:
    run(one.variant, one.programs, *tensors, *one.scalars)


def _on_device_of(x: Tensor):
    """Triton launches on the current device: make it x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


# ---- select


class _Weights(NamedTuple):
    """A selector's tensors; a bias that is not there is given as its layer's weight, and not read."""

    fc1: Tensor
    fc2: Tensor
    bias1: Tensor
    bias2: Tensor


def _selector_of(fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k) -> tuple[_Weights, SelectorKey]:
    biases = (fc1_bias is not None, fc2_bias is not None)
    weights = _Weights(
        fc1_weight, fc2_weight, fc1_bias if biases[0] else fc1_weight, fc2_bias if biases[1] else fc2_weight
    )
    types = tuple(tensor.dtype for tensor in weights)
    return weights, SelectorKey(types, fc1_weight.shape[0], k, biases, pooled is not None)


def _check_size(x: Tensor) -> None:
    """Offsets inside a sample are int32 in the kernels; between samples they are int64."""
    if x.shape[1:].numel() >= 2**31:
        raise ValueError(f"the Triton kernels take samples of fewer than 2^31 elements, got {tuple(x.shape)}")


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
    plan = select_plan(tuning_for(x), map_of(x), key)
    means = pooled_out if pooled is None else pooled
    with _on_device_of(x):
        _launch_select(plan, x, x, weights, means, hidden, logits, index, scores)
    return outputs


def _launch_select(plan: SelectPlan, x, y, weights, means, hidden, logits, index, scores):
    scratch = x.new_empty((16 * plan.scratch_units,), dtype=torch.float32)
    _launch(plan.pool, x, y, means, weights.fc1, scratch)
    if plan.layers is not None:
        _launch(plan.layers, scratch, weights.bias1, weights.fc2, weights.bias2, hidden, logits)
    _launch(plan.rank, scratch, weights.bias1, weights.fc2, weights.bias2, hidden, logits, index, scores)


def select_channels(*arguments):
    return _select(*arguments, saving=False)


def select_channels_saving(*arguments):
    return _select(*arguments, saving=True)


# ---- gather and fuse

_gather_variant = functools.lru_cache(MOST_PLANS)(variants.gather_variant)
_fuse_variant = functools.lru_cache(MOST_PLANS)(variants.fuse_variant)


def gather_channels(x, index):
    n, channels, h, w = x.shape
    k = index.shape[1]
    out = _like(x, k)
    if out.numel() == 0:
        return out
    tuning, hw, stride = tuning_for(x), h * w, sample_stride(x)
    align, hw_align = align_of(stride), align_of(hw)
    x_type, channels_last = TYPE_NAMES[x.dtype], layout_of(x) == CHANNELS_LAST
    variant = _gather_variant(tuning, x_type, channels, k, hw, align, hw_align, channels_last)
    config = configs.gather_config(tuning, x_type, k, hw, channels_last)
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
    tuning, hw, stride, stride_z = tuning_for(x), h * w, sample_stride(x), sample_stride(z)
    align, z_align, hw_align = map(align_of, (stride, stride_z, hw))
    in_place = y is None
    channels_last, z_channels_last = (layout_of(tensor) == CHANNELS_LAST for tensor in (x, z))
    x_type, form = TYPE_NAMES[x.dtype], (position, channels_last, z_channels_last, in_place)
    variant = _fuse_variant(tuning, x_type, channels, k, hw, align, z_align, hw_align, *form)
    config = configs.fuse_config(tuning, x_type, channels, k, hw, hw_align, *form)
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

_add_relu_pool_variant = functools.lru_cache(MOST_PLANS)(variants.add_relu_pool_variant)


def _add_relu_pool(a, b, relu, y):
    """Into ``y``, which is a itself in place; returns pooled."""
    _check_size(a)
    n, channels, h, w = a.shape
    pooled = a.new_empty((n, channels), dtype=accumulation_dtype(a.dtype))
    if a.numel() == 0:
        return pooled
    second = a if b is None else b
    hw, strides = h * w, tuple(map(sample_stride, (a, second, y)))
    align, hw_align = align_of(*strides), align_of(hw)
    sizes = (tuning_for(a), TYPE_NAMES[a.dtype], channels, hw)
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


def tail_(x, scores, index, conv_parameters, form):
    if x.numel() == 0:
        return
    _check_size(x)
    plan = tail_plan(tuning_for(x), map_of(x), index.shape[1], form)
    with _on_device_of(x):
        _launch_tail(plan, x, scores, index, conv_parameters)


def _launch_tail(plan: TailPlan, x, scores, index, conv_parameters):
    n, _, h, w = x.shape
    mid = x.new_empty((n, plan.planes, h, w), dtype=torch.float32)
    for launch in plan.launches:
        _launch(launch, x, index, scores, conv_parameters, mid)


def _block(x, y, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv_parameters, form, counters):
    """The block on x into y, which is x itself in place; returns the logits."""
    n, channels = x.shape[:2]
    index = x.new_empty((n, k), dtype=torch.int64)
    logits = x.new_empty((n, channels), dtype=torch.float32)
    if n == 0:
        return logits
    _check_size(x)
    weights, key = _selector_of(fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
    plan = block_plan(tuning_for(x), map_of(x), key, sample_stride(y), y is not x, form)
    # Pooled values may lie where the logits will: a launch ends between the last read and the first write.
    means = logits if pooled is None else pooled
    if isinstance(plan, ApartPlan):
        scores, hidden = (x.new_empty((n, width), dtype=torch.float32) for width in (k, key.hidden))
        with _on_device_of(x):
            _launch_select(plan.select, x, y, weights, means, hidden, logits, index, scores)
            _launch_tail(plan.tail, y, scores, index, conv_parameters)
        return logits
    scratch = x.new_empty((16 * plan.scratch_units,), dtype=torch.float32)
    with _on_device_of(x):
        if plan.pool is not None:
            _launch(plan.pool, x, y, means, weights.fc1, scratch)
        if plan.layers:
            first, second = plan.layers
            _launch(first, means, weights.fc1, weights.bias1, scratch)
            _launch(second, scratch, weights.fc2, weights.bias2, logits)
        source = x if plan.pool is None and not plan.layers else y
        selector = (weights.fc1, weights.bias1, weights.fc2, weights.bias2)
        _launch(plan.finish, source, y, means, *selector, conv_parameters, logits, index, scratch, counters)
    return logits


def mod_block(x, *arguments):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return y, _block(x, y, *arguments)


def mod_block_(x, *arguments):
    return _block(x, x, *arguments)


def add_relu_mod_block_(
    a, b, relu, fc1_weight, fc2_weight, fc1_bias, fc2_bias, k, conv_parameters, form, counters
):
    """The ending into a, then the block; returns the logits."""
    selector = (fc1_weight, fc2_weight, fc1_bias, fc2_bias)
    weights, key = _selector_of(*selector, None, k)
    _check_size(a)
    plan = None
    if a.numel() > 0:
        b_stride = None if b is None else sample_stride(b)
        plan = pair_plan(tuning_for(a), map_of(a), key, b_stride, relu, form)
    if plan is None:
        pooled = _add_relu_pool(a, b, relu, a)
        return _block(a, a, *selector, pooled, k, conv_parameters, form, counters)
    n, channels = a.shape[:2]
    index = a.new_empty((n, k), dtype=torch.int64)
    logits = a.new_empty((n, channels), dtype=torch.float32)
    scratch = a.new_empty((16 * plan.scratch_units,), dtype=torch.float32)
    with _on_device_of(a):
        # Pooled values lie where the logits will, as in _block.
        _launch(plan.ending, a, a if b is None else b, a, logits, weights.fc1, scratch)
        layers = (weights.fc1, weights.bias1, weights.fc2, weights.bias2)
        _launch(plan.finish, a, a, logits, *layers, conv_parameters, logits, index, scratch, counters)
    return logits

"""Which narrowed conv blocks are trained as one op: PyTorch's own layers, all alike, and nobody looking on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _autograd
from .._conv_training import Norms, conv_block, serving
from ._hooks import is_untouched

Layers = list[tuple[nn.Module, nn.Module]]
_PADDING = {(1, 1): (0, 0), (3, 3): (1, 1)}  # that goes with each kernel size served
# A 3x3 of more channels stays with PyTorch, whose matrix products gain with them: of a basic block forward and
# backward take 0.5 to 1.0 of its time at 16, by the ISA level, and 0.7 to 1.35 at 32 (docs/cpu.md).
_MOST_CHANNELS_3X3 = 16


def run(layers: Layers, x: Tensor, final_relu: bool) -> Tensor | None:
    """The block on x, with gradients and its running statistics updated; None where PyTorch has to run it."""
    engine = serving(x) if torch.is_grad_enabled() else None
    if engine is None or _has_any_global_hook():
        return None
    if not all(_is_plain(conv, norm) for conv, norm in layers):
        return None
    first, channels, (n, _, h, w) = layers[0][1], x.shape[1], x.shape
    settings = _settings(first)
    for conv, norm in layers:
        if conv.in_channels != channels or _settings(norm) != settings:
            return None
        channels = conv.out_channels
        if conv.kernel_size == (3, 3) and max(conv.in_channels, channels) > _MOST_CHANNELS_3X3:
            return None
    if n * h * w == 1 and _uses_batch(first):  # PyTorch says what is wrong
        return None
    flat = [conv._parameters.get("weight") for conv, _ in layers]
    if first._parameters.get("weight") is not None:
        flat += [norm._parameters.get("weight") for _, norm in layers]
        flat += [norm._parameters.get("bias") for _, norm in layers]
    norms = [norm for _, norm in layers]
    running = [buffer for norm in norms for buffer in _running(norm)] if _has_running(first) else []
    if not _are_as_x(flat + running, x) or not _autograd.needed(x, *flat):
        return None
    return conv_block(engine, x, flat, len(layers), _advance(norms), final_relu)


def _is_plain(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and conv._parameters.get("bias") is None
        and _PADDING.get(conv.kernel_size) == conv.padding
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and norm.num_features == conv.out_channels
        and (norm._parameters.get("weight") is None) == (norm._parameters.get("bias") is None)
        and is_untouched(conv)
        and is_untouched(norm)
    )


def _are_as_x(tensors: list[Tensor | None], x: Tensor) -> bool:
    """Whether all are there, dense, of no subclass, and of x's dtype and device."""
    dtype, device = x.dtype, x.device
    for one in tensors:
        if one is None or (type(one) is not nn.Parameter and type(one) is not Tensor):
            return False
        if one.dtype is not dtype or one.device != device or not one.is_contiguous():
            return False
    return True


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    # Module.__getattr__ takes ten times as long as the dict it looks into.
    return norm._buffers.get("running_mean"), norm._buffers.get("running_var")


def _has_running(norm: nn.BatchNorm2d) -> bool:
    return norm._buffers.get("running_mean") is not None


def _settings(norm: nn.BatchNorm2d) -> tuple:
    """What one call of the op says of all its norms."""
    count = norm._buffers.get("num_batches_tracked")
    counted = count is not None
    # A cumulative average goes by it; else what it says does not matter.
    count = int(count) if counted and norm.training and norm.momentum is None else 0
    parameters, running = norm._parameters, _running(norm)
    missing = parameters["weight"] is None, parameters["bias"] is None, running[0] is None, running[1] is None
    return norm.training, norm.track_running_stats, norm.momentum, norm.eps, missing, counted, count


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or not _has_running(norm)


def _advance(norms: list[nn.BatchNorm2d]) -> Norms:
    """Count the batch, and say which statistics the norms use: what BatchNorm2d's forward does."""
    first = norms[0]
    momentum = 0.0 if first.momentum is None else first.momentum
    updates = first.training and first.track_running_stats
    if updates and first._buffers.get("num_batches_tracked") is not None:
        for norm in norms:
            norm._buffers["num_batches_tracked"].add_(1)
        if first.momentum is None:
            momentum = 1.0 / float(first.num_batches_tracked)
    running = [_running(norm) for norm in norms] if _has_running(first) and (updates or not first.training) else []
    means, variances = [mean for mean, _ in running], [var for _, var in running]
    return Norms(means, variances, _uses_batch(first), momentum, first.eps)

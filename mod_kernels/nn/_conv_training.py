"""Which narrowed conv blocks are trained as one op: exactly PyTorch's own layers, all alike, and nobody looking on."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _autograd
from .._conv_training import Norms, conv_block, serving
from ._hooks import is_untouched

Layers = list[tuple[nn.Module, nn.Module]]
_PADDING = {(1, 1): (0, 0), (3, 3): (1, 1)}  # that goes with each kernel size served


def run(layers: Layers, x: Tensor, final_relu: bool) -> Tensor | None:
    """The block on x, with gradients and its running statistics updated; None where PyTorch has to run it."""
    engine = serving(x)
    if engine is None or _has_any_global_hook() or not _are_served(layers, x):
        return None
    norms = [norm for _, norm in layers]
    flat = [conv.weight for conv, _ in layers]
    if norms[0].weight is not None:
        flat += [norm.weight for norm in norms] + [norm.bias for norm in norms]
    if not _autograd.needed(x, *flat):
        return None
    return conv_block(engine, x, flat, len(layers), _advance(norms), final_relu)


def _are_served(layers: Layers, x: Tensor) -> bool:
    first, channels, (n, _, h, w) = layers[0][1], x.shape[1], x.shape
    for conv, norm in layers:
        if not _is_plain(conv, norm) or conv.in_channels != channels:
            return False
        channels = conv.out_channels
        if not _holds_what_x_is_of(conv, norm, x) or _settings(norm) != _settings(first):
            return False
    # Of a batch of one value PyTorch says what is wrong.
    return n * h * w > 1 or not _uses_batch(first)


def _is_plain(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and conv.bias is None
        and _PADDING.get(conv.kernel_size) == conv.padding
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and norm.num_features == conv.out_channels
        and is_untouched(conv)
        and is_untouched(norm)
    )


def _holds_what_x_is_of(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Tensors that are no subclass's, dense, and of x's dtype and device; the norm's in pairs, or not there."""
    pairs = (norm.weight, norm.bias), (norm.running_mean, norm.running_var)
    if any((a is None) != (b is None) for a, b in pairs):
        return False
    return all(
        one is None
        or (
            type(one) in (Tensor, nn.Parameter)
            and one.dtype == x.dtype
            and one.device == x.device
            and one.is_contiguous()
        )
        for one in (conv.weight, *pairs[0], *pairs[1])
    )


def _settings(norm: nn.BatchNorm2d) -> tuple:
    """What one call of the op says of all its norms."""
    count = norm.num_batches_tracked
    if count is not None:  # a cumulative average goes by it
        count = int(count) if norm.training and norm.momentum is None else 0
    has = norm.weight is not None, norm.running_mean is not None
    return norm.training, norm.track_running_stats, norm.momentum, norm.eps, has, count


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _advance(norms: list[nn.BatchNorm2d]) -> Norms:
    """Count the batch, and say which statistics the norms use: what BatchNorm2d's forward does."""
    first = norms[0]
    momentum = 0.0 if first.momentum is None else first.momentum
    updates = first.training and first.track_running_stats
    if updates and first.num_batches_tracked is not None:
        for norm in norms:
            norm.num_batches_tracked.add_(1)
        if first.momentum is None:
            momentum = 1.0 / float(first.num_batches_tracked)
    running = norms if first.running_mean is not None and (updates or not first.training) else []
    means, variances = [norm.running_mean for norm in running], [norm.running_var for norm in running]
    return Norms(means, variances, _uses_batch(first), momentum, first.eps)

"""What PyTorch's flop counter counts for the raw ops: the matrix products and convolutions they stand for.

As the counter does for PyTorch's own ops: 2 a multiply-add, by the plain mathematical definition, whatever a
kernel leaves out; so a network counts the same fused and plain. Ops without either (gather, fuse, the ending that
pools) have no formula, and count 0. The counter's tracker of modules sets global hooks, under which a MoD block
runs part by part: the whole block's op is counted where it is called as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from ._when_imported import when_imported
from .spec import CONV_KINDS, read_form

Shape = torch.Size


def register(namespace: str, ops: list[str]) -> None:
    """Have the flop counter know those of ``ops`` that it should count, from its import on.

    Not before: it loads Triton where there is one, and complains where there is none.
    """

    def then() -> None:
        from torch.utils.flop_counter import register_flop_formula

        for name in ops:
            if name in FORMULAS:
                register_flop_formula(getattr(getattr(torch.ops, namespace), name))(FORMULAS[name])

    when_imported("torch.utils.flop_counter", then)


# The counter calls a formula with an op's arguments, each tensor's shape in its place.


def _select_channels(x: Shape, fc1_weight: Shape, *rest, **out) -> int:
    return 2 * 2 * x[0] * prod(fc1_weight)


def _tail_(x: Shape, scores: Shape, index: Shape, conv_parameters: Shape, form: str, **out) -> int:
    return _convolutions(x, index[1], form)


def _mod_block(
    x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv_parameters, form, *rest, **out
) -> int:
    return _select_channels(x, fc1_weight) + _convolutions(x, k, form)


def _add_relu_mod_block_(
    a, b, relu, fc1_weight, fc2_weight, fc1_bias, fc2_bias, k, conv_parameters, form, *rest, **out
) -> int:
    return _select_channels(a, fc1_weight) + _convolutions(a, k, form)


def _convolutions(x: Shape, k: int, form: str) -> int:
    kind, mid_channels, _, _ = read_form(form)
    return sum(_convolution(x, shape) for shape in CONV_KINDS[kind].shapes(mid_channels, k))


def _convolution(x: Shape, weight: Shape | tuple[int, ...]) -> int:
    """Of stride 1 and x's plane; its gradient of its input, or of its weight, takes the same."""
    return 2 * x[0] * prod(x[2:]) * prod(weight)


def _select_channels_backward(
    dscores: Shape, scores, index, hidden, pooled, fc1_weight: Shape, fc2_weight, *needed, **out
) -> int:
    pooled_needed, fc1_needed, fc2_needed, fc1_bias_needed, _ = needed
    hidden_needed = pooled_needed or fc1_needed or fc1_bias_needed
    products = sum((fc2_needed, hidden_needed, fc1_needed, pooled_needed))
    return 2 * products * dscores[0] * prod(fc1_weight)


def _conv_block_saving(x: Shape, weights: list[Shape], *rest, **out) -> int:
    return sum(_convolution(x, weight) for weight in weights)


def _conv_block_backward(dz, x: Shape, convolved, statistics, weights: list[Shape], *rest, **out) -> int:
    needed = rest[-1]
    x_needed, weights_needed, norms_needed = needed[0], needed[1:][: len(weights)], needed[1 + len(weights) :]
    total, input_needed = 0, x_needed
    for layer, weight in enumerate(weights):
        total += (input_needed + weights_needed[layer]) * _convolution(x, weight)
        # Is there anything before the next layer that wants a gradient?
        input_needed = input_needed or weights_needed[layer] or any(norms_needed[layer :: len(weights)])
    return total


FORMULAS: dict[str, Callable[..., int]] = {
    "select_channels": _select_channels,
    "select_channels_saving": _select_channels,
    "tail_": _tail_,
    "mod_block": _mod_block,
    "mod_block_": _mod_block,
    "add_relu_mod_block_": _add_relu_mod_block_,
    "select_channels_backward": _select_channels_backward,
    "conv_block_saving": _conv_block_saving,
    "conv_block_backward": _conv_block_backward,
}

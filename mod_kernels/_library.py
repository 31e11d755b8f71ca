"""Schemas and fake implementations of the raw ops, in one table.

Every engine has a namespace of its own (``mod_kernels_cpu``, ``mod_kernels_triton``) holding the ops it
implements, all cut from the table below, so that :mod:`mod_kernels.functional` can pick an engine and
``use_backend`` has somewhere to act. The reference needs no namespace: it is plain ATen.

Arguments and outputs are as few as can be, because each costs a call: 0.2 us for a tensor that is None, 0.3 for
an int, a bool or a string, 0.8 for a fresh output after the first (CPU, torch 2.14). Still the raw ops return more
than the public ones where the backward or the numerics check needs a kernel's own (logits, hidden layer, pooled
vector), never recomputed. The index is the exception: it is ``reference.rank_channels`` of the kernel's logits,
exactly, by the tie rule, so a block does not return it. Raw ops are not differentiable and check nothing that
:mod:`mod_kernels._checks` has checked already, except an index's range, which is data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _flops
from ._layout import memory_format_of

SELECTOR = "Tensor fc1_weight, Tensor fc2_weight, Tensor? fc1_bias, Tensor? fc2_bias, Tensor? pooled, int k"
# conv_parameters: weight and bias of each convolution in turn, flattened, in the accumulation dtype (spec.py).
# form: "kind:mid_channels:ending:position", such as "bottleneck:8:relu:first" or "basic:4:linear:original"; the
# ending is what follows the last convolution. spec.written_form makes it, spec.read_form takes it apart, and so
# does read_form of csrc/cpu/ops.cpp.
CONV = "Tensor conv_parameters, str form"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: what sums, logits and scores are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_logits(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


def _fake_like(x: Tensor, channels: int | None = None) -> Tensor:
    """A fresh dense tensor in x's layout, with another number of channels if asked."""
    shape = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _fake_select_channels(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
    scores = x.new_empty((x.shape[0], k), dtype=accumulation_dtype(x.dtype))
    return scores, x.new_empty((x.shape[0], k), dtype=torch.int64)


def _fake_select_channels_saving(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
    selection = _fake_select_channels(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
    dtype = accumulation_dtype(x.dtype)
    hidden = x.new_empty((x.shape[0], fc1_weight.shape[0]), dtype=dtype)
    pooled_out = x.new_empty(x.shape[:2] if pooled is None else (0,), dtype=dtype)
    return (*selection, _fake_logits(x), hidden, pooled_out)


def _fake_gather_channels(x, index):
    return _fake_like(x, index.shape[1])


def _fake_fuse_channels(x, z, scores, index, position):
    return _fake_like(x)


def _fake_in_place(*arguments):
    return None


def _fake_add_relu_pool(a, b, relu):
    return _fake_like(a), a.new_empty(a.shape[:2], dtype=accumulation_dtype(a.dtype))


def _fake_add_relu_pool_(a, b, relu):
    return a.new_empty(a.shape[:2], dtype=accumulation_dtype(a.dtype))


def _fake_mod_block_(x, *arguments):
    return _fake_logits(x)


def _fake_mod_block(x, *arguments):
    return _fake_like(x), _fake_logits(x)


def _fake_fuse_channels_backward(dy, z, scores, index, position, z_needed, scores_needed):
    return _fake_like(z) if z_needed else z.new_empty(0), scores.new_empty(scores.shape if scores_needed else 0)


def _fake_select_channels_backward(dscores, scores, index, hidden, pooled, fc1_weight, fc2_weight, *needed):
    (hidden_units, channels), n = fc1_weight.shape, scores.shape[0]
    shapes = ((n, channels), (hidden_units, channels), (channels, hidden_units), (hidden_units,), (channels,))
    return tuple(scores.new_empty(shape if one else 0) for shape, one in zip(shapes, needed, strict=True))


def _fake_input_gradient(dy, *arguments):
    return _fake_like(dy)


def _fake_conv_block_saving(x, weights, *arguments):
    channels = [weight.shape[0] for weight in weights]
    z, convolved = (x.new_empty((x.shape[0], c, *x.shape[2:])) for c in (channels[-1], sum(channels)))
    return z, convolved, x.new_empty((2, sum(channels)))


def _fake_conv_block_backward(
    dz, x, convolved, statistics, weights, norm_weights, norm_biases, batch_statistics, final_relu, needed
):
    channels = [weight.shape[:1] for weight in weights]
    shapes = [x.shape, *(weight.shape for weight in weights), *channels, *channels]
    dx, *parameters = (x.new_empty(shape if one else 0) for shape, one in zip(shapes, needed, strict=True))
    return dx, parameters


class OpDefinition(NamedTuple):
    """One raw op: arguments and returns in torch.library's schema language, and what tracing sees."""

    arguments: str
    returns: str
    fake: Callable


# Shapes: x, a, b, y (N, C, H, W); z (N, k, H, W); pooled, pooled_out, logits (N, C); hidden (N, R); scores,
# index (N, k). pooled_out is empty (shape (0,)) where the caller gave pooled: an op may not return its input.
OPS: dict[str, OpDefinition] = {
    # Two ops behind one public op, with the same numbers: without gradients, and with all that the backward (and
    # the numerics check) needs besides. An engine has both or neither.
    "select_channels": OpDefinition(
        f"Tensor x, {SELECTOR}", "(Tensor scores, Tensor index)", _fake_select_channels
    ),
    "select_channels_saving": OpDefinition(
        f"Tensor x, {SELECTOR}",
        "(Tensor scores, Tensor index, Tensor logits, Tensor hidden, Tensor pooled_out)",
        _fake_select_channels_saving,
    ),
    "gather_channels": OpDefinition("Tensor x, Tensor index", "Tensor", _fake_gather_channels),
    "fuse_channels": OpDefinition(
        "Tensor x, Tensor z, Tensor scores, Tensor? index, str position", "Tensor", _fake_fuse_channels
    ),
    "fuse_channels_": OpDefinition(
        "Tensor(a!) x, Tensor z, Tensor scores, Tensor? index, str position", "()", _fake_in_place
    ),
    "add_relu_pool": OpDefinition(
        "Tensor a, Tensor? b, bool relu", "(Tensor y, Tensor pooled)", _fake_add_relu_pool
    ),
    "add_relu_pool_": OpDefinition("Tensor(a!) a, Tensor? b, bool relu", "Tensor", _fake_add_relu_pool_),
    # tail_: gather + narrowed conv block + scale + add, in place; with select_channels it makes a mod_block_.
    "tail_": OpDefinition(f"Tensor(a!) x, Tensor scores, Tensor index, {CONV}", "()", _fake_in_place),
    "mod_block": OpDefinition(f"Tensor x, {SELECTOR}, {CONV}", "(Tensor y, Tensor logits)", _fake_mod_block),
    "mod_block_": OpDefinition(f"Tensor(a!) x, {SELECTOR}, {CONV}", "Tensor", _fake_mod_block_),
    # The ending of the block before, then the block, both into a; returns the logits.
    "add_relu_mod_block_": OpDefinition(
        "Tensor(a!) a, Tensor? b, bool relu, Tensor fc1_weight, Tensor fc2_weight, Tensor? fc1_bias, "
        f"Tensor? fc2_bias, int k, {CONV}",
        "Tensor",
        _fake_mod_block_,
    ),
    # ---- backward (formulas: _autograd.py). What is not needed comes back as a tensor of shape (0,). Gradients of
    # parameters, of pooled and of scores are in the accumulation dtype.
    # z and dz in dy's layout.
    "fuse_channels_backward": OpDefinition(
        "Tensor dy, Tensor z, Tensor scores, Tensor? index, str position, bool z_needed, bool scores_needed",
        "(Tensor dz, Tensor dscores)",
        _fake_fuse_channels_backward,
    ),
    # index without repeats in a row, as select_channels gives it.
    "select_channels_backward": OpDefinition(
        "Tensor dscores, Tensor scores, Tensor index, Tensor hidden, Tensor pooled, Tensor fc1_weight, "
        "Tensor fc2_weight, bool pooled_needed, bool fc1_needed, bool fc2_needed, bool fc1_bias_needed, "
        "bool fc2_bias_needed",
        "(Tensor dpooled, Tensor dfc1_weight, Tensor dfc2_weight, Tensor dfc1_bias, Tensor dfc2_bias)",
        _fake_select_channels_backward,
    ),
    # The one pass over a whole map: dx = dy + dpooled / (H W), plus dgathered[:, j] at channel index[:, j] (no
    # repeats in a row); then, with y, zero where y <= 0. y is a ReLU's output, of which a block has since
    # overwritten the channels P of position: overwritten (N, k, H, W) is what stood there. All maps in dy's
    # layout and dtype. index is read where dgathered is given, and for the P of "original".
    "input_gradient": OpDefinition(
        "Tensor dy, Tensor? dpooled, Tensor? dgathered, Tensor? index, Tensor? y, Tensor? overwritten, "
        "str position",
        "Tensor dx",
        _fake_input_gradient,
    ),
    # ---- a narrowed conv block in training: of two or three layers, conv (1x1, or 3x3 padding 1; contiguous OIHW)
    # without bias, batch norm and ReLU (the last only with final_relu). float32 or float64 throughout, NCHW.
    # A list of what the norms do not have is empty. convolved (N, channels of all layers, H, W) is what the
    # convolutions gave, statistics (2, channels of all layers) the mean and 1 / sqrt(var + eps) that normalised
    # them: of the batch, which then also go into the running ones by momentum, or the running ones themselves.
    "conv_block_saving": OpDefinition(
        "Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, Tensor(a!)[] running_means, "
        "Tensor(b!)[] running_vars, bool batch_statistics, float momentum, float eps, bool final_relu",
        "(Tensor z, Tensor convolved, Tensor statistics)",
        _fake_conv_block_saving,
    ),
    # needed: of x, then of the weights, the norms' weights, the norms' biases, as dparameters has them.
    "conv_block_backward": OpDefinition(
        "Tensor dz, Tensor x, Tensor convolved, Tensor statistics, Tensor[] weights, Tensor[] norm_weights, "
        "Tensor[] norm_biases, bool batch_statistics, bool final_relu, bool[] needed",
        "(Tensor dx, Tensor[] dparameters)",
        _fake_conv_block_backward,
    ),
}


def _without_counters(fake: Callable) -> Callable:
    return lambda *arguments: fake(*arguments[:-1])


def define(namespace: str, ops: list[str], with_counters: tuple[str, ...] = ()) -> torch.library.Library:
    """Define ``ops`` of the table in ``namespace``.

    Those of ``with_counters`` take one more argument, the engine's counters, which they write to and leave as they
    were: state that is not in an argument races where two captured graphs are replayed at once.

    Returns the library object: the caller keeps it alive (dropping it undefines the ops) and, for an engine
    written in Python, registers its kernels on it. A compiled engine registers its own when it is loaded.
    """
    library = torch.library.Library(namespace, "DEF")
    for name in ops:
        arguments, returns, fake = OPS[name]
        if name in with_counters:
            arguments += ", Tensor(counters!) counters"
            fake = _without_counters(fake)
        library.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    _flops.register(namespace, ops)
    return library

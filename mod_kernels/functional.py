"""The public ops. Each checks its arguments, asks which engine serves the call, and enters autograd if needed.

A call equal to one that went through goes straight to its engine: :mod:`mod_kernels._remembered` says when.

Shapes and dtypes, throughout: ``x`` (N, C, H, W) in float16, bfloat16, float32 or float64, NCHW or channels_last
(any other layout is copied once out of place, and refused in place); R is the selector's hidden width and k the
number of channels processed, 1 <= k <= C. Sums, logits and scores are float32, float64 for float64. What each op
computes is written out in :mod:`mod_kernels.reference`; the source is arXiv 2409.17016, section 3.

Wrong arguments raise before anything is written: TypeError for a type or dtype, ValueError for a shape, a device
or a value, RuntimeError for an index out of range (on a CPU) and for gradients where there can be none.
While exporting (``torch.export``) the ops become plain ATen (:mod:`mod_kernels._portable`), unless
:func:`mod_kernels.export_mode` says otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_grad_enabled
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from . import _autocast, _autograd, _checks, _portable, backends, reference
from ._layout import NCHW, OTHER, layout_of, memory_format_of
from ._remembered import facts, recall, remember
from ._tracing import exporting
from .backends import Call, Explanation, choose
from .spec import MoDSpec

__all__ = [
    "MoDSpec",
    "add_relu_pool",
    "add_relu_pool_",
    "explain",
    "fuse_channels",
    "fuse_channels_",
    "gather_channels",
    "mod_block",
    "mod_block_",
    "select_channels",
]


# ---- select


def select_call(x, fc1_weight, fc2_weight, k, fc1_bias=None, fc2_bias=None, pooled=None) -> Call:
    _checks.feature_map("x", x)
    channels = x.shape[1]
    _checks.k_channels(k, channels)
    _checks.selector(fc1_weight, fc2_weight, fc1_bias, fc2_bias, channels)
    _checks.like(x, "fc1_weight", fc1_weight)
    _checks.like(x, "fc2_weight", fc2_weight)
    _checks.like(x, "fc1_bias", fc1_bias)
    _checks.like(x, "fc2_bias", fc2_bias)
    if pooled is not None:
        _checks.pooled_vector(x, pooled)
    layout, weight_dtype = layout_of(x), fc1_weight.dtype
    return Call("select_channels", x.device.type, x.dtype, layout, channels, k, weight_dtype=weight_dtype)


def select_channels(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    k: int,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score the channels of x and take the k best of each sample.

    ``logits = relu(pooled @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias``; the k largest per sample,
    descending, ties to the lower channel, NaN first; ``scores = sigmoid(logits)`` of those.

    Args:
        x: (N, C, H, W).
        fc1_weight: (R, C), of x's dtype or float32, like the other parameters.
        fc2_weight: (C, R).
        k: channels to select, 1 <= k <= C.
        fc1_bias: (R,) or None.
        fc2_bias: (C,) or None.
        pooled: ``x.mean((2, 3))``, (N, C) float32 (float64 for float64 x); x is then not read.

    Returns:
        scores (N, k), float32 (float64 for float64 x), and index (N, k) int64, without repeats in a row.

    Gradients reach x (or pooled) and the parameters through scores.
    """
    key = None if is_compiling() else _select_key(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)
    op = key and recall(key)
    if op and not _autograd.needed(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled):
        return op(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
    call = select_call(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)
    if exporting():
        return _portable.select_channels(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)
    engine = choose(_dense_call(call))
    if engine is None:
        return reference.select_channels(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)
    op = engine.ops["select_channels"]
    arguments = (
        _dense(x, call),
        fc1_weight.contiguous(),
        fc2_weight.contiguous(),
        row_major(fc1_bias),
        row_major(fc2_bias),
        row_major(pooled),
        k,
    )
    remember(key, op, (x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k), arguments)
    if _autograd.needed(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled):
        scores, index, *_ = _autograd.SelectChannels.apply(engine.ops, *arguments)
        return scores, index
    return op(*arguments)


def _select_key(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled) -> tuple:
    b1, b2 = fc1_bias is None or facts(fc1_bias), fc2_bias is None or facts(fc2_bias)
    means = pooled is None or facts(pooled)
    return "select_channels", facts(x), facts(fc1_weight), facts(fc2_weight), type(k), k, b1, b2, means


# ---- gather


def _gather_call(x, index) -> Call:
    _checks.feature_map("x", x)
    _checks.channel_index(x, index)
    return Call("gather_channels", x.device.type, x.dtype, layout_of(x), x.shape[1], index.shape[1])


def gather_channels(x: Tensor, index: Tensor) -> Tensor:
    """``out[n, j] = x[n, index[n, j]]``.

    Args:
        x: (N, C, H, W).
        index: (N, k) int64, 0 <= index < C; out of range raises RuntimeError on a CPU, and is masked and
            device-asserted on a GPU.

    Returns:
        (N, k, H, W) of x's dtype, in x's layout.
    """
    key = None if is_compiling() else ("gather_channels", facts(x), facts(index))
    if (op := key and recall(key)) and not _autograd.needed(x):
        return op(x, index)
    call = _gather_call(x, index)
    if exporting():
        return _portable.gather_channels(x, index)
    engine = choose(_dense_call(call))
    if engine is None:
        _checks.index_in_range(index, x.shape[1])
        return reference.gather_channels(x, index)
    op, arguments = engine.ops["gather_channels"], (_dense(x, call), index.contiguous())
    remember(key, op, (x, index), arguments)
    return _autograd.GatherChannels.apply(engine.ops, *arguments) if _autograd.needed(x) else op(*arguments)


# ---- fuse


def _fuse_call(x, z, scores, index=None, position="first", op="fuse_channels") -> Call:
    _checks.feature_map("x", x)
    _checks.fusion(x, z, scores, index, position)
    return Call(op, x.device.type, x.dtype, layout_of(x), x.shape[1], z.shape[1], position=position)


def _fuse_call_(x, z, scores, index=None, position="first") -> Call:
    call = _fuse_call(x, z, scores, index, position, "fuse_channels_")
    _checks.writable("x", x, call.layout)
    _checks.apart("x", x, "z", z)
    return call


def fuse_channels(
    x: Tensor, z: Tensor, scores: Tensor, index: Tensor | None = None, position: str = "first"
) -> Tensor:
    """``y = x``, then ``y[:, P] += scores[:, :, None, None] * z``, in one pass, rounded once.

    Args:
        x: (N, C, H, W).
        z: (N, k, H, W) of x's dtype (under autocast it is cast to it).
        scores: (N, k) float32 (float64 for float64 x).
        index: (N, k) int64, used where position is ``"original"`` (repeats add up).
        position: P: ``"first"`` k channels (the paper), ``"last"`` k, or ``"original"``, the channels of
            index (the paper's ablation).

    Returns:
        y (N, C, H, W) in x's layout; the channels outside P bit for bit those of x.
    """
    key = None if is_compiling() else _fuse_key("fuse_channels", x, z, scores, index, position)
    if (op := key and recall(key)) and not _autograd.needed(x, z, scores):
        return op(x, z, scores, index, position)
    given = (x, z, scores, index, position)
    z = cast_like(x, z)
    call = _fuse_call(x, z, scores, index, position)
    if exporting():
        return _portable.fuse_channels(x, z, scores, index, position)
    engine = choose(_dense_call(call))
    if engine is None:
        return reference.fuse_channels(x, z, scores, _validated(x, index, position), position)
    arguments = (_dense(x, call), *fuse_arguments(z, scores, index), position)
    op = engine.ops["fuse_channels"]
    remember(key, op, given, arguments)
    return (
        _autograd.FuseChannels.apply(engine.ops, *arguments) if _autograd.needed(x, z, scores) else op(*arguments)
    )


def fuse_channels_(
    x: Tensor, z: Tensor, scores: Tensor, index: Tensor | None = None, position: str = "first"
) -> Tensor:
    """:func:`fuse_channels` written into x, which is returned; no copy of x is made.

    Raises:
        ValueError: besides the above, x is not dense (NCHW or channels_last, whole or batch-sliced), or z shares
            its memory.
        RuntimeError: x is a leaf that requires grad, or a view of one.
    """
    key = None if is_compiling() else _fuse_key("fuse_channels_", x, z, scores, index, position)
    if (op := key and recall(key)) and not _autograd.needed(x, z, scores):
        _checks.apart("x", x, "z", z)
        op(x, z, scores, index, position)
        return written(x)
    given = (x, z, scores, index, position)
    z = cast_like(x, z)
    call = _fuse_call_(x, z, scores, index, position)
    if exporting():
        return _portable.fuse_channels_(x, z, scores, index, position)
    grad = _autograd.needed(x, z, scores)
    if grad and is_compiling():
        # A write marked inside a traced autograd.Function gives wrong gradients where x is a graph input
        # read before it (torch 2.14): out of place, and an ordinary copy that functionalization understands.
        return x.copy_(fuse_channels(x, z, scores, index, position))
    engine = choose(call)
    if engine is None:
        return reference.fuse_channels_(x, z, scores, _validated(x, index, position), position)
    op, arguments = engine.ops["fuse_channels_"], (x, *fuse_arguments(z, scores, index), position)
    remember(key, op, given, arguments)
    if grad:
        return _autograd.FuseChannels_.apply(engine.ops, *arguments)
    op(*arguments)
    return written(x)


def _fuse_key(op, x, z, scores, index, position) -> tuple:
    return op, facts(x), facts(z), facts(scores), index is None or facts(index), position


def fuse_arguments(z: Tensor, scores: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if layout_of(z) == OTHER:
        z = z.contiguous()
    return z, scores.contiguous(), row_major(index)


def _validated(x: Tensor, index: Tensor | None, position: str) -> Tensor | None:
    if position == "original":
        _checks.index_in_range(index, x.shape[1])
    return index


# ---- the ending of the block before


def _add_relu_pool_call(a, b=None, relu=True, op="add_relu_pool") -> Call:
    _checks.feature_map("a", a)
    _checks.residual(a, b)
    return Call(op, a.device.type, a.dtype, layout_of(a), a.shape[1], 0)


def _add_relu_pool_call_(a, b=None, relu=True) -> Call:
    call = _add_relu_pool_call(a, b, relu, "add_relu_pool_")
    _checks.writable("a", a, call.layout)
    _checks.apart("a", a, "b", b, alike=True)
    return call


def add_relu_pool(a: Tensor, b: Tensor | None = None, relu: bool = True) -> tuple[Tensor, Tensor]:
    """``y = relu(a + b)`` and ``pooled = y.mean((2, 3))`` of what was written, in one pass.

    Args:
        a: (N, C, H, W).
        b: like a, or None for no addition.
        relu: whether to apply the ReLU.

    Returns:
        y (N, C, H, W) in a's layout, and pooled (N, C) float32 (float64 for float64): what
        :func:`select_channels` and :func:`mod_block` take as ``pooled``.
    """
    key = None if is_compiling() else ("add_relu_pool", facts(a), b is None or facts(b), relu)
    if (op := key and recall(key)) and not _autograd.needed(a, b):
        return op(a, b, relu)
    call = _add_relu_pool_call(a, b, relu)
    if exporting():
        return _portable.add_relu_pool(a, b, relu)
    engine = choose(_dense_call(call))
    if engine is None:
        return reference.add_relu_pool(a, b, relu)
    dense = _dense(a, call)
    op, arguments = engine.ops["add_relu_pool"], (dense, in_layout_of(dense, b), relu)
    remember(key, op, (a, b, relu), arguments)
    return _autograd.AddReluPool.apply(engine.ops, *arguments) if _autograd.needed(a, b) else op(*arguments)


def add_relu_pool_(a: Tensor, b: Tensor | None = None, relu: bool = True) -> tuple[Tensor, Tensor]:
    """:func:`add_relu_pool` written into a; returns ``(a, pooled)``.

    Raises:
        ValueError: besides the above, a is not dense (NCHW or channels_last, whole or batch-sliced), or b shares
            memory with it other than by being the same map.
        RuntimeError: a is a leaf that requires grad, or a view of one.

    Where a gradient is needed of a view, the result is made apart and copied into it.
    """
    key = None if is_compiling() else ("add_relu_pool_", facts(a), b is None or facts(b), relu)
    if (op := key and recall(key)) and not _autograd.needed(a, b):
        _checks.apart("a", a, "b", b, alike=True)
        pooled = op(a, b, relu)
        return written(a), pooled
    call = _add_relu_pool_call_(a, b, relu)
    if exporting():
        return _portable.add_relu_pool_(a, b, relu)
    grad = _autograd.needed(a, b)
    # While compiling as in fuse_channels_. A view: autograd takes no node that writes it and returns more.
    if grad and (is_compiling() or a._is_view()):
        y, pooled = add_relu_pool(a, b, relu)
        return a.copy_(y), pooled
    engine = choose(call)
    if engine is None:
        return reference.add_relu_pool_(a, b, relu)
    op, arguments = engine.ops["add_relu_pool_"], (a, in_layout_of(a, b), relu)
    remember(key, op, (a, b, relu), arguments)
    if grad:
        return _autograd.AddReluPool_.apply(engine.ops, *arguments)
    pooled = op(*arguments)
    return written(a), pooled


def in_layout_of(a: Tensor, b: Tensor | None) -> Tensor | None:
    """b as the kernels read it: in a's layout (it usually is)."""
    if b is None or layout_of(b) == layout_of(a):
        return b
    return b.contiguous(memory_format=memory_format_of(a))


# ---- the whole block


def block_call(x, spec, pooled=None, op="mod_block") -> Call:
    _checks.block(x, spec, pooled)
    if is_grad_enabled():
        for tensor in (x, pooled, *spec.tensors):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op} has no gradients: run it under torch.no_grad() or torch.inference_mode(), "
                    "or train with select_channels, gather_channels and fuse_channels (MoDBlock does)"
                )
    return Call(
        op,
        x.device.type,
        x.dtype,
        layout_of(x),
        spec.channels,
        spec.k,
        spec.kind,
        spec.position,
        spec.fc1_weight.dtype,
    )


def _block_call_(x, spec, pooled=None) -> Call:
    call = block_call(x, spec, pooled, "mod_block_")
    _checks.writable("x", x, call.layout)
    return call


def mod_block(x: Tensor, spec: MoDSpec, pooled: Tensor | None = None) -> Tensor:
    """The whole block for inference: select, gather, narrowed conv block, scale, fuse.

    Args:
        x: (N, C, H, W).
        spec: weights, k and position; its tensors are of x's dtype or float32.
        pooled: ``x.mean((2, 3))``, (N, C) float32 (float64 for float64 x); saves the pass that pools.

    Returns:
        y (N, C, H, W) in x's layout; pooling and copying are one pass over x.

    Raises:
        RuntimeError: a gradient would be needed; this op has none.
    """
    key = None if is_compiling() else _block_key("mod_block", x, spec, pooled)
    if (op := key and recall(key)) and not (is_grad_enabled() and _autograd.needed(x, pooled, *spec.tensors)):
        return op(x, *spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)[0]
    call = block_call(x, spec, pooled)
    if exporting():
        return _portable.mod_block(x, spec, pooled)
    engine = choose(_dense_call(call))
    if engine is None:
        return reference.mod_block(x, spec, pooled)
    op, given = engine.ops["mod_block"], (x, pooled)
    x, pooled = _dense(x, call), row_major(pooled)
    remember(key, op, given, (x, pooled))
    return op(x, *spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)[0]


def mod_block_(x: Tensor, spec: MoDSpec, pooled: Tensor | None = None) -> Tensor:
    """:func:`mod_block` written into x, which is returned; no copy of x is made.

    Raises:
        ValueError: besides the above, x is not dense (NCHW or channels_last, whole or batch-sliced).
    """
    key = None if is_compiling() else _block_key("mod_block_", x, spec, pooled)
    if (op := key and recall(key)) and not (is_grad_enabled() and _autograd.needed(x, pooled, *spec.tensors)):
        op(x, *spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)
        return written(x)
    call = _block_call_(x, spec, pooled)
    if exporting():
        return _portable.mod_block_(x, spec, pooled)
    engine = choose(call)
    if engine is None:
        return reference.mod_block_(x, spec, pooled)
    op, given = engine.ops["mod_block_"], pooled
    pooled = row_major(pooled)
    remember(key, op, (given,), (pooled,))
    op(x, *spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)
    return written(x)


def _block_key(op, x, spec, pooled) -> tuple:
    return op, facts(x), getattr(spec, "token", None), pooled is None or facts(pooled)


# ---- shared


def _dense_call(call: Call) -> Call:
    """The call as the engine gets it: an odd layout has been copied into NCHW by then."""
    return call if call.layout != OTHER else call._replace(layout=NCHW)


def _dense(x: Tensor, call: Call) -> Tensor:
    return x if call.layout != OTHER else x.contiguous()


def row_major(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.contiguous()


def cast_like(x: Tensor, z: Tensor) -> Tensor:
    """Under autocast the conv block's output may be narrower than x: z follows x."""
    if _autocast.is_on(x.device.type) and z.dtype != x.dtype:
        return z.to(x.dtype)
    return z


def written(x: Tensor) -> Tensor:
    """Tell autograd of a raw op's write (compiled graphs know from the schema; inference tensors don't count)."""
    if not is_compiling() and not x.is_inference():
        increment_version(x)
    return x


_CALLS = {
    "select_channels": select_call,
    "gather_channels": _gather_call,
    "fuse_channels": _fuse_call,
    "fuse_channels_": _fuse_call_,
    "add_relu_pool": _add_relu_pool_call,
    "add_relu_pool_": _add_relu_pool_call_,
    "mod_block": block_call,
    "mod_block_": _block_call_,
}


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would serve a call, and why the others would not; nothing is run.

    Args:
        op: one of the ops of this module, or its name.
        *args, **kwargs: the op's arguments; they are checked as the op would check them.

    Raises:
        ValueError: no such op; and whatever the op's own checks raise.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _CALLS:
        raise ValueError(f"op must be one of {', '.join(_CALLS)}, got {name!r}")
    call = _CALLS[name](*args, **kwargs)
    copies = "x, into NCHW: its layout is neither NCHW nor channels_last" if call.layout == OTHER else ""
    return backends.explain(_dense_call(call), copies)

"""The argument checks of the public ops, and their messages: argument, rule, what was got.

They run before anything is written and look at shapes, dtypes and devices only: values (an index's range) are
the engines' to check, since looking at them would synchronise a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._layout import OTHER
from ._library import accumulation_dtype
from .spec import CONV_KINDS, DTYPES, POSITIONS, MoDSpec


def feature_map(name: str, x: Tensor) -> None:
    """A feature map (N, C, H, W), floating point, C, H, W >= 1 (N may be 0)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got shape {_shape(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    _, c, h, w = x.shape
    if c < 1 or h < 1 or w < 1:
        raise ValueError(f"{name} must have at least one channel, row and column, got shape {_shape(x)}")


def ordinary_module(model: object, to_do: str) -> None:
    """A module whose parts can be looked at and changed: not scripted, nor quantized (``to_do`` first)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        found = f"{name or 'the model'} is a {type(module).__module__}.{type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"model must not be scripted, {found}: {to_do} first")
        if type(module).__module__.startswith(("torch.ao.", "torchao.", "torchvision.models.quantization.")):
            raise ValueError(f"model must not be quantized or prepared for it, {found}: {to_do} first")


def k_channels(k: int, channels: int) -> None:
    if not isinstance(k, (int, torch.SymInt)) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= channels:
        raise ValueError(f"k must be between 1 and C={channels}, got k={k}")


def selector(
    fc1_weight: Tensor, fc2_weight: Tensor, fc1_bias: Tensor | None, fc2_bias: Tensor | None, channels: int
) -> None:
    """fc1_weight (R, C), fc2_weight (C, R), biases (R,) and (C,) or None."""
    if not isinstance(fc1_weight, Tensor):
        raise TypeError(f"fc1_weight must be a tensor, got {type(fc1_weight).__name__}")
    if fc1_weight.ndim != 2 or fc1_weight.shape[1] != channels:
        raise ValueError(f"fc1_weight must be (R, C) with C={channels}, got shape {_shape(fc1_weight)}")
    rows = fc1_weight.shape[0]
    if rows == 0:
        raise ValueError("fc1_weight must be (R, C) with R >= 1, got R=0")
    _exactly("fc2_weight", fc2_weight, (channels, rows))
    if fc1_bias is not None:
        _exactly("fc1_bias", fc1_bias, (rows,))
    if fc2_bias is not None:
        _exactly("fc2_bias", fc2_bias, (channels,))


def like(x: Tensor, name: str, tensor: Tensor | None) -> None:
    """A parameter of the block: on x's device, of x's dtype or float32."""
    if tensor is None:
        return
    if tensor.dtype != x.dtype and tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be of x's dtype {x.dtype} or float32, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def pooled_vector(x: Tensor, pooled: Tensor) -> None:
    """pooled (N, C) in the accumulation dtype, on x's device."""
    _exactly("pooled", pooled, tuple(x.shape[:2]))
    _dtype("pooled", pooled, accumulation_dtype(x.dtype))
    _same_device(x, "pooled", pooled)


def channel_index(x: Tensor, index: Tensor) -> None:
    """index (N, k) int64 on x's device, 1 <= k <= C."""
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.ndim != 2 or index.shape[0] != x.shape[0] or not 1 <= index.shape[1] <= x.shape[1]:
        raise ValueError(
            f"index must be (N, k) with N={x.shape[0]} and 1 <= k <= C={x.shape[1]}, got shape {_shape(index)}"
        )
    _dtype("index", index, torch.int64)
    _same_device(x, "index", index)


def index_in_range(index: Tensor, channels: int) -> None:
    """The reference's range check: RuntimeError on a CPU, a device-side assertion where looking would wait."""
    if index.numel() == 0 or torch.compiler.is_compiling():
        return
    if index.device.type != "cpu":
        in_range = ((index >= 0) & (index < channels)).all()
        torch._assert_async(in_range, f"index must be between 0 and C-1={channels - 1}")
        return
    low, high = torch.aminmax(index)
    for value in (int(low), int(high)):
        if not 0 <= value < channels:
            raise RuntimeError(f"index must be between 0 and C-1={channels - 1}, got {value}")


def fusion(x: Tensor, z: Tensor, scores: Tensor, index: Tensor | None, position: str) -> None:
    """z (N, k, H, W) of x's dtype, scores (N, k), index (N, k) where position is "original"."""
    where(position)
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, got {type(z).__name__}")
    n, c, h, w = x.shape
    if z.ndim != 4 or z.shape[0] != n or not 1 <= z.shape[1] <= c or z.shape[2] != h or z.shape[3] != w:
        raise ValueError(f"z must be (N={n}, k, H={h}, W={w}) with 1 <= k <= C={c}, got shape {_shape(z)}")
    _dtype("z", z, x.dtype)
    _same_device(x, "z", z)
    _exactly("scores", scores, (n, z.shape[1]))
    _dtype("scores", scores, accumulation_dtype(x.dtype))
    _same_device(x, "scores", scores)
    if index is not None:
        channel_index(x, index)
        if index.shape != scores.shape:
            raise ValueError(f"index must have the shape of scores {_shape(scores)}, got {_shape(index)}")
    elif position == "original":
        raise ValueError("index must be given where position is 'original', got None")


def where(position: str) -> None:
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(map(repr, POSITIONS))}, got {position!r}")


def residual(a: Tensor, b: Tensor | None) -> None:
    """b, if any, has a's shape, dtype and device."""
    if b is not None:
        _exactly("b", b, tuple(a.shape))
        _dtype("b", b, a.dtype)
        _same_device(a, "b", b)


def block(x: Tensor, spec: MoDSpec, pooled: Tensor | None) -> None:
    """x against a spec whose own tensors fit each other already."""
    if not isinstance(spec, MoDSpec):
        raise TypeError(f"spec must be a MoDSpec, got {type(spec).__name__}")
    feature_map("x", x)
    if x.shape[1] != spec.channels:
        raise ValueError(f"x must have the spec's C={spec.channels} channels, got shape {_shape(x)}")
    for dtype in spec.dtypes:
        if dtype != x.dtype and dtype != torch.float32:
            raise TypeError(f"spec's tensors must be of x's dtype {x.dtype} or float32, got {dtype}")
    if spec.fc1_weight.device != x.device:
        raise ValueError(f"spec's tensors must be on x's device {x.device}, got {spec.fc1_weight.device}")
    if pooled is not None:
        pooled_vector(x, pooled)


def spec(spec: MoDSpec) -> None:
    """A MoDSpec's own tensors against each other."""
    if not isinstance(spec.fc1_weight, Tensor):
        raise TypeError(f"fc1_weight must be a tensor, got {type(spec.fc1_weight).__name__}")
    if spec.fc1_weight.ndim != 2:
        raise ValueError(f"fc1_weight must be (R, C), got shape {_shape(spec.fc1_weight)}")
    channels = spec.fc1_weight.shape[1]
    selector(spec.fc1_weight, spec.fc2_weight, spec.fc1_bias, spec.fc2_bias, channels)
    k_channels(spec.k, channels)
    where(spec.position)
    if spec.kind not in CONV_KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, CONV_KINDS))}, got {spec.kind!r}")
    for name in ("conv_weights", "conv_biases"):
        for i, tensor in enumerate(getattr(spec, name)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
    if not spec.conv_weights:
        raise ValueError("conv_weights must not be empty")
    kind = CONV_KINDS[spec.kind]
    expected = kind.shapes(kind.mid_channels(spec.conv_weights), spec.k)
    for name, shapes in (("conv_weights", expected), ("conv_biases", [shape[:1] for shape in expected])):
        tensors = getattr(spec, name)
        if len(tensors) != len(shapes):
            raise ValueError(f"{name} of a {spec.kind!r} must be {len(shapes)} tensors, got {len(tensors)}")
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            _exactly(f"{name}[{i}]", tensor, shape)
    biases = [bias for bias in (spec.fc1_bias, spec.fc2_bias) if bias is not None]
    for tensor in (spec.fc1_weight, spec.fc2_weight, *biases, *spec.conv_weights, *spec.conv_biases):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"spec's tensors must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != spec.fc1_weight.device:
            raise ValueError(
                f"spec's tensors must all be on one device, got {spec.fc1_weight.device} and {tensor.device}"
            )


def writable(name: str, x: Tensor, layout: str) -> None:
    """x may be written into: known layout, and no gradient history that the write would break."""
    if layout == OTHER:
        raise ValueError(
            f"{name} must be dense to be written into (contiguous or channels_last, whole or batch-sliced), "
            f"got shape {_shape(x)} with strides {tuple(x.stride())}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        # A graph that is compiled has its in-place writes taken out, and views of leaves with them.
        base = x._base if not torch.compiler.is_compiling() and x._is_view() else None
        if x.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
            what = "a leaf" if x.is_leaf else "a view of a leaf"
            raise RuntimeError(f"{name} is {what} that requires grad: it can't be written into")


def apart(x_name: str, x: Tensor, z_name: str, z: Tensor | None, alike: bool = False) -> None:
    """x, about to be written, and z, if any, must not share memory.

    ``alike``: they may be the very same values, as each is read where it is written.
    """
    if z is None or torch.compiler.is_compiling() or x.numel() == 0 or x.is_meta:
        return
    offset = z.data_ptr() - x.data_ptr()
    if offset == 0 and alike and z.stride() == x.stride():
        return
    if offset < _extent(x) and -offset < _extent(z):
        raise ValueError(f"{z_name} must not share memory with {x_name}, which is written into")


def _extent(tensor: Tensor) -> int:
    """Bytes from its first value to behind its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in strides) + 1) * tensor.element_size()


def _exactly(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {_shape(tensor)}")


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def _same_device(x: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)

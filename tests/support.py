"""Inputs the tests share: specs with random weights, feature maps in every layout, a float64 twin of a spec."""

from __future__ import annotations

import dataclasses
import mmap

import torch

from mod_kernels import MoDSpec
from mod_kernels.spec import CONV_KINDS

_MAP_NORESERVE = 0x4000  # Linux; in Python's mmap from 3.13 on
LAYOUTS = ("nchw", "channels_last", "nchw_sliced", "channels_last_sliced")


def feature_map(shape, dtype=torch.float32, layout="nchw", device="cpu"):
    """Random (N, C, H, W); the sliced layouts are every second sample of a larger batch."""
    n, *rest = shape
    x = torch.randn((2 * n if layout.endswith("sliced") else n, *rest), dtype=torch.float64, device=device)
    x = x.to(dtype)
    if layout.startswith("channels_last"):
        x = x.to(memory_format=torch.channels_last)
    return x[::2] if layout.endswith("sliced") else x


def untouched(shape, dtype, layout="nchw"):
    """Zeros on the CPU of which only what is read or written takes memory, however many they are."""
    mapping = mmap.mmap(
        -1, torch.Size(shape).numel() * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    flat = torch.frombuffer(mapping, dtype=dtype)
    if layout == "nchw":
        return flat.view(shape)
    n, channels, h, w = shape
    return flat.view(n, h, w, channels).permute(0, 3, 1, 2)


def far_apart(x, stride):
    """x with its samples so many elements apart; what lies between them takes no memory.

    Nor do the 2^31 elements before them, to which an offset that wraps around would lead.
    """
    wide = untouched((2**31 + (len(x) - 1) * stride + x[0].numel(),), x.dtype)
    return wide.as_strided(x.shape, (stride, *x.stride()[1:]), 2**31).copy_(x)


def make_spec(channels, k, kind="bottleneck", dtype=torch.float32, hidden=None, device="cpu", **fields):
    """A MoDSpec with random weights, activations near 1; ``bias=True`` gives the selector biases."""
    hidden = hidden or max(1, channels // 16)
    shapes = CONV_KINDS[kind].shapes(CONV_KINDS[kind].host_mid(k), k)

    def random(*shape):
        fan_in = max(1, int(torch.tensor(shape[1:]).prod()))
        return (torch.randn(shape, dtype=torch.float64, device=device) / fan_in**0.5).to(dtype)

    if fields.pop("bias", False):
        fields |= {"fc1_bias": random(hidden), "fc2_bias": random(channels)}
    return MoDSpec(
        # Pooled values are of the order (H W)^-1/2: scaled up, so that logits spread and sigmoids matter.
        fc1_weight=random(hidden, channels) * 8,
        fc2_weight=random(channels, hidden),
        k=k,
        kind=kind,
        conv_weights=[random(*shape) for shape in shapes],
        conv_biases=[random(shape[0]) for shape in shapes],
        **fields,
    )


def selector_of(spec):
    """The selector's arguments of select_channels, as keywords."""
    return {name: getattr(spec, name) for name in ("fc1_weight", "fc2_weight", "k", "fc1_bias", "fc2_bias")}


def double(spec):
    """The same spec in float64: the oracle's."""

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        return tuple(map(cast, value)) if isinstance(value, tuple) else value

    fields = {f.name: cast(getattr(spec, f.name)) for f in dataclasses.fields(spec) if f.init}
    return MoDSpec(**fields)


def relative_error(got, expected):
    """Norm of the difference over the norm of what was expected, in float64."""
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()

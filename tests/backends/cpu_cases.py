"""What the tests of the CPU engine's raw ops share: shapes, dtypes, arguments, and a comparison of bits."""

import pytest
import torch

from mod_kernels.backends.native import CPU
from mod_kernels.spec import CONV_KINDS

from ..support import feature_map, make_spec

# Every tensor an op allocates is poisoned before it is written. On one thread: on more, beside other processes,
# these small calls mostly wait; test_bitwise_whatever_the_threads_and_the_batch is there for threads.
MARKS = [
    pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems)),
    pytest.mark.usefixtures("poison", "one_thread"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# (N, C, H, W), k: planes in several bands, H*W of 49, 1 and 35, C no multiple of 16, k = 1 and C, N = 0, 1, 3, a
# k above the small limit.
SHAPES = [
    ((1, 64, 56, 56), 4),
    ((2, 96, 14, 14), 6),
    ((3, 2048, 7, 7), 32),
    ((3, 70, 5, 7), 9),
    ((2, 64, 1, 1), 8),
    ((1, 12, 2, 3), 12),
    ((3, 33, 28, 28), 1),
    ((2, 160, 3, 1), 100),
    ((0, 64, 7, 7), 4),
]


def selector(spec, pooled=None):
    return spec.fc1_weight, spec.fc2_weight, spec.fc1_bias, spec.fc2_bias, pooled, spec.k


def block(spec, pooled=None):
    return (*selector(spec, pooled), *spec.conv_arguments)


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def calls(layout, dtype, weight_dtype, shape=(2, 64, 5, 7), k=4):
    """Every op with arguments, for the checks that are the same for all."""
    n, c, h, w = shape
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    spec = make_spec(c, k, dtype=weight_dtype, bias=True)
    x, z = (feature_map((n, channels, h, w), dtype, layout) for channels in (c, k))
    index, scores = torch.randint(0, c, (n, k)), torch.rand(n, k, dtype=accumulated)
    pooled = torch.rand(n, c, dtype=accumulated)
    for name in ("select_channels", "select_channels_saving"):
        yield name, (x, *selector(spec))
        yield name, (x, *selector(spec, pooled))
    yield "gather_channels", (x, index)
    for name in ("fuse_channels", "fuse_channels_"):
        yield name, (x, z, scores, None, "last")
        yield name, (x, z, scores, index, "original")
    for name in ("add_relu_pool", "add_relu_pool_"):
        yield name, (x, x.clone(), True)
        yield name, (x, None, False)
    for name in ("mod_block", "mod_block_"):
        yield name, (x, *block(spec, pooled))
        for kind in CONV_KINDS:
            yield name, (x, *block(make_spec(c, k, kind, weight_dtype, bias=True)))
    yield "fuse_channels_backward", (x, z, scores, None, "last", True, True)
    yield "fuse_channels_backward", (x, z, scores, index, "original", True, True)
    chosen = torch.rand(n, c).argsort(1)[:, :k].contiguous()
    hidden = torch.randn(n, spec.fc1_weight.shape[0], dtype=accumulated).relu()
    selection = torch.randn(n, k, dtype=accumulated), scores, chosen, hidden, pooled
    yield "select_channels_backward", (*selection, spec.fc1_weight, spec.fc2_weight, *[True] * 5)
    yield "input_gradient", (x, pooled, z, chosen, x.relu(), z.relu(), "first")
    yield "input_gradient", (x, pooled, z, chosen, x.relu(), z.relu(), "original")
    yield "input_gradient", (x, None, None, None, None, None, "first")
    if dtype in (torch.float32, torch.float64) and layout == "nchw":
        yield from conv_block_calls(z)


def conv_block_calls(x):
    """The ops of a conv block in training on x (N, k, H, W): 1x1 and 3x3, with all there can be and with least."""
    n, k, h, w = x.shape
    sizes = [(k + 1, k, 3, 3), (k, k + 1, 1, 1)]

    def vectors(make):
        return [make(size[0], dtype=x.dtype) for size in sizes]

    weights = [torch.randn(size, dtype=x.dtype) for size in sizes]
    full = weights, vectors(torch.randn), vectors(torch.randn)
    running = vectors(torch.zeros), vectors(torch.ones)
    yield "conv_block_saving", (x, *full, *running, True, 0.1, 1e-5, True)
    yield "conv_block_saving", (x, *full, *running, False, 0.1, 1e-5, False)
    yield "conv_block_saving", (x, weights, [], [], [], [], True, 0.0, 1e-5, False)
    convolved = torch.randn(n, 2 * k + 1, h, w, dtype=x.dtype)
    saved = x.flip(0), convolved, torch.rand(2, 2 * k + 1, dtype=x.dtype)
    yield "conv_block_backward", (x, *saved, *full, True, True, [True] * 7)
    yield "conv_block_backward", (x, *saved, *full, False, False, [True] * 7)
    yield "conv_block_backward", (x, *saved, weights, [], [], True, False, [False, True] + [False] * 5)

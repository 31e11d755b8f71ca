"""add_relu_pool and add_relu_pool_."""

import pytest
import torch

from mod_kernels import reference
from mod_kernels._layout import memory_format_of
from mod_kernels._library import accumulation_dtype
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.triton import TRITON

from ...support import feature_map
from .checks import same_bits

# H*W of 49, 1, 35, 196 and 1155; C of no power of two.
SHAPES = [(3, 64, 7, 7), (1, 24, 1, 1), (2, 100, 5, 7), (1, 20, 14, 14), (1, 6, 35, 33), (0, 24, 3, 3)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["nchw", "channels_last"]


def run(a, b, relu, in_place):
    if in_place:
        return a, TRITON.ops["add_relu_pool_"](a, b, relu)
    return TRITON.ops["add_relu_pool"](a, b, relu)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("add,relu", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw_sliced", "channels_last", "channels_last_sliced"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, layout, dtype, add, relu, in_place, device):
    n, sliced = shape[0], layout.endswith("sliced")
    dense = layout.removesuffix("_sliced")
    wide = feature_map((2 * n, *shape[1:]), dtype, dense, device)
    ours, others = (slice(0, None, 2), slice(1, None, 2)) if sliced else (slice(0, n), slice(n, None))
    before, a = wide.clone(), wide[ours]
    b = feature_map(shape, dtype, dense, device) if add else None
    y, pooled = run(a, b, relu, in_place)
    expected, _ = reference.add_relu_pool(before[ours].double(), None if b is None else b.double(), relu)
    assert relative_norm(y, expected) <= VALUES[dtype]
    assert relative_norm(pooled, y.double().mean((2, 3))) <= VALUES[pooled.dtype]
    assert pooled.dtype == accumulation_dtype(dtype)
    assert same_bits(wide[others], before[others])
    if not in_place:
        assert same_bits(a, before[ours]) and y.is_contiguous(memory_format=memory_format_of(a))
    if not add and not relu:
        assert same_bits(y, before[ours])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_added_to_itself_in_place(layout, device):
    a = feature_map((2, 24, 5, 7), layout=layout, device=device)
    expected = 2 * a
    TRITON.ops["add_relu_pool_"](a, a, False)
    assert same_bits(a, expected)


def test_nan_and_infinities_are_as_torch_has_them(device):
    a = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0], device=device).view(1, 1, 1, 5)
    y, pooled = run(a, None, True, in_place=False)
    assert same_bits(y + 0.0, torch.relu(a) + 0.0)  # of -0.0 either sign will do
    assert pooled.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 7, 7), (1, 6, 4, 8)])
def test_what_is_not_finite_stays_in_its_channel(shape, layout, device):
    a = feature_map(shape, torch.float16, layout, device)
    clean = reference.add_relu_pool(a, None, False)[1]
    a[0, 2, 1, 1], a[0, 4, 0, 3] = float("inf"), float("nan")
    _, pooled = run(a, None, False, in_place=False)
    assert pooled[0, 2].isinf() and pooled[0, 4].isnan()
    others = [channel for channel in range(shape[1]) if channel not in (2, 4)]
    assert relative_norm(pooled[:, others], clean[:, others]) <= VALUES[torch.float32]

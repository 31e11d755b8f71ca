"""add_relu_pool and add_relu_pool_."""

import pytest
import torch

from mod_kernels import reference
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.triton import TRITON

from ...support import feature_map
from .checks import same_bits

# H*W of 49, 1, 35 and 1155; C of no power of two.
SHAPES = [(3, 64, 7, 7), (1, 24, 1, 1), (2, 100, 5, 7), (1, 6, 35, 33), (0, 24, 3, 3)]


def run(a, b, relu, in_place):
    if in_place:
        return a, TRITON.ops["add_relu_pool_"](a, b, relu)
    return TRITON.ops["add_relu_pool"](a, b, relu)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, add, relu, in_place, device):
    wide = feature_map((2 * shape[0], *shape[1:]), dtype, device=device)
    before, a = wide.clone(), wide[::2]
    b = feature_map(shape, dtype, device=device) if add else None
    y, pooled = run(a, b, relu, in_place)
    expected, _ = reference.add_relu_pool(before[::2].double(), None if b is None else b.double(), relu)
    assert relative_norm(y, expected) <= VALUES[dtype]
    assert relative_norm(pooled, y.double().mean((2, 3))) <= VALUES[torch.float32]
    assert pooled.dtype == torch.float32 and (in_place or y.is_contiguous())
    assert same_bits(wide[1::2], before[1::2])
    if not in_place:
        assert same_bits(a, before[::2])
    if not add and not relu:
        assert same_bits(y, before[::2])


def test_a_tensor_added_to_itself_in_place(device):
    a = feature_map((2, 24, 5, 7), device=device)
    expected = 2 * a
    TRITON.ops["add_relu_pool_"](a, a, False)
    assert same_bits(a, expected)


def test_nan_and_infinities_are_as_torch_has_them(device):
    a = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0], device=device).view(1, 1, 1, 5)
    y, pooled = run(a, None, True, in_place=False)
    assert same_bits(y + 0.0, torch.relu(a) + 0.0)  # of -0.0 either sign will do
    assert pooled.isnan().all()

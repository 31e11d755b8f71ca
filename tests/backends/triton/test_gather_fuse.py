"""gather_channels, fuse_channels and fuse_channels_."""

import pytest
import torch

from mod_kernels import reference
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.triton import TRITON

from ...support import feature_map
from .checks import same_bits

SHAPES = [((3, 64, 7, 7), 3), ((1, 24, 1, 1), 24), ((2, 10, 5, 7), 1), ((1, 6, 35, 33), 4), ((0, 24, 3, 3), 3)]
POSITIONS = ("first", "last", "original")


def random_index(samples, channels, k, device):
    rows = [torch.randperm(channels)[:k] for _ in range(samples)]
    return torch.stack(rows).to(device) if rows else torch.empty((0, k), dtype=torch.int64, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["nchw", "nchw_sliced"])
@pytest.mark.parametrize("shape,k", SHAPES)
def test_gather(shape, k, layout, dtype, device):
    x = feature_map(shape, dtype, layout, device)
    x.flatten()[:1] = float("nan")
    index = random_index(shape[0], shape[1], k, device)
    assert same_bits(TRITON.ops["gather_channels"](x, index), reference.gather_channels(x, index))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("z_layout", ["nchw", "channels_last_sliced"])
@pytest.mark.parametrize("shape,k", SHAPES)
def test_fuse(shape, k, z_layout, position, in_place, device):
    dtype = {64: torch.float16, 10: torch.bfloat16}.get(shape[1], torch.float32)
    n, channels, h, w = shape
    wide = feature_map((2 * n, channels, h, w), dtype, device=device)
    before, x = wide.clone(), wide[::2]
    z = feature_map((n, k, h, w), dtype, z_layout, device)
    scores = torch.rand((n, k), device=device)
    index = random_index(n, channels, k, device)
    arguments = (z, scores, index if position == "original" else None, position)
    if in_place:
        TRITON.ops["fuse_channels_"](x, *arguments)
        y = x
    else:
        y = TRITON.ops["fuse_channels"](x, *arguments)
        assert y.is_contiguous() and same_bits(x, before[::2])
    assert same_bits(wide[1::2], before[1::2])
    expected = reference.fuse_channels(before[::2].double(), z.double(), scores.double(), index, position)
    changed = expected != before[::2].double()
    assert relative_norm(y[changed], expected[changed]) <= VALUES[dtype]
    assert same_bits(y[~changed], before[::2][~changed])


@pytest.mark.parametrize("in_place", [False, True])
def test_repeated_channels_add_up(in_place, device):
    """As a scatter-add: rounded once, so the largest term may cancel."""
    x = feature_map((2, 6, 5, 7), torch.float16, device=device)
    z = feature_map((2, 5, 5, 7), torch.float16, device=device)
    z[:, 1] = -z[:, 3]
    scores = torch.ones((2, 5), device=device)
    scores[:, [1, 3]] = 4096.0
    index = torch.tensor([[4, 2, 4, 2, 4], [0, 5, 5, 5, 0]], device=device)
    expected = reference.fuse_channels(x.double(), z.double(), scores.double(), index, "original")
    if in_place:
        y = x.clone()
        TRITON.ops["fuse_channels_"](y, z, scores, index, "original")
    else:
        y = TRITON.ops["fuse_channels"](x, z, scores, index, "original")
    assert relative_norm(y, expected) <= VALUES[torch.float16]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("in_place", [False, True])
def test_pass_through_keeps_every_bit(in_place, position, device):
    x = feature_map((1, 8, 3, 3), torch.float16, device=device)
    bits = torch.tensor([0x7C00, 0x7E01, 0x7D55, -0x0200, -0x8000, 0x0001], dtype=torch.int16, device=device)
    x[0, 4].flatten()[:6] = bits.view(torch.float16)
    z, scores = feature_map((1, 2, 3, 3), torch.float16, device=device), torch.rand((1, 2), device=device)
    index = torch.tensor([[3, 6]], device=device)
    arguments = (z, scores, index, position)
    if in_place:
        y = x.clone()
        TRITON.ops["fuse_channels_"](y, *arguments)
    else:
        y = TRITON.ops["fuse_channels"](x, *arguments)
    assert same_bits(y[:, 4], x[:, 4])


@pytest.mark.parametrize("bad", [6, -1, 2**40])
def test_an_index_out_of_range_is_masked(bad, device):
    """Nothing can be raised without synchronising a GPU: zeros are gathered, nothing is added, nothing is hit."""
    wide = feature_map((3, 6, 3, 3), device=device)
    before, x = wide.clone(), wide[1:2]
    z, scores = torch.ones((1, 2, 3, 3), device=device), torch.ones((1, 2), device=device)
    index = torch.tensor([[1, bad]], device=device)
    gathered = TRITON.ops["gather_channels"](x, index)
    assert same_bits(gathered[:, 0], x[:, 1]) and not gathered[:, 1].any()
    expected = before.clone()
    expected[1, 1] += 1.0
    assert same_bits(TRITON.ops["fuse_channels"](x, z, scores, index, "original"), expected[1:2])
    TRITON.ops["fuse_channels_"](x, z, scores, index, "original")
    assert same_bits(wide, expected)

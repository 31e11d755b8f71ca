"""gather_channels, fuse_channels and fuse_channels_."""

import pytest
import torch

from mod_kernels import reference
from mod_kernels._layout import memory_format_of
from mod_kernels._library import accumulation_dtype
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.triton import TRITON, launch

from ...support import feature_map
from .checks import same_bits

# H*W of 49, 1, 35, 196 and 1155; k of 1 and of C; more channels than a program takes in channels_last.
SHAPES = [
    ((3, 64, 7, 7), 3),
    ((1, 24, 1, 1), 24),
    ((2, 10, 5, 7), 1),
    ((1, 6, 35, 33), 4),
    ((1, 36, 14, 14), 36),
    ((1, 150, 2, 2), 4),
    ((0, 24, 3, 3), 3),
]
X_LAYOUTS = ["nchw_sliced", "channels_last", "channels_last_sliced"]
POSITIONS = ("first", "last", "original")
# Planes that do not begin at multiples of 16 bytes, which fuse takes flat: H*W of 49, 196, 35, 1 and 5625. P is
# smaller than a program's values or larger, and begins and ends inside of them.
FLAT = [
    ((2, 100, 7, 7), 45, torch.float16),
    ((2, 2053, 7, 7), 32, torch.float16),
    ((3, 21, 14, 14), 1, torch.bfloat16),
    ((2, 30, 14, 14), 30, torch.float16),
    ((2, 70, 5, 7), 9, torch.float32),
    ((3, 2100, 1, 1), 1100, torch.float64),
    ((1, 40, 7, 7), 40, torch.float64),
    ((2, 3, 75, 75), 1, torch.float32),
]


def random_index(samples, channels, k, device):
    rows = [torch.randperm(channels)[:k] for _ in range(samples)]
    return torch.stack(rows).to(device) if rows else torch.empty((0, k), dtype=torch.int64, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", *X_LAYOUTS])
@pytest.mark.parametrize("shape,k", SHAPES)
def test_gather(shape, k, layout, dtype, device):
    x = feature_map(shape, dtype, layout, device)
    if x.numel():
        x[0, 0, 0, 0] = float("nan")
    index = random_index(shape[0], shape[1], k, device)
    out = TRITON.ops["gather_channels"](x, index)
    assert same_bits(out, reference.gather_channels(x, index))
    assert out.is_contiguous(memory_format=memory_format_of(x))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("z_layout", ["nchw", "channels_last_sliced"])
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
@pytest.mark.parametrize("shape,k", SHAPES)
def test_fuse(shape, k, x_layout, z_layout, position, in_place, device):
    dtypes = {64: torch.float16, 150: torch.float16, 10: torch.bfloat16, 36: torch.float64}
    dtype = dtypes.get(shape[1], torch.float32)
    check_fuse(shape, k, dtype, x_layout, z_layout, position, in_place, device)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("z_layout", ["nchw", "nchw_sliced"])
@pytest.mark.parametrize("x_layout", ["nchw", "nchw_sliced"])
@pytest.mark.parametrize("shape,k,dtype", FLAT)
def test_flat_fuse(shape, k, dtype, x_layout, z_layout, position, in_place, device, monkeypatch):
    run, kernels = launch.run, []
    monkeypatch.setattr(
        launch, "run", lambda variant, *rest: (kernels.append(variant.kernel), run(variant, *rest))
    )
    check_fuse(shape, k, dtype, x_layout, z_layout, position, in_place, device)
    assert kernels == ["fuse_channels_flat_fwd_kernel"]


def check_fuse(shape, k, dtype, x_layout, z_layout, position, in_place, device):
    """Against float64; channels outside P, x out of place, and samples that a view leaves out, bit for bit."""
    n, channels, h, w = shape
    sliced = x_layout.endswith("sliced")
    wide = feature_map((2 * n, channels, h, w), dtype, x_layout.removesuffix("_sliced"), device)
    ours, others = (slice(0, None, 2), slice(1, None, 2)) if sliced else (slice(0, n), slice(n, None))
    before, x = wide.clone(), wide[ours]
    z = feature_map((n, k, h, w), dtype, z_layout, device)
    scores = torch.rand((n, k), dtype=accumulation_dtype(dtype), device=device)
    index = random_index(n, channels, k, device)
    arguments = (z, scores, index if position == "original" else None, position)
    if in_place:
        TRITON.ops["fuse_channels_"](x, *arguments)
        y = x
    else:
        y = TRITON.ops["fuse_channels"](x, *arguments)
        assert same_bits(x, before[ours]) and y.is_contiguous(memory_format=memory_format_of(x))
    assert same_bits(wide[others], before[others])
    expected = reference.fuse_channels(before[ours].double(), z.double(), scores.double(), index, position)
    changed = expected != before[ours].double()
    assert relative_norm(y[changed], expected[changed]) <= VALUES[dtype]
    assert same_bits(y[~changed], before[ours][~changed])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("in_place", [False, True])
def test_repeated_channels_add_up(in_place, layout, device):
    """As a scatter-add: rounded once, so the largest term may cancel."""
    x = feature_map((2, 6, 5, 7), torch.float16, layout, device)
    z = feature_map((2, 5, 5, 7), torch.float16, layout, device)
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


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("in_place", [False, True])
def test_pass_through_keeps_every_bit(in_place, position, layout, device):
    x = feature_map((1, 8, 3, 3), torch.float16, layout, device)
    bits = torch.tensor([0x7C00, 0x7E01, 0x7D55, -0x0200, -0x8000, 0x0001], dtype=torch.int16, device=device)
    x[0, 4, :2] = bits.view(torch.float16).view(2, 3)
    z, scores = feature_map((1, 2, 3, 3), torch.float16, device=device), torch.rand((1, 2), device=device)
    index = torch.tensor([[3, 6]], device=device)
    arguments = (z, scores, index, position)
    if in_place:
        y = x.clone()
        TRITON.ops["fuse_channels_"](y, *arguments)
    else:
        y = TRITON.ops["fuse_channels"](x, *arguments)
    assert same_bits(y[:, 4], x[:, 4])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bad", [6, -1, 2**40])
def test_an_index_out_of_range_is_masked(bad, layout, device):
    """Nothing can be raised without synchronising a GPU: zeros are gathered, nothing is added, nothing is hit."""
    wide = feature_map((3, 6, 3, 3), layout=layout, device=device)
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

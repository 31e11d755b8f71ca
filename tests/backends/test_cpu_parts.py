"""The CPU engine's other ops, gather, fuse and add_relu_pool: values, bits that pass through, and rounding."""

import pytest
import torch
import torch.nn.functional as F

from mod_kernels import reference
from mod_kernels._layout import layout_of
from mod_kernels._library import accumulation_dtype
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU

from ..support import LAYOUTS, feature_map, make_spec
from .cpu_cases import DTYPES, MARKS, SHAPES, bits, block

pytestmark = MARKS
POSITIONS = ("first", "last", "original")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("z_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_gather_and_fuse(shape, k, z_layout, layout, dtype):
    n, c, h, w = shape
    x, z = feature_map(shape, dtype, layout), feature_map((n, k, h, w), dtype, z_layout)
    scores, index = torch.rand(n, k, dtype=accumulation_dtype(dtype)), torch.randint(0, c, (n, k))  # with repeats
    gathered = CPU.ops["gather_channels"](x, index)
    assert torch.equal(bits(gathered), bits(reference.gather_channels(x, index)))
    for position in POSITIONS:
        expected = reference.fuse_channels(x.double(), z.double(), scores.double(), index, position)
        y = CPU.ops["fuse_channels"](x, z, scores, index, position)
        assert relative_norm(y, expected) <= VALUES[dtype]
        in_place = feature_map(shape, dtype, layout).copy_(x)
        assert layout_of(in_place) == layout_of(x)
        assert CPU.ops["fuse_channels_"](in_place, z, scores, index, position) is None
        assert torch.equal(bits(in_place), bits(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "_k"), SHAPES)
def test_add_relu_pool(shape, _k, layout, dtype):
    """The sum is torch's to the bit; pooled is the mean of what was written."""
    for relu in (False, True):
        for b in (None, feature_map(shape, dtype, layout)):
            a = feature_map(shape, dtype, layout)
            y, means = CPU.ops["add_relu_pool"](a, b, relu)
            assert torch.equal(y, reference.add_relu_pool(a, b, relu)[0])
            assert layout_of(y) == layout_of(a) and means.dtype == accumulation_dtype(dtype)
            assert relative_norm(means, y.mean((2, 3), dtype=torch.float64)) <= VALUES[means.dtype]
            assert torch.equal(CPU.ops["add_relu_pool_"](a, b, relu), means)
            assert torch.equal(bits(a), bits(y))


def every_pattern(dtype, layout):
    """(2, 128, 16, 16): all 65536 values of a 16-bit dtype; of a wider one as many random patterns of bits."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if dtype.itemsize > 2:
        words = torch.randint(-(2**15), 2**15, (65536, dtype.itemsize // 2)).short()
    return words.flatten().view(dtype).reshape(2, 128, 16, 16).contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_what_is_moved_keeps_its_bits(layout, dtype):
    """Signalling NaNs, whose way through a register as a number would change them, subnormals and -0.0 too."""
    x, spec = every_pattern(dtype, layout), make_spec(128, 4, dtype=dtype)
    index = torch.stack([torch.randperm(128) for _ in range(2)])
    moved = bits(x)[torch.arange(2)[:, None], index]
    assert torch.equal(bits(CPU.ops["gather_channels"](x, index)), moved)
    assert torch.equal(bits(CPU.ops["add_relu_pool"](x, None, False)[0]), bits(x))
    accumulated = accumulation_dtype(dtype)
    zeros, ones = torch.zeros(2, 128, dtype=accumulated), torch.ones(2, 4, dtype=accumulated)
    z = feature_map((2, 4, 16, 16), dtype, layout)
    for pooled in (None, zeros):  # x pooled and copied in one pass, or copied alone
        y, _ = CPU.ops["mod_block"](x, *block(spec, pooled))
        assert torch.equal(bits(y[:, 4:]), bits(x[:, 4:]))
    for position, kept in (("first", slice(4, 128)), ("last", slice(0, 124)), ("original", slice(0, 124))):
        y = CPU.ops["fuse_channels"](x, z, ones, torch.arange(124, 128).expand(2, 4).contiguous(), position)
        assert torch.equal(bits(y[:, kept]), bits(x[:, kept]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("z_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_16_bit_sum_is_torch_s_to_the_bit(layout, z_layout, dtype):
    """Every value plus another: results that are subnormal, halfway, too large, infinite and NaN.

    In the kernels' vectors, at their ends (17 * 17 pixels), and one by one where z's layout is not x's.
    """
    a = F.pad(every_pattern(dtype, "nchw"), (0, 1, 0, 1))
    b = a.flatten()[torch.randperm(a.numel())].view_as(a)
    a, b = a.contiguous(memory_format=FORMATS[layout]), b.contiguous(memory_format=FORMATS[z_layout])
    results = [CPU.ops["fuse_channels"](a, b, torch.ones(2, 128), None, "first")]
    if layout == z_layout:
        results.append(CPU.ops["add_relu_pool"](a, b, False)[0])
    expected = a + b
    for y in results:
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(bits(y)[~y.isnan()], bits(expected)[~y.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("z_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_repeated_channels_add_up_before_the_one_rounding(layout, z_layout, dtype):
    x, z = feature_map((2, 20, 5, 7), dtype, layout), feature_map((2, 12, 5, 7), dtype, z_layout)
    scores, index = torch.rand(2, 12), torch.randint(0, 5, (2, 12))
    exact = reference.fuse_channels(x.double(), z.double(), scores.double(), index, "original")
    for y in (CPU.ops["fuse_channels"](x, z, scores, index, "original"), x):
        if y is x:
            CPU.ops["fuse_channels_"](x, z, scores, index, "original")
        # Half a unit in the last place, and what the float32 sum may be off.
        allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6
        assert ((y.double() - exact).abs() <= allowed).all()

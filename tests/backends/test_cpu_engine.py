"""The CPU engine's block and selection against float64, in three stages: logits; selection from the kernel's own
logits; the rest from the kernel's own index and scores. Fresh outputs are NaN-filled before every call."""

import pytest
import torch
import torch.nn.functional as F

from mod_kernels import reference
from mod_kernels._layout import layout_of
from mod_kernels._library import accumulation_dtype
from mod_kernels._tolerances import LOGITS, VALUES, relative_norm, relative_to_largest
from mod_kernels.backends.native import CPU
from mod_kernels.spec import CONV_KINDS

from ..support import LAYOUTS, double, feature_map, make_spec
from .cpu_cases import DTYPES, MARKS, SHAPES, bits, block, selector

pytestmark = MARKS


def check_logits(x, spec, logits, pooled=None):
    wide = double(spec)
    pooled = x.mean((2, 3), dtype=torch.float64) if pooled is None else pooled.double()
    expected = reference.selector_logits(
        x.double()[..., :1, :1], wide.fc1_weight, wide.fc2_weight, wide.fc1_bias, wide.fc2_bias, pooled
    )
    assert logits.dtype == accumulation_dtype(x.dtype)
    assert relative_to_largest(logits, expected) <= LOGITS[x.dtype]
    return expected


def check_selection(x, spec, index, logits, pooled=None):
    expected = check_logits(x, spec, logits, pooled)
    assert torch.equal(index, reference.rank_channels(logits, spec.k))
    if len(x):
        kth = expected.topk(spec.k, dim=1).values[:, -1:]
        slack = 2 * LOGITS[x.dtype] * expected.abs().amax()
        assert (expected.gather(1, index) >= kth - slack).all()


def check_values(x, y, spec, logits):
    """y from x given the kernel's own logits, which say the index; untouched channels bit for bit."""
    index = reference.rank_channels(logits, spec.k)
    scores = torch.sigmoid(logits.double().gather(1, index))
    z = reference.narrow_conv_block(reference.gather_channels(x, index).double(), double(spec))
    first = 0 if spec.position == "first" else x.shape[1] - spec.k
    written = index if spec.position == "original" else torch.arange(first, first + spec.k).expand_as(index)
    expected = reference.gather_channels(x, written).double() + scores[:, :, None, None] * z
    assert relative_norm(reference.gather_channels(y, written), expected) <= VALUES[x.dtype]
    untouched = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, written, False)
    assert torch.equal(bits(y)[untouched], bits(x)[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONV_KINDS)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_mod_block(shape, k, kind, layout, dtype):
    if kind in ("basic", "conv") and k > 32:
        pytest.skip("a dense 3x3 over 100 channels tells nothing new and is slow in float64")
    for position, weight_dtype, extras in (
        ("first", dtype, {}),
        ("last", torch.float32, {"bias": True}),
        ("original", dtype, {"final_relu": True, "bias": True}),
    ):
        spec = make_spec(shape[1], k, kind, weight_dtype, position=position, **extras)
        x = feature_map(shape, dtype, layout)
        before = x.clone()
        y, logits = CPU.ops["mod_block"](x, *block(spec))
        assert torch.equal(bits(x), bits(before))
        assert (layout_of(y), y.is_contiguous() or layout_of(y) == "channels_last") == (layout_of(x), True)
        check_logits(x, spec, logits)
        check_values(x, y, spec, logits)
        between = x._base[1::2].clone() if layout.endswith("sliced") else None
        assert torch.equal(CPU.ops["mod_block_"](x, *block(spec)), logits)
        assert torch.equal(bits(x), bits(y))
        assert between is None or torch.equal(x._base[1::2], between)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_select(shape, k, layout, dtype):
    for bias, weight_dtype in ((False, dtype), (True, dtype), (True, torch.float32)):
        spec = make_spec(shape[1], k, dtype=weight_dtype, bias=bias)
        x = feature_map(shape, dtype, layout)
        scores, index, logits, hidden, pooled = CPU.ops["select_channels_saving"](x, *selector(spec))
        check_selection(x, spec, index, logits)
        exact = torch.sigmoid(logits.double().gather(1, index))
        assert relative_norm(scores, exact) <= VALUES[scores.dtype]
        assert relative_norm(pooled, x.mean((2, 3), dtype=torch.float64)) <= VALUES[pooled.dtype]
        wide = F.relu(F.linear(pooled.double(), spec.fc1_weight.double(), double(spec).fc1_bias))
        assert relative_to_largest(hidden, wide) <= LOGITS[dtype]
        # The pooled vector given back: the same answer, and x is not read.
        unread = torch.full_like(x, float("nan")), *selector(spec, pooled)
        given = CPU.ops["select_channels_saving"](*unread)
        assert all(map(torch.equal, given[:4], (scores, index, logits, hidden)))
        assert given[4].shape == (0,)
        # Nothing saved: the same selection.
        for lean in (CPU.ops["select_channels"](x, *selector(spec)), CPU.ops["select_channels"](*unread)):
            assert len(lean) == 2 and all(map(torch.equal, lean, (scores, index)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_zeros_go_to_the_lower_channel(dtype):
    """Equal logits in every size class of the top-k; a dead hidden layer is all ties.

    Weights of -0.0 are among them, but the kernel's sums start at +0.0: its own logits are never -0.0.
    """
    accumulated = accumulation_dtype(dtype)
    for channels in (7, 64, 2048):
        for k in {1, 5, min(channels, 40), channels}:
            logits = torch.randint(-2, 3, (3, channels)).to(dtype)
            logits[logits == 0] = torch.where(torch.rand(int((logits == 0).sum())) < 0.5, 0.0, -0.0).to(dtype)
            logits[2] = 0.0
            # A hidden layer of three units, one per sample, passes the wanted logits through.
            pooled, fc1_weight = torch.eye(3, channels, dtype=accumulated), torch.eye(3, channels, dtype=dtype)
            x = torch.zeros(3, channels, 2, 2, dtype=dtype)
            out = CPU.ops["select_channels_saving"](x, fc1_weight, logits.t().contiguous(), None, None, pooled, k)
            assert torch.equal(out[1], reference.rank_channels(out[2], k)), (channels, k)
            assert torch.equal(out[2], logits.to(accumulated))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kind", CONV_KINDS)
def test_not_finite(kind, bad, layout, dtype):
    """No index out of range, NaN of either sign first, and the same NaNs in the result as the reference's."""
    for k in (1, 4, 70):
        spec = make_spec(128, k, kind, dtype=dtype)
        x = feature_map((3, 128, 7, 7), dtype, layout)
        x[0, 5, 3, 3] = bad
        x[1] = bad
        x[2, 100, 0, 0] = -x.new_tensor(bad)
        y, logits = CPU.ops["mod_block"](x, *block(spec))
        _, index, same, _, _ = CPU.ops["select_channels_saving"](x, *selector(spec))
        assert torch.equal(bits(same), bits(logits))
        assert ((index >= 0) & (index < 128)).all()
        assert all(len(set(row)) == k for row in index.tolist())
        ordered = logits.where(~logits.isnan(), float("nan"))  # one NaN, whatever its sign was
        assert torch.equal(index, reference.rank_channels(ordered, k))
        z = reference.narrow_conv_block(reference.gather_channels(x, index), spec)
        expected = reference.fuse_channels(x, z, torch.sigmoid(logits.gather(1, index)), index)
        assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_nan_ranks_first(dtype):
    fc1_weight, fc2_weight = torch.full((1, 64), 1 / 64, dtype=dtype), torch.linspace(-1, 1, 64).to(dtype)[:, None]
    bias = torch.zeros(64, dtype=dtype)
    bias[20] = float("nan")
    bits(bias)[40] = bits(bias)[20] | torch.iinfo(bits(bias).dtype).min  # torch negates no bfloat16 NaN
    assert bias[40].isnan()
    x, one = torch.zeros(1, 64, 1, 1, dtype=dtype), torch.ones(1, 64, dtype=accumulation_dtype(dtype))
    for k in (3, 64):
        index = CPU.ops["select_channels"](x, fc1_weight, fc2_weight, None, bias, one, k)[1]
        assert index[0, :3].tolist() == [20, 40, 63]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_that_a_larger_call_left_behind(dtype):
    """A thread keeps its scratch for scores and index: a wide selection, a narrow one, and a wider one."""
    for k in (100, 3, 160):
        spec = make_spec(160, k, bias=True, dtype=dtype)
        x = feature_map((3, 160, 2, 2), dtype)
        y, logits = CPU.ops["mod_block"](x, *block(spec))
        check_values(x, y, spec, logits)

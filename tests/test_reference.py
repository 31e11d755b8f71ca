"""The specification against the formulas, written out in Python loops, and against the plain form."""

import math

import pytest
import torch

from mod_kernels import plain, reference

from .support import LAYOUTS, feature_map, make_spec, selector_of

POSITIONS = ("first", "last", "original")


def logits_by_hand(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias):
    """One sample at a time, one number at a time, in Python floats (float64)."""
    rows = []
    for sample in x.double().tolist():
        pooled = [math.fsum(map(math.fsum, plane)) / (len(plane) * len(plane[0])) for plane in sample]
        hidden = []
        for r, weights in enumerate(fc1_weight.tolist()):
            total = math.fsum(w * p for w, p in zip(weights, pooled, strict=True)) + (
                0 if fc1_bias is None else fc1_bias[r].item()
            )
            hidden.append(max(total, 0.0))
        rows.append(
            [
                math.fsum(w * h for w, h in zip(weights, hidden, strict=True))
                + (0 if fc2_bias is None else fc2_bias[c].item())
                for c, weights in enumerate(fc2_weight.tolist())
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selection_is_the_formula(bias, layout):
    x = feature_map((3, 20, 5, 7), torch.float64, layout)
    spec = make_spec(20, 6, dtype=torch.float64, hidden=5, bias=bias)
    expected = logits_by_hand(x, spec.fc1_weight, spec.fc2_weight, spec.fc1_bias, spec.fc2_bias)
    scores, index = reference.select_channels(x, **selector_of(spec))
    for n in range(3):
        by_rank = sorted(range(20), key=lambda c: (-expected[n, c].item(), c))
        assert index[n].tolist() == by_rank[:6]
        for j, c in enumerate(by_rank[:6]):
            assert scores[n, j].item() == pytest.approx(1 / (1 + math.exp(-expected[n, c].item())), rel=1e-12)
    assert index.dtype == torch.int64 and scores.dtype == torch.float64


def test_equal_logits_go_to_the_lower_channel():
    logits = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0]])
    assert reference.rank_channels(logits, 5).tolist() == [[1, 3, 0, 2, 4]]
    # A dead hidden layer: every logit is equal, so channels 0 to k-1, however many there are.
    x = feature_map((2, 2048, 3, 3))
    zeros = torch.zeros(128, 2048)
    scores, index = reference.select_channels(x, zeros, zeros.t(), 32)
    assert index.tolist() == [list(range(32))] * 2 and (scores == 0.5).all()


@pytest.mark.parametrize("width", [7, 64, 2048])
def test_nan_ranks_first_whatever_its_sign(width):
    inf = torch.tensor(float("inf"))
    negative_nan = (inf - inf).copysign(torch.tensor(-1.0))
    assert torch.signbit(negative_nan)
    logits = torch.randn(1, width)
    logits[0, 2], logits[0, 5], logits[0, 3] = inf, negative_nan, float("nan")
    assert reference.rank_channels(logits, 3).tolist() == [[3, 5, 2]]


def test_selector_relu_keeps_nan():
    x = feature_map((1, 4, 2, 2))
    x[0, 1, 0, 0] = float("nan")
    scores, index = reference.select_channels(x, torch.ones(2, 4), torch.ones(4, 2), 2)
    assert scores.isnan().all() and index.tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_accumulated_in_float32(dtype):
    # 64 * 64 ones and a small one: a float16 or bfloat16 sum would stop growing long before 4096.
    x = torch.ones(1, 2, 64, 64, dtype=dtype)
    scores, _ = reference.select_channels(x, torch.eye(2), torch.eye(2), 1)
    assert scores.dtype == torch.float32
    assert scores.item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), rel=1e-6)


def test_pooled_replaces_the_reading_of_x():
    x = feature_map((2, 16, 3, 3))
    spec = make_spec(16, 4, bias=True)
    expected = reference.select_channels(x, **selector_of(spec))
    got = reference.select_channels(torch.full_like(x, torch.nan), **selector_of(spec), pooled=x.mean((2, 3)))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_takes_the_named_planes(layout):
    x = feature_map((2, 9, 3, 5), layout=layout)
    index = torch.tensor([[4, 0, 8], [1, 1, 7]])
    out = reference.gather_channels(x, index)
    for n in range(2):
        for j in range(3):
            assert torch.equal(out[n, j], x[n, index[n, j]])
    channels_last = layout.startswith("channels_last")
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fuse_adds_at_the_position_and_nowhere_else(dtype, position, layout):
    x = feature_map((2, 9, 3, 5), dtype, layout)
    z = feature_map((2, 3, 3, 5), dtype)
    scores = torch.rand(2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    index = torch.tensor([[4, 0, 8], [1, 5, 7]])
    y = reference.fuse_channels(x, z, scores, index, position)
    expected = x.double().clone()
    for n in range(2):
        for j in range(3):
            c = {"first": j, "last": 6 + j, "original": index[n, j].item()}[position]
            expected[n, c] += scores[n, j].double() * z[n, j].double()
    # One rounding to x's dtype of a float32 (float64) sum.
    assert torch.equal(y, expected.to(scores.dtype).to(dtype)) or torch.allclose(
        y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )
    untouched = torch.ones(2, 9, dtype=torch.bool)
    for n in range(2):
        for j in range(3):
            untouched[n, {"first": j, "last": 6 + j, "original": index[n, j].item()}[position]] = False
    assert torch.equal(y[untouched], x[untouched])
    in_place = x.clone()
    assert reference.fuse_channels_(in_place, z, scores, index, position) is in_place
    assert torch.equal(in_place, y)


def test_original_position_adds_repeated_channels_up():
    x = torch.zeros(1, 4, 1, 1)
    y = reference.fuse_channels(
        x, torch.ones(1, 3, 1, 1), torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2, 0, 2]]), "original"
    )
    assert y.flatten().tolist() == [2, 0, 5, 0]


def test_pass_through_keeps_the_bits_of_a_signalling_nan():
    bits = torch.tensor([0x7D01, 0x3C00, 0x3C00, 0x3C00], dtype=torch.int16)  # a float16 NaN with a payload
    x = bits.view(torch.float16).reshape(1, 4, 1, 1)
    z, scores = torch.ones(1, 1, 1, 1, dtype=torch.float16), torch.ones(1, 1)
    for position, index in (("last", None), ("original", torch.tensor([[3]]))):
        y = reference.fuse_channels(x, z, scores, index, position)
        assert y.flatten()[:3].view(torch.int16).tolist() == bits[:3].tolist()


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_add_relu_pool(relu, residual):
    a, b = feature_map((2, 5, 3, 3)), feature_map((2, 5, 3, 3)) if residual else None
    expected = a + b if residual else a.clone()
    expected = expected.clamp_min(0) if relu else expected
    y, pooled = reference.add_relu_pool(a, b, relu)
    assert torch.equal(y, expected) and torch.allclose(pooled, expected.mean((2, 3)))
    assert y.data_ptr() != a.data_ptr()
    in_place, pooled_ = reference.add_relu_pool_(a, b, relu)
    assert in_place is a and torch.equal(a, expected) and torch.equal(pooled, pooled_)


@pytest.mark.parametrize("ending", plain.ENDINGS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_plain_form_is_the_same_block(ending, position, kind):
    """Where nothing ties, what people write and the specification agree, for all three endings."""
    x = feature_map((3, 32, 6, 6), torch.float64)
    spec = make_spec(32, 8, kind, torch.float64, hidden=16, position=position, bias=True)
    expected = reference.mod_block(x, spec)

    def conv_block(gathered):
        return reference.narrow_conv_block(gathered, spec)

    got = plain.mod_block(x, **selector_of(spec), conv_block=conv_block, position=position, ending=ending)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert (got.data_ptr() == x.data_ptr()) == (ending == "inplace")


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("final_relu", [False, True])
def test_block_is_its_parts(kind, final_relu):
    x = feature_map((2, 16, 5, 5), torch.float64)
    spec = make_spec(16, 4, kind, torch.float64, final_relu=final_relu)
    scores, index = reference.select_channels(x, **selector_of(spec))
    z = torch.stack([x[n, index[n]] for n in range(2)])
    for i, (weight, bias) in enumerate(zip(spec.conv_weights, spec.conv_biases, strict=True)):
        z = torch.conv2d(z, weight, bias, padding=(weight.shape[2] - 1) // 2)
        if i < len(spec.conv_weights) - 1 or final_relu:
            z = z.clamp_min(0)
    expected = x.clone()
    expected[:, :4] += scores[:, :, None, None] * z
    assert torch.allclose(reference.mod_block(x, spec), expected, rtol=1e-13, atol=1e-13)
    in_place = x.clone()
    assert reference.mod_block_(in_place, spec) is in_place
    assert torch.allclose(in_place, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape,k", [((0, 8, 3, 3), 2), ((1, 8, 1, 1), 8), ((1, 1, 1, 1), 1)])
def test_smallest_sizes(shape, k):
    x = feature_map(shape)
    y = reference.mod_block(x, make_spec(shape[1], k, "basic"))
    assert y.shape == x.shape and not y.isnan().any()

"""select_channels and select_channels_saving: pooling, both layers, top-k; ties, NaN, infinities."""

import pytest
import torch

from mod_kernels import reference
from mod_kernels._tolerances import LOGITS, relative_to_largest
from mod_kernels.backends.triton import TRITON

from ...support import feature_map, make_spec
from .checks import check_ranking, check_selection, same_bits

# H*W of 49, 1, 35, and 1155: longer than one block. C of no power of two; k = 1, 3, C. C = 100 and 64 with
# several programs a sample; R = 300 makes the second layer a launch of its own.
CASES = [
    ((3, 64, 7, 7), 3, {}),
    ((2, 300, 3, 3), 5, {"hidden": 70}),
    ((1, 24, 1, 1), 24, {}),
    ((3, 100, 5, 7), 1, {"hidden": 7}),
    ((2, 12, 35, 33), 3, {"hidden": 3}),
    ((0, 64, 7, 7), 3, {}),
    ((1, 1, 3, 3), 1, {}),
]


def select(x, spec, pooled=None):
    """All there is; the op that saves nothing must give the same scores and index."""
    arguments = (x, *spec.selector_arguments, pooled, spec.k)
    outputs = TRITON.ops["select_channels_saving"](*arguments)
    lean = TRITON.ops["select_channels"](*arguments)
    assert len(lean) == 2 and all(same_bits(a, b) for a, b in zip(lean, outputs[:2], strict=True))
    return outputs


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "channels_last_sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape,k,fields", CASES)
def test_against_float64(shape, k, fields, dtype, layout, device):
    x = feature_map(shape, dtype, layout, device=device)
    spec = make_spec(shape[1], k, dtype=dtype, device=device, **fields)
    before = x.clone()
    scores, index, logits, hidden, pooled = select(x, spec)
    check_selection(x, spec, scores, index, logits)
    assert relative_to_largest(pooled, x.double().mean((2, 3))) <= LOGITS[dtype]
    expected = torch.relu(x.double().mean((2, 3)) @ spec.fc1_weight.double().T)
    assert relative_to_largest(hidden, expected) <= LOGITS[dtype]
    assert same_bits(x, before)


@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16])
def test_biases_and_weights_of_either_dtype(weights, device):
    x = feature_map((2, 24, 5, 7), torch.float16, "nchw_sliced", device=device)
    spec = make_spec(24, 5, dtype=weights, device=device, bias=True)
    scores, index, logits, _, _ = select(x, spec)
    check_selection(x, spec, scores, index, logits)


def test_given_pooled_the_feature_map_is_not_read(device):
    spec = make_spec(100, 3, device=device)
    x = torch.full((2, 100, 5, 7), float("nan"), device=device)
    pooled = torch.randn((2, 100), device=device)
    scores, index, logits, _, pooled_out = select(x, spec, pooled)
    check_selection(x, spec, scores, index, logits, pooled)
    assert pooled_out.shape == (0,)


@pytest.mark.parametrize("k", [1, 3, 24])
def test_ties_go_to_the_lower_channel(k, device):
    """Dead hidden units give C equal logits; -0.0 and +0.0 are equal too."""
    spec = make_spec(24, k, device=device)
    spec.fc2_weight.zero_()
    spec.fc2_weight[::2] *= -1.0  # logits of -0.0 and +0.0 in turn
    scores, index, logits, _, _ = select(feature_map((2, 24, 7, 7), device=device), spec)
    assert not logits.any()
    assert torch.equal(index, torch.arange(k, device=device).expand(2, k))
    assert torch.equal(scores, torch.full((2, k), 0.5, device=device))


def test_equal_logits_in_pairs(device):
    spec = make_spec(64, 7, device=device)
    spec.fc2_weight[1::2] = spec.fc2_weight[::2]
    scores, index, logits, _, _ = select(feature_map((2, 64, 3, 3), device=device), spec)
    assert torch.equal(logits[:, 1::2], logits[:, ::2])
    check_ranking(7, scores, index, logits)


# NaN of either sign (inf - inf is the negative one on x86), infinities, and their mixture.
SPECIAL = [float("nan"), -float("nan"), float("inf"), -float("inf"), 3e38]


@pytest.mark.parametrize("k", [1, 3, 24])
@pytest.mark.parametrize("value", SPECIAL)
def test_special_values_rank_and_stay_in_range(value, k, device):
    """Through bias2, so that single logits are special; -0.0's sign bit makes the negative NaN."""
    spec = make_spec(24, k, device=device, bias=True)
    special = torch.tensor(value, device=device)
    spec.fc2_bias[5] = special
    spec.fc2_bias[17] = -special
    scores, index, logits, _, _ = select(feature_map((2, 24, 3, 3), device=device), spec)
    check_ranking(k, scores, index, logits)
    assert ((index >= 0) & (index < 24)).all()
    if value != value:
        assert index[:, 0].tolist() == [5, 5] and scores[:, 0].isnan().all()


def test_nan_in_the_feature_map(device):
    """A NaN reaches every hidden unit (the ReLU keeps it) and every logit: the first k channels are chosen."""
    x = feature_map((2, 24, 3, 3), device=device)
    x[0, 7, 1, 1] = float("nan")
    spec = make_spec(24, 3, device=device)
    scores, index, logits, hidden, _ = select(x, spec)
    assert hidden[0].isnan().all() and logits[0].isnan().all() and scores[0].isnan().all()
    assert index[0].tolist() == [0, 1, 2]
    alone = select(x[1:].clone(), spec)
    assert all(same_bits(a, b[1:]) for a, b in zip(alone[:3], (scores, index, logits), strict=True))


def test_infinity_in_the_feature_map(device):
    x = feature_map((1, 24, 3, 3), device=device)
    x[0, 7, 1, 1] = float("inf")
    spec = make_spec(24, 3, device=device)
    scores, index, logits, _, _ = select(x, spec)
    check_ranking(3, scores, index, logits)
    expected = reference.selector_logits(x, *spec.selector_arguments)
    assert torch.equal(logits.isnan(), expected.isnan())


@pytest.mark.parametrize("hidden", [4, 300])
def test_a_sample_does_not_depend_on_its_batch(hidden, device):
    x = feature_map((3, 68, 7, 7), device=device)
    spec = make_spec(68, 3, hidden=hidden, device=device)
    together = select(x, spec)
    for n in range(3):
        alone = select(x[n : n + 1], spec)
        assert all(same_bits(a[0], b[n]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("k", [1, 3, 16, 20, 68])
def test_ranking_by_slices(k, device, with_tuning):
    """Fewer channels a slice than k, as many, and more; the last slice is not full; ties between slices."""
    with_tuning(slice_channels=16)
    spec = make_spec(68, k, hidden=300, device=device, bias=True)
    spec.fc2_weight[34:] = spec.fc2_weight[:34]
    spec.fc2_bias[34:] = spec.fc2_bias[:34]
    x = feature_map((2, 68, 5, 7), device=device)
    scores, index, logits, _, _ = select(x, spec)
    check_selection(x, spec, scores, index, logits)

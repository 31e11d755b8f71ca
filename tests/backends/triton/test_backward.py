"""The backward ops against their formulas in float64; and to the same bits in any order of programs."""

import itertools

import pytest
import torch

from mod_kernels._layout import memory_format_of
from mod_kernels._library import accumulation_dtype
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.triton import TRITON, configs_backward

from ...support import feature_map
from .checks import same_bits
from .test_gather_fuse import random_index

# H*W of 49, 1, 35, 196 and 1155; k of 1 and of C; C of no power of two.
SHAPES = [
    ((3, 40, 7, 7), 3),
    ((1, 24, 1, 1), 24),
    ((2, 10, 5, 7), 1),
    ((1, 6, 35, 33), 4),
    ((1, 36, 14, 14), 36),
    ((0, 24, 3, 3), 3),
]
LAYOUTS = ["nchw_sliced", "channels_last", "channels_last_sliced"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
POSITIONS = ("first", "last", "original")


def narrow_channels(index, channels, k, position):
    """P (N, k)."""
    first = 0 if position == "first" else channels - k
    return (
        index if position == "original" else torch.arange(first, first + k, device=index.device).expand_as(index)
    )


def spread(index, x):
    return index[:, :, None, None].expand(-1, -1, *x.shape[2:])


# ---- fuse_channels_backward


def fuse_gradients(dy, z, scores, index, position):
    """dz and dscores in float64."""
    dy, z, scores = dy.double(), z.double(), scores.double()
    at_target = dy.gather(1, spread(narrow_channels(index, dy.shape[1], z.shape[1], position), dy))
    return at_target * scores[:, :, None, None], (z * at_target).sum((2, 3))


def fuse_inputs(shape, k, dtype, layout, device):
    n, channels, h, w = shape
    dy, z = feature_map(shape, dtype, layout, device), feature_map((n, k, h, w), dtype, layout, device)
    scores = torch.rand((n, k), dtype=accumulation_dtype(dtype), device=device)
    return dy, z, scores, random_index(n, channels, k, device)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,k", SHAPES)
def test_fuse(shape, k, dtype, layout, position, device):
    dy, z, scores, index = fuse_inputs(shape, k, dtype, layout, device)
    before = dy.clone(), z.clone()
    given = index if position == "original" else None
    dz, dscores = TRITON.ops["fuse_channels_backward"](dy, z, scores, given, position, True, True)
    expected = fuse_gradients(dy, z, scores, index, position)
    assert relative_norm(dz, expected[0]) <= VALUES[dtype]
    assert relative_norm(dscores, expected[1]) <= VALUES[dscores.dtype]
    assert (dz.dtype, dscores.dtype) == (dtype, scores.dtype)
    assert dz.is_contiguous(memory_format=memory_format_of(z))
    assert same_bits(dy, before[0]) and same_bits(z, before[1])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_fuse_where_channels_repeat(layout, device):
    dy, z, scores, _ = fuse_inputs((2, 6, 5, 7), 5, torch.float32, layout, device)
    index = torch.tensor([[4, 2, 4, 2, 4], [0, 5, 5, 5, 0]], device=device)
    dz, dscores = TRITON.ops["fuse_channels_backward"](dy, z, scores, index, "original", True, True)
    expected = fuse_gradients(dy, z, scores, index, "original")
    assert relative_norm(dz, expected[0]) <= VALUES[torch.float32]
    assert relative_norm(dscores, expected[1]) <= VALUES[torch.float32]


@pytest.mark.parametrize("z_needed,scores_needed", [(True, False), (False, True), (False, False)])
def test_fuse_makes_what_is_needed(z_needed, scores_needed, device):
    dy, z, scores, _ = fuse_inputs((2, 10, 7, 7), 3, torch.float16, "nchw", device)
    run = TRITON.ops["fuse_channels_backward"]
    both = run(dy, z, scores, None, "last", True, True)
    for one, full, wanted in zip(
        run(dy, z, scores, None, "last", z_needed, scores_needed), both, (z_needed, scores_needed), strict=True
    ):
        assert same_bits(one, full) if wanted else one.shape == (0,)


# ---- select_channels_backward


def select_gradients(dscores, scores, index, hidden, pooled, fc1, fc2):
    """dpooled, dfc1, dfc2, dfc1_bias, dfc2_bias in float64."""
    dscores, scores, hidden, pooled, fc1, fc2 = (
        tensor.double() for tensor in (dscores, scores, hidden, pooled, fc1, fc2)
    )
    gradient = dscores * scores * (1 - scores)
    dlogits = torch.zeros_like(pooled).scatter(1, index, gradient)
    dhidden = torch.zeros_like(hidden)
    for n in range(len(scores)):  # the selected rows alone
        dhidden[n] = gradient[n] @ fc2[index[n]]
    dhidden = dhidden.masked_fill(hidden <= 0, 0)
    return dhidden @ fc1, dhidden.t() @ pooled, dlogits.t() @ hidden, dhidden.sum(0), dlogits.sum(0)


def select_inputs(n, channels, hidden, k, dtype, device):
    def random(*shape):
        return torch.randn(shape, device=device)

    return (
        random(n, k), torch.rand((n, k), device=device), random_index(n, channels, k, device),
        random(n, hidden).relu(), random(n, channels), random(hidden, channels).to(dtype),
        random(channels, hidden).to(dtype),
    )  # fmt: skip


# N beyond a tile of samples; C and R of no multiple of 16, R beyond what a program takes; k of 1 and of C.
SELECTORS = [(3, 24, 3, 4), (1, 70, 35, 70), (35, 20, 1, 1), (2, 36, 130, 7), (0, 24, 3, 4), (3, 8, 40, 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n,channels,hidden,k", SELECTORS)
def test_select(n, channels, hidden, k, dtype, device):
    inputs = select_inputs(n, channels, hidden, k, dtype, device)
    outputs = TRITON.ops["select_channels_backward"](*inputs, *[True] * 5)
    for output, expected in zip(outputs, select_gradients(*inputs), strict=True):
        assert output.dtype == torch.float32 and output.shape == expected.shape
        assert relative_norm(output, expected) <= VALUES[torch.float32]


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5))[::3])
def test_select_makes_what_is_needed(needed, device):
    inputs = select_inputs(3, 24, 20, 4, torch.float32, device)
    run = TRITON.ops["select_channels_backward"]
    for one, full, wanted in zip(run(*inputs, *needed), run(*inputs, *[True] * 5), needed, strict=True):
        assert same_bits(one, full) if wanted else one.shape == (0,)


def test_select_reads_selected_rows_alone(device):
    """Others of the second layer may hold anything; their own gradients are zero."""
    inputs = select_inputs(2, 12, 5, 3, torch.float32, device)
    index, fc2 = inputs[2], inputs[-1]
    unselected = torch.ones(12, dtype=torch.bool, device=device)
    unselected[index.flatten()] = False
    expected = select_gradients(*inputs)
    fc2[unselected] = float("nan")
    outputs = TRITON.ops["select_channels_backward"](*inputs, *[True] * 5)
    assert all(relative_norm(a, b) <= VALUES[torch.float32] for a, b in zip(outputs, expected, strict=True))
    assert not outputs[2][unselected].any() and not outputs[4][unselected].any()


def test_select_passes_a_nan_of_the_hidden_layer(device):
    inputs = select_inputs(1, 12, 4, 3, torch.float32, device)
    inputs[3][0] = torch.tensor([float("nan"), 0.0, -0.0, 1.0], device=device)
    _, dfc1, _, dfc1_bias, _ = TRITON.ops["select_channels_backward"](*inputs, *[True] * 5)
    expected = select_gradients(*inputs)
    assert relative_norm(dfc1, expected[1]) <= VALUES[torch.float32]
    assert dfc1_bias[0] != 0 and dfc1_bias[3] != 0 and not dfc1_bias[1:3].any()


def test_gradients_may_be_expanded(device):
    """As the gradient of a sum is."""
    inputs = select_inputs(2, 12, 4, 3, torch.float32, device)
    one = torch.ones((), device=device)
    run = TRITON.ops["select_channels_backward"]
    outputs = run(one.expand(2, 3), *inputs[1:], *[True] * 5)
    dense = run(torch.ones((2, 3), device=device), *inputs[1:], *[True] * 5)
    assert all(same_bits(a, b) for a, b in zip(outputs, dense, strict=True))
    dy = feature_map((2, 12, 5, 7), device=device)
    results = [
        TRITON.ops["input_gradient"](dy, dpooled, None, None, None, None, "first")
        for dpooled in (one.expand(2, 12), torch.ones((2, 12), device=device))
    ]
    assert same_bits(*results)


# ---- input_gradient


def added_up(dy, dpooled, dgathered, index, y, overwritten, position):
    """dx in float64; index is given for every position."""
    dx = dy.double()
    if dpooled is not None:
        dx = dx + dpooled.double()[:, :, None, None] / dy.shape[2:].numel()
    if dgathered is not None:
        dx = dx.scatter_add(1, spread(index, dy), dgathered.double())
    if y is not None:
        y = y.double()
        if overwritten is not None:
            place = narrow_channels(index, dy.shape[1], overwritten.shape[1], position)
            y = y.scatter(1, spread(place, dy), overwritten.double())
        dx = dx.masked_fill(y <= 0, 0)
    return dx


def gradient_inputs(shape, k, dtype, layout, device):
    n, channels, h, w = shape
    dy, y = (feature_map(shape, dtype, layout, device) for _ in range(2))
    dgathered, overwritten = (feature_map((n, k, h, w), dtype, layout, device) for _ in range(2))
    # Of the size of the other parts once it is divided by H*W.
    dpooled = h * w * torch.randn((n, channels), dtype=accumulation_dtype(dtype), device=device)
    return dy, dpooled, dgathered, random_index(n, channels, k, device), y, overwritten


# dpooled, dgathered, y, overwritten
PARTS = [parts for parts in itertools.product((False, True), repeat=4) if parts[2] or not parts[3]]


def run_gradient(inputs, parts, position):
    """The op with ``parts``, and the formula; index is handed in only where it is read."""
    dy, dpooled, dgathered, index, y, overwritten = inputs
    given = [
        tensor if there else None
        for tensor, there in zip((dpooled, dgathered, y, overwritten), parts, strict=True)
    ]
    reads_index = parts[1] or (parts[3] and position == "original")
    dx = TRITON.ops["input_gradient"](
        dy, given[0], given[1], index if reads_index else None, given[2], given[3], position
    )
    return dx, added_up(dy, given[0], given[1], index, given[2], given[3], position)


@pytest.mark.parametrize("parts", [(True, True, False, False), (True, True, True, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,k", SHAPES)
def test_input_gradient(shape, k, dtype, layout, parts, device):
    inputs = gradient_inputs(shape, k, dtype, layout, device)
    before = [tensor.clone() for tensor in inputs]
    for position in POSITIONS if parts[3] else ("first",):
        dx, expected = run_gradient(inputs, parts, position)
        assert relative_norm(dx, expected) <= VALUES[dtype]
        assert torch.equal(dx == 0, expected == 0)
        assert dx.dtype == dtype and dx.is_contiguous(memory_format=memory_format_of(inputs[0]))
    assert all(same_bits(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 20, 7, 7), (2, 20, 4, 8)])  # a run and tiles
def test_every_part_may_be_left_out(shape, layout, parts, device):
    inputs = gradient_inputs(shape, 3, torch.float16, layout, device)
    for position in POSITIONS:
        dx, expected = run_gradient(inputs, parts, position)
        assert relative_norm(dx, expected) <= VALUES[torch.float16]
        if not any(parts):
            assert same_bits(dx, inputs[0])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 24, 7, 7), (1, 24, 4, 8)])
def test_a_nan_passes_the_mask_and_stays_in_its_channel(shape, layout, device):
    inputs = gradient_inputs(shape, 2, torch.float32, layout, device)
    _, dpooled, dgathered, _, y, overwritten = inputs
    y[0, 5, 0, 0], overwritten[0, 1, 0, 1] = float("nan"), float("nan")
    dpooled[0, 3], dgathered[0, 0, 1, 1] = float("inf"), float("nan")
    dx, expected = run_gradient(inputs, (True, True, True, True), "first")
    assert torch.equal(dx.isnan(), expected.isnan()) and torch.equal(dx.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert relative_norm(dx[finite], expected[finite]) <= VALUES[torch.float32]
    assert dx[0, 5, 0, 0] != 0 and dx[0, 1, 0, 1] != 0


def test_rounded_once(device):
    """In float16 2048 + 1 is 2048: what is added first must not be lost."""
    dy = torch.full((1, 2, 7, 7), 2048.0, dtype=torch.float16, device=device)
    dpooled, dgathered = torch.full((1, 2), 49.0, device=device), torch.ones_like(dy)
    index = torch.tensor([[1, 0]], device=device)
    dx = TRITON.ops["input_gradient"](dy, dpooled, dgathered, index, None, None, "first")
    assert (dx == 2050).all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bad", [6, -1, 2**40])
def test_an_index_out_of_range_is_masked(bad, layout, device):
    """Nothing can be raised without synchronising a GPU: such a j adds nothing, and gets zeros."""
    shape = (1, 6, 3, 3)
    dy, dpooled, dgathered, _, y, overwritten = gradient_inputs(shape, 2, torch.float32, layout, device)
    index, good = torch.tensor([[1, bad]], device=device), torch.tensor([[1]], device=device)
    run = TRITON.ops["input_gradient"]
    dx = run(dy, dpooled, dgathered, index, y, overwritten, "original")
    one = [tensor[:, :1].contiguous() for tensor in (dgathered, overwritten)]
    assert same_bits(dx, run(dy, dpooled, one[0], good, y, one[1], "original"))
    scores = torch.ones((1, 2), device=device)
    dz, dscores = TRITON.ops["fuse_channels_backward"](dy, dgathered, scores, index, "original", True, True)
    assert same_bits(dz[:, 0], dy[:, 1]) and not dz[:, 1].any() and dscores[0, 1] == 0
    outputs, expected = (
        TRITON.ops["select_channels_backward"](
            scores[:, :k], scores[:, :k] / 2, place, torch.ones((1, 3), device=device), dpooled,
            torch.ones((3, 6), device=device), torch.ones((6, 3), device=device), *[True] * 5,
        )
        for k, place in ((2, index), (1, good))
    )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(outputs, expected, strict=True))


# ---- all of them

ORDERS = ("forward", "reversed", "shuffled")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_order_of_programs(layout, program_order, with_tuning, monkeypatch):
    """Several programs for each sample and for each tile of weights; every order, and twice, to the same bits."""
    monkeypatch.setattr(configs_backward, "BACKWARD_UNITS", 8)
    monkeypatch.setattr(configs_backward, "SELECT_BACKWARD_TILE", (16, 16, 16))
    with_tuning(tile=512, plane_channels=16)  # a tuning of its own: nothing that was planned before is found
    fused = fuse_inputs((2, 40, 5, 7), 20, torch.float32, layout, "cpu")
    selected = select_inputs(20, 40, 20, 5, torch.float32, "cpu")
    summed = gradient_inputs((2, 40, 5, 7), 20, torch.float32, layout, "cpu")
    results = []
    for order in (*ORDERS, "forward"):
        with program_order(order):
            results.append(
                (
                    *TRITON.ops["fuse_channels_backward"](*fused, "original", True, True),
                    *TRITON.ops["select_channels_backward"](*selected, *[True] * 5),
                    TRITON.ops["input_gradient"](*summed, "original"),
                )
            )
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    exact = (
        *fuse_gradients(*fused, "original"), *select_gradients(*selected), added_up(*summed, "original")
    )  # fmt: skip
    assert all(relative_norm(a, b) <= VALUES[torch.float32] for a, b in zip(results[0], exact, strict=True))

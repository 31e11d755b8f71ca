"""The CPU engine's backward ops against their formulas in float64. Fresh outputs are NaN-filled before a call."""

import itertools

import pytest
import torch

from mod_kernels._layout import layout_of
from mod_kernels._library import accumulation_dtype
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU

from ..support import LAYOUTS, feature_map
from .cpu_cases import DTYPES, MARKS, SHAPES, bits

pytestmark = MARKS
POSITIONS = ("first", "last", "original")
FUSE, SELECT, INPUT = (
    CPU.ops.get(name) for name in ("fuse_channels_backward", "select_channels_backward", "input_gradient")
)


def spread(index, x):
    """index (N, k) as (N, k, H, W)."""
    return index[:, :, None, None].expand(-1, -1, *x.shape[2:])


def targets(position, index, channels):
    """The channels P of a position, (N, k)."""
    n, k = index.shape
    if position == "original":
        return index
    first = 0 if position == "first" else channels - k
    return torch.arange(first, first + k).expand(n, k)


def laid_out(x, layout):
    return x.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )


def distinct(n, channels, k):
    return torch.rand(n, channels).argsort(1)[:, :k].contiguous()


def within_one_rounding(got, exact):
    """Half a unit in the last place of a 16-bit dtype, and what the float32 sum may be off."""
    return ((got.double() - exact).abs() <= exact.abs() * torch.finfo(got.dtype).eps / 2 + 1e-5).all()


# ---- fuse_channels_backward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_fuse_channels_backward(shape, k, layout, dtype):
    n, c, h, w = shape
    dy, z = feature_map(shape, dtype, layout), feature_map((n, k, h, w), dtype, layout)
    scores, index = torch.rand(n, k, dtype=accumulation_dtype(dtype)), torch.randint(0, c, (n, k))  # with repeats
    for position in POSITIONS:
        at_target = dy.double().gather(1, spread(targets(position, index, c), dy))
        expected_dz = scores.double()[:, :, None, None] * at_target
        given = index if position == "original" else None
        dz, dscores = FUSE(dy, z, scores, given, position, True, True)
        assert (dz.dtype, dscores.dtype) == (dtype, scores.dtype)
        assert (dz.shape, layout_of(dz)) == (z.shape, layout_of(z))
        assert relative_norm(dz, expected_dz) <= VALUES[dtype]
        assert within_one_rounding(dz, expected_dz)
        assert relative_norm(dscores, (at_target * z.double()).sum((2, 3))) <= VALUES[dscores.dtype]
        alone, nothing = FUSE(dy, z, scores, given, position, True, False)
        assert torch.equal(bits(alone), bits(dz))
        assert (nothing.shape, nothing.dtype) == ((0,), scores.dtype)
        nothing, alone = FUSE(dy, z, scores, given, position, False, True)
        assert torch.equal(bits(alone), bits(dscores))
        assert (nothing.shape, nothing.dtype) == ((0,), dtype)
        assert [t.shape for t in FUSE(dy, z, scores, given, position, False, False)] == [(0,), (0,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fuse_channels_backward_of_what_is_not_finite(bad, layout, dtype):
    """Where it belongs and nowhere else."""
    dy, z = feature_map((2, 40, 5, 7), dtype, layout), feature_map((2, 3, 5, 7), dtype, layout)
    scores, index = torch.rand(2, 3, dtype=accumulation_dtype(dtype)) + 0.1, distinct(2, 40, 3)
    dy[0, index[0, 1], 4, 6] = bad  # the last pixel: in the kernels' ends
    z[1, 2, 0, 0] = bad
    dz, dscores = FUSE(dy, z, scores, index, "original", True, True)
    assert (~dz.isfinite()).nonzero().tolist() == [[0, 1, 4, 6]]
    assert (~dscores.isfinite()).nonzero().tolist() == [[0, 1], [1, 2]]
    assert dz[0, 1, 4, 6].isnan() == (bad != bad)


# ---- select_channels_backward

# N, C, R, k: panels of 48 and of fewer columns, rows and depths that are no multiple of a tile's, more than one
# block of a product's depth, dead batches of one and none.
SELECTORS = [
    (3, 70, 4, 9),
    (1, 64, 8, 1),
    (2, 12, 1, 12),
    (13, 160, 21, 100),
    (5, 97, 70, 8),
    (70, 33, 9, 5),
    (3, 2048, 128, 32),
    (0, 64, 4, 4),
]


def selector_case(n, c, r, k, dtype, weight_dtype):
    accumulated = accumulation_dtype(dtype)
    dscores, scores = torch.randn(n, k, dtype=accumulated), torch.rand(n, k, dtype=accumulated)
    hidden, pooled = torch.randn(n, r, dtype=accumulated).relu(), torch.randn(n, c, dtype=accumulated)
    fc1, fc2 = (torch.randn(shape, dtype=torch.float64).to(weight_dtype) for shape in ((r, c), (c, r)))
    return dscores, scores, distinct(n, c, k), hidden, pooled, fc1, fc2


def selector_gradients(dscores, scores, index, hidden, pooled, fc1, fc2):
    dscores, scores, hidden, pooled, fc1, fc2 = (t.double() for t in (dscores, scores, hidden, pooled, fc1, fc2))
    dlogits = torch.zeros_like(pooled).scatter_add(1, index, dscores * scores * (1 - scores))
    dhidden = (dlogits @ fc2).masked_fill(hidden <= 0, 0)
    return dhidden @ fc1, dhidden.t() @ pooled, dlogits.t() @ hidden, dhidden.sum(0), dlogits.sum(0)


@pytest.mark.parametrize("weight_dtype", ["x's", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c", "r", "k"), SELECTORS)
def test_select_channels_backward(n, c, r, k, dtype, weight_dtype):
    arguments = selector_case(n, c, r, k, dtype, torch.float32 if weight_dtype == "float32" else dtype)
    expected = selector_gradients(*arguments)
    got = SELECT(*arguments, *[True] * 5)
    for name, one, exact in zip(("dpooled", "dfc1", "dfc2", "db1", "db2"), got, expected, strict=True):
        assert (one.shape, one.dtype) == (exact.shape, accumulation_dtype(dtype)), name
        assert relative_norm(one, exact) <= VALUES[one.dtype], name
    index = arguments[2]
    untouched = torch.ones(c, dtype=torch.bool).index_fill(0, index.flatten(), False)
    assert (got[2][untouched] == 0).all() and (got[4][untouched] == 0).all()
    for i in range(5):  # each alone
        alone = SELECT(*arguments, *[i == j for j in range(5)])
        assert torch.equal(bits(alone[i]), bits(got[i]))
        assert all(one.shape == (0,) for j, one in enumerate(alone) if j != i)
    assert all(one.shape == (0,) for one in SELECT(*arguments, *[False] * 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_channels_backward_reads_selected_rows_alone(dtype):
    """Other rows of fc2 may be anything; a NaN in hidden lets its gradient pass, as in torch's ReLU."""
    dscores, scores, index, hidden, pooled, fc1, fc2 = selector_case(3, 50, 6, 4, dtype, dtype)
    hidden[0] = torch.tensor([0.0, -0.0, 1.0, 2.0, 0.0, 3.0])
    finite = SELECT(dscores, scores, index, hidden, pooled, fc1, fc2, *[True] * 5)
    unread = torch.ones(50, dtype=torch.bool).index_fill(0, index.flatten(), False)
    fc2[unread] = float("nan")
    again = SELECT(dscores, scores, index, hidden, pooled, fc1, fc2, *[True] * 5)
    assert all(map(torch.equal, map(bits, finite), map(bits, again)))
    hidden[0, 0] = float("nan")
    passed = SELECT(dscores, scores, index, hidden, pooled, fc1, fc2, *[True] * 5)
    changed = finite[3] != passed[3]
    assert passed[3].isfinite().all() and changed.tolist() == [True] + [False] * 5


def test_select_channels_backward_adds_repeated_channels_up():
    arguments = list(selector_case(3, 20, 5, 8, torch.float32, torch.float32))
    arguments[2] = torch.randint(0, 4, (3, 8))
    for one, exact in zip(SELECT(*arguments, *[True] * 5), selector_gradients(*arguments), strict=True):
        assert relative_norm(one, exact) <= VALUES[torch.float32]


# ---- input_gradient


def input_case(shape, k, dtype, layout, position, with_overwritten):
    """Maps and index; y's channels that were overwritten are NaN: nobody may read them."""
    n, c, h, w = shape
    dy, before = feature_map(shape, dtype, layout), feature_map(shape, dtype, layout).relu_()
    index = distinct(n, c, k)
    overwritten = None
    y = before.clone(memory_format=torch.preserve_format)
    if with_overwritten:
        written = targets(position, index, c)
        overwritten = feature_map((n, k, h, w), dtype, layout)
        overwritten.copy_(before.gather(1, spread(written, before)))
        y[torch.ones(n, c, dtype=torch.bool).scatter(1, written, False).logical_not_()] = float("nan")
    dpooled = torch.randn(n, c, dtype=accumulation_dtype(dtype))
    return dy, before, y, overwritten, dpooled, feature_map((n, k, h, w), dtype, layout), index


def exact_input_gradient(dy, dpooled, dgathered, index, before):
    dx = dy.double()
    if dpooled is not None:
        dx = dx + (dpooled.double() / max(1, dy.shape[2] * dy.shape[3]))[:, :, None, None]
    if dgathered is not None:
        dx = dx.scatter_add(1, spread(index, dy), dgathered.double())
    return dx if before is None else dx.masked_fill(before <= 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_input_gradient(shape, k, layout, dtype):
    parts = itertools.product((False, True), (False, True), ("no y", "y", *POSITIONS))
    for with_pooled, with_gathered, mask in parts:
        position = mask if mask in POSITIONS else "first"
        case = input_case(shape, k, dtype, layout, position, mask in POSITIONS)
        dy, before, y, overwritten, dpooled, dgathered, index = case
        dpooled, dgathered = dpooled if with_pooled else None, dgathered if with_gathered else None
        before, y = (None, None) if mask == "no y" else (before, y)
        given = index if with_gathered or position == "original" else None
        dx = INPUT(dy, dpooled, dgathered, given, y, overwritten, position)
        exact = exact_input_gradient(dy, dpooled, dgathered, index, before)
        assert (dx.dtype, dx.shape, layout_of(dx)) == (dtype, dy.shape, layout_of(dy))
        assert dx.is_contiguous() or dx.is_contiguous(memory_format=torch.channels_last)
        assert relative_norm(dx, exact) <= VALUES[dtype]
        assert within_one_rounding(dx, exact)
        assert before is None or (dx[before <= 0] == 0).all()
        if not with_pooled and not with_gathered:  # what is only let through keeps its bits
            kept = torch.ones_like(dy, dtype=torch.bool) if before is None else before > 0
            assert torch.equal(bits(dx)[kept], bits(dy)[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("position", POSITIONS)
def test_input_gradient_adds_repeated_channels_up(position, layout, dtype):
    """No selection repeats a channel, but an index of a caller's own may: one sum, one rounding."""
    dy, before, _, _, dpooled, _, _ = input_case((2, 20, 5, 7), 12, dtype, layout, "first", False)
    index, dgathered = torch.randint(0, 5, (2, 12)), feature_map((2, 12, 5, 7), dtype, layout)
    overwritten = before.gather(1, spread(targets(position, index, 20), before))
    overwritten = laid_out(overwritten, layout)
    for y, stood in ((None, None), (before, None), (before, overwritten)):
        dx = INPUT(dy, dpooled, dgathered, index, y, stood, position)
        exact = exact_input_gradient(dy, dpooled, dgathered, index, y)
        assert relative_norm(dx, exact) <= VALUES[dtype]
        assert within_one_rounding(dx, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_input_gradient_of_what_is_not_finite(layout, dtype):
    """A NaN of the ReLU's output lets its gradient pass; an infinite or NaN gradient stays."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 2.0], dtype=dtype)
    pairs = torch.cartesian_prod(values, values).t()  # dy and y, each with each
    dy, y = (one.repeat(2, 5, 1).reshape(2, 5, 8, 8) for one in pairs)
    dy, y = laid_out(dy, layout), laid_out(y, layout)
    expected = dy.masked_fill(y <= 0, 0)
    for position in POSITIONS:
        index = torch.tensor([[1, 3], [3, 1]])
        written = targets(position, index, 5)
        overwritten, spoilt = laid_out(y.gather(1, spread(written, y)), layout), laid_out(y.clone(), layout)
        spoilt[torch.arange(2)[:, None], written] = 1 - 2 * (spoilt[torch.arange(2)[:, None], written] > 0).to(
            dtype
        )
        for stood, output in ((None, y), (overwritten, spoilt)):
            dx = INPUT(dy, None, None, index, output, stood, position)
            assert torch.equal(dx.isnan(), expected.isnan())
            assert torch.equal(bits(dx)[~dx.isnan()], bits(expected)[~dx.isnan()])


# ---- all


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_same_bits_on_any_number_of_threads(layout):
    """Shapes at which every part of the work is shared out."""
    selector = selector_case(4, 2048, 128, 32, torch.float32, torch.float32)
    dy, _, y, overwritten, dpooled, dgathered, index = input_case(
        (3, 100, 30, 31), 12, torch.float32, layout, "original", True
    )
    big, z = feature_map((3, 64, 28, 28), layout=layout), feature_map((3, 40, 28, 28), layout=layout)
    fuse = big, z, torch.rand(3, 40), torch.randint(0, 64, (3, 40)), "original", True, True
    results = []
    for count in (1, 2, 3):  # the fixture puts the one thread back
        torch.set_num_threads(count)
        dx = INPUT(dy, dpooled, dgathered, index, y, overwritten, "original")
        results.append((dx, *SELECT(*selector, *[True] * 5), *FUSE(*fuse)))
    for other in results[1:]:
        assert all(map(torch.equal, map(bits, results[0]), map(bits, other)))


@pytest.mark.parametrize("wrong", [-1, 64, 2**40])
def test_an_index_out_of_range_is_refused(wrong):
    dy, z, scores = feature_map((2, 64, 3, 3)), feature_map((2, 4, 3, 3)), torch.rand(2, 4)
    selector = list(selector_case(2, 64, 4, 4, torch.float32, torch.float32))
    index = selector[2].clone()
    index[1, 3] = wrong
    selector[2] = index
    message = rf"^index must be between 0 and C-1=63, got {wrong}"
    for call in (
        lambda: FUSE(dy, z, scores, index, "original", True, True),
        lambda: SELECT(*selector, *[True] * 5),
        lambda: INPUT(dy, None, z, index, None, None, "first"),
        lambda: INPUT(dy, None, None, index, dy, z, "original"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    # Where nothing is looked up, index is not read.
    FUSE(dy, z, scores, index, "last", True, True)
    INPUT(dy, None, None, index, dy, z, "last")


def test_what_the_kernels_could_not_read_is_refused():
    dy, z, scores, index = (
        feature_map((2, 64, 3, 3)),
        feature_map((2, 4, 3, 3)),
        torch.rand(2, 4),
        distinct(2, 64, 4),
    )
    last = dy.contiguous(memory_format=torch.channels_last)
    pooled = torch.rand(2, 64)
    for message, call in (
        ("z must have dy's layout", lambda: FUSE(last, z, scores, None, "first", True, True)),
        ("z must have dy's N, H and W", lambda: FUSE(dy, z[:1], scores, None, "first", True, True)),
        (
            r"z must have between 1 and C=4 channels, got 64",
            lambda: FUSE(z, dy, pooled, None, "first", True, True),
        ),
        (r"scores must have shape \(2, 4\)", lambda: FUSE(dy, z, pooled, None, "first", True, True)),
        ("must be dense", lambda: FUSE(dy.sum().expand_as(dy), z, scores, None, "first", True, True)),
        ("position 'original' needs index", lambda: FUSE(dy, z, scores, None, "original", True, True)),
        ("position must be", lambda: INPUT(dy, None, None, None, None, None, "middle")),
        ("y must have dy's layout", lambda: INPUT(dy, None, None, None, last, None, "first")),
        ("y must have dy's channels", lambda: INPUT(dy, None, None, None, z, None, "first")),
        ("must be of one dtype", lambda: INPUT(dy, None, None, None, dy.half(), None, "first")),
        ("overwritten needs y", lambda: INPUT(dy, None, None, None, None, z, "first")),
        ("dgathered needs index", lambda: INPUT(dy, None, z, None, None, None, "first")),
        ("position 'original' needs index", lambda: INPUT(dy, None, None, None, dy, z, "original")),
        (r"index must have shape \(2, 4\)", lambda: INPUT(dy, None, z, index[:, :3], None, None, "first")),
        ("overwritten must have as many", lambda: INPUT(dy, None, z, index, dy, z[:, :2], "original")),
        (r"dpooled must have shape \(2, 64\)", lambda: INPUT(dy, scores, None, None, None, None, "first")),
        ("dpooled must be contiguous", lambda: INPUT(dy, pooled[:, :1].expand(2, 64), *[None] * 4, "first")),
        ("dpooled must be float32", lambda: INPUT(dy, pooled.double(), *[None] * 4, "first")),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    selector = selector_case(2, 64, 4, 4, torch.float32, torch.float32)
    for i in range(7):
        arguments = [*selector, *[True] * 5]
        arguments[i] = arguments[i][:, 1:]
        with pytest.raises(RuntimeError, match=r"must (have shape|be contiguous)"):
            SELECT(*arguments)

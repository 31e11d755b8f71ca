"""The CUDA kernels, compiled for a machine of fibers on this host (tests/cuda_host), by the numerics check.

Calls run in forward, reversed and up to 20 shuffled orders of threads, blocks and clusters, and on used scratch:
all must give the same bits. Each tensor has memory of exactly its size, under AddressSanitizer; outputs and
scratch are NaN before. What that finds in broken kernels: test_cuda_mutants.py.
"""

import itertools

import pytest
import torch

from mod_kernels import reference, verify
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels._verify_inputs import Case
from mod_kernels.bench.shapes import BASIC, BOTTLENECK
from mod_kernels.spec import CONV_KINDS, POSITIONS

from ..support import feature_map, make_spec
from .cuda_host_cases import DTYPES, Ops, Program
from .cuda_host_program import all_cases, need_sanitizers
from .triton.checks import check_block, check_ranking, same_bits

# Of shuffled orders, where others of the same kernel see all.
FEW_SEEDS = 4
SHAPES = [(2, 12, 7, 7), (3, 5, 5, 7), (1, 40, 1, 1), (2, 9, 20, 3)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    need_sanitizers()
    program = Program(all_cases(tmp_path_factory), tmp_path_factory.mktemp("cuda_host") / "log")
    yield program
    program.end()


class Checker(verify._Checker):
    """The rows of ``mod-kernels verify``, its raw ops the machine's."""

    def __init__(self, ops, dtype, layout):
        super().__init__("cuda_host", dtype, layout, "cpu", seed=7)
        self.ops = ops

    def _served(self, op, label, *arguments):
        return self.ops
        yield  # a generator, as that of the base class

    def map_rows(self):
        for number, case in enumerate(verify.cases(True, False, self.layout)):
            inputs = self._begin(case, number)
            yield from self._gather(inputs)
            for i, position in enumerate(case.positions, start=number):  # in place at every other shape
                yield from self._fuse(inputs, position, i % 2 == 0, other_layout=number % 2 == 1)
            for in_place in (False, True):
                yield from self._add_relu_pool(inputs, in_place)

    def block_rows(self, number, case):
        """A selection and two blocks; kinds, positions, in place or not by the number."""
        inputs, kinds = self._begin(case, number), tuple(CONV_KINDS)
        yield from self._select(inputs, given_pooled=number % 4 == 2)
        for i in (number, number + 1):
            yield from self._mod_block(inputs, kinds[i % 5], POSITIONS[i % 3], in_place=i % 2 == 0)


def check(rows):
    rows = list(rows)
    failed = [row for row in rows if not row.ok]
    assert rows and not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize("layout", verify.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps(dtype, layout, program):
    check(Checker(Ops(program, clusters=True).ops, dtype, layout).map_rows())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_in_channels_last_without_clusters(dtype, program):
    """The one op on maps that makes use of clusters."""
    a, b = (feature_map((2, 20, 35, 33), dtype, "channels_last") for _ in range(2))
    y, pooled = Ops(program, False, FEW_SEEDS).ops["add_relu_pool"](a, b, True)
    y_of_clusters, pooled_of_clusters = Ops(program, True, FEW_SEEDS).ops["add_relu_pool"](a, b, True)
    expected, mean = reference.add_relu_pool(a, b)
    assert same_bits(y, expected) and same_bits(y_of_clusters, expected)
    assert relative_norm(pooled, mean) <= VALUES[torch.float32]
    assert relative_norm(pooled_of_clusters, mean) <= VALUES[torch.float32]


def misaligned(x):
    """The same values, one element behind where an allocation begins."""
    wide = torch.empty(x.numel() + 1, dtype=x.dtype)
    return wide[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_that_do_not_begin_at_16_bytes(dtype, layout, program):
    ops = Ops(program, True, FEW_SEEDS).ops
    x, z = feature_map((2, 16, 8, 4), dtype, layout), feature_map((2, 8, 8, 4), dtype, layout)
    odd, index, scores = misaligned(x), torch.stack([torch.randperm(16)[:8] for _ in range(2)]), torch.rand(2, 8)
    assert same_bits(ops["gather_channels"](odd, index), reference.gather_channels(x, index))
    for position in ("first", "original"):
        expected = ops["fuse_channels"](x, z, scores, index, position)
        assert same_bits(ops["fuse_channels"](odd, misaligned(z), scores, index, position), expected)
        y = misaligned(x)
        ops["fuse_channels_"](y, misaligned(z), scores, index, position)
        assert same_bits(y, expected)
    y, pooled = ops["add_relu_pool"](odd, misaligned(x), True)
    expected, expected_pooled = ops["add_relu_pool"](x, x, True)
    assert same_bits(y, expected)
    assert relative_norm(pooled, expected_pooled) <= VALUES[torch.float32]
    dx = ops["input_gradient"](odd, scores.repeat(1, 2), misaligned(z), index, odd, None, "first")
    assert same_bits(dx, ops["input_gradient"](x, scores.repeat(1, 2), z, index, x, None, "first"))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("in_place", [False, True])
def test_fuse_adds_up_repeated_channels(in_place, layout, program):
    """Before the one rounding; and leaves out an index that is no channel."""
    ops = Ops(program, True, FEW_SEEDS).ops
    x = feature_map((2, 6, 5, 7), torch.float16, layout)
    z, scores = feature_map((2, 5, 5, 7), torch.float16, layout), torch.rand(2, 5)
    index = torch.tensor([[4, 2, 4, 2, 4], [0, 5, 5, -1, 6]])
    inside = index.clamp(0, 5)
    expected = reference.fuse_channels(x, z, torch.where(index == inside, scores, 0.0), inside, "original")
    if in_place:
        ops["fuse_channels_"](x, z, scores, index, "original")
    else:
        x = ops["fuse_channels"](x, z, scores, index, "original")
    assert relative_norm(x, expected) <= VALUES[torch.float16]
    assert same_bits(x[0, [0, 1, 3, 5]], expected[0, [0, 1, 3, 5]])


def expected_gradient(dy, dpooled, dgathered, index, y, overwritten, position):
    """The formula of input_gradient (_library.py) in float64."""
    dx = dy.double()
    if dpooled is not None:
        dx = dx + dpooled.double()[:, :, None, None] / (dy.shape[2] * dy.shape[3])
    if dgathered is not None:
        dx = dx.scatter_add(1, index[:, :, None, None].expand(dgathered.shape), dgathered.double())
    if y is None:
        return dx
    if overwritten is not None:
        y, k = y.clone(), overwritten.shape[1]
        if position == "original":
            y.scatter_(1, index[:, :, None, None].expand(overwritten.shape), overwritten)
        else:
            y.narrow(1, 0 if position == "first" else y.shape[1] - k, k).copy_(overwritten)
    return torch.where(y <= 0, 0.0, dx)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradient(dtype, layout, program):
    ops = Ops(program, True, FEW_SEEDS).ops
    parts = itertools.cycle(["first", "last", "original"])
    for n, c, h, w in SHAPES:
        k = (c + 1) // 2
        dy, y = (feature_map((n, c, h, w), dtype, layout) for _ in range(2))
        dgathered, overwritten = (feature_map((n, k, h, w), dtype, layout) for _ in range(2))
        dpooled, index = torch.randn(n, c), torch.stack([torch.randperm(c)[:k] for _ in range(n)])
        y[0, 0, 0, 0] = float("nan")  # lets the gradient through
        for arguments in (
            (dy, dpooled, dgathered, index, None, None, "first"),
            (dy, None, dgathered, index, y, None, "first"),
            (dy, dpooled, dgathered, index, y, overwritten, next(parts)),
            (dy, dpooled, None, index, y, overwritten, "original"),
            (dy, None, None, None, None, None, "first"),
        ):
            dx = ops["input_gradient"](*arguments)
            assert relative_norm(dx, expected_gradient(*arguments)) <= VALUES[dtype]


def test_a_samples_bits_do_not_depend_on_its_batch(program):
    ops = Ops(program, True, FEW_SEEDS).ops
    for layout in ("nchw", "channels_last"):
        x = feature_map((3, 24, 21, 20), torch.bfloat16, layout)
        _, pooled = ops["add_relu_pool"](x, x, True)
        _, alone = ops["add_relu_pool"](x[2:], x[2:], True)
        assert same_bits(alone, pooled[2:])


# ---- blocks: shapes of one sample or few, as a launch is 2 to 50 ms of this host's time, and there are 24

# Of the plan (BlockTuning): small samples are shared out as large ones are.
SHARED_OUT = {
    "max_cluster": 4,
    "stage_bytes": 512,
    "ring_bytes": 1024,
    "lone_ring_bytes": 1024,
    "group_bytes": 1024,
    "least_bytes": 256,
    "one_launch_weights": 100,
    "slice_channels": 16,
}
BLOCKS = [
    Case(1, 64, 14, 7, 4, 8),
    Case(2, 40, 7, 7, 5, 3, bias=True, float32_weights=True),
    Case(1, 32, 5, 7, 32, 4, final_relu=True),
    Case(3, 24, 1, 1, 1, 3, bias=True),
    Case(0, 64, 7, 7, 4, 4),
]


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "no clusters"])
@pytest.mark.parametrize("layout", verify.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block(dtype, layout, clusters, program):
    """Two of the shapes and some kinds; all of these tests together have every kind and shape at each dtype."""
    test = 6 * list(DTYPES).index(dtype) + 2 * verify.LAYOUTS.index(layout) + clusters
    for number in (2 * test, 2 * test + 1):
        device = SHARED_OUT if number % 2 else {}
        checker = Checker(Ops(program, clusters, **device).ops, dtype, layout)
        check(checker.block_rows(2 * number, BLOCKS[number % 5]))


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "no clusters"])
@pytest.mark.parametrize("values", ["tied", "nan"])
def test_selection_that_no_tolerance_can_judge(values, clusters, program):
    """Every hidden unit dead: all logits are equal. A NaN and an infinity in the map."""
    for dtype in DTYPES:
        checker = Checker(Ops(program, clusters, FEW_SEEDS).ops, dtype, "nchw")
        case = Case(2, 64, 3, 3, 4, 8, values=values)
        check(checker._select(checker._begin(case, 1), given_pooled=False))


# What the shapes above leave out: device, x's shape, k, hidden units, dtype, layout, kind, words of the plan.
WAYS = {
    "a cluster of 8": (True, {}, (1, 64, 16, 16), 5, 7, torch.float32, "nchw", "bottleneck", "cluster 8,"),
    "a cluster of 16": (
        True, {"max_cluster": 16}, (1, 64, 16, 17), 3, 7, torch.float32, "channels_last", "conv", "cluster 16,"
    ),
    "a ring of copies that goes round": (
        True, {"max_cluster": 1}, (1, 12, 48, 50), 3, 2, torch.float32, "nchw", "bottleneck", "stages 8"
    ),
    "several blocks a sample": (
        False, {}, (2, 96, 14, 14), 4, 6, torch.float32, "nchw", "bottleneck", "whole 3,"
    ),
    "several blocks a sample, channels_last": (
        False, {}, (2, 192, 14, 14), 4, 6, torch.bfloat16, "channels_last", "basic", "whole 3,"
    ),
    "two launches": (False, {}, (1, 520, 7, 7), 8, 128, torch.float16, "nchw", "bottleneck", "pool 2, rank 3,"),
    "a tail of its own": (
        True, {"max_cluster": 1}, (1, 40, 7, 7), 32, 4, torch.float16, "nchw", "basic", "step"
    ),
    "a tail of its own without clusters": (
        False, {}, (1, 40, 7, 7), 32, 4, torch.float32, "channels_last", "inverted_residual", "step"
    ),
    "a tail in tiles": (
        False, {"multiprocessors": 2}, (1, 24, 15, 15), 20, 4, torch.float16, "nchw", "basic", "step"
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_that_a_block_is_launched(way, program):
    clusters, device, shape, k, hidden, dtype, layout, kind, planned = WAYS[way]
    engine = Ops(program, clusters, FEW_SEEDS, **device)
    x, spec = feature_map(shape, dtype, layout), make_spec(shape[1], k, kind, dtype, hidden=hidden)
    arguments = (*spec.selector_arguments, None, spec.k, *spec.conv_arguments)
    assert planned in engine.plan(x, *arguments)
    y, logits = engine.ops["mod_block"](x, *arguments)
    check_block(x, spec, y, logits)
    written = x.clone()
    assert same_bits(engine.ops["mod_block_"](written, *arguments), logits)
    assert same_bits(written, y)


def test_a_ring_takes_no_more_than_a_block_may_have(program):
    """99 KB on 12.0, where 96 for a ring would leave too little for the rest."""
    device = {"capability": 120, "multiprocessors": 170, "shared_bytes": 99 * 1024}
    x, spec = feature_map((1, 2048, 16, 16), torch.float16), make_spec(2048, 32, dtype=torch.float16)
    arguments = (*spec.selector_arguments, None, spec.k, *spec.conv_arguments)
    assert "stages 5 " in Ops(program, True, **device).plan(x, *arguments)
    assert "stages 6 " in Ops(program, True).plan(x, *arguments)


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "no clusters"])
def test_block_fed_with_means(clusters, program):
    x, spec = feature_map((2, 48, 6, 6), torch.bfloat16), make_spec(48, 5, dtype=torch.bfloat16, bias=True)
    pooled = torch.randn(2, 48)
    for op in ("mod_block", "mod_block_"):
        y = x.clone()
        result = Ops(program, clusters, FEW_SEEDS).ops[op](
            y, *spec.selector_arguments, pooled, 5, *spec.conv_arguments
        )
        check_block(x, spec, *(result if op == "mod_block" else (y, result)), pooled)


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "no clusters"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_block_that_does_not_begin_at_16_bytes(layout, clusters, program):
    x, spec = feature_map((2, 24, 8, 4), torch.float16, layout), make_spec(24, 6, dtype=torch.float16)
    y = misaligned(x)
    logits = Ops(program, clusters, FEW_SEEDS).ops["mod_block_"](
        y, *spec.selector_arguments, None, 6, *spec.conv_arguments
    )
    check_block(x, spec, y, logits)


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "no clusters"])
def test_a_samples_bits_do_not_depend_on_its_batch_in_a_block(clusters, program):
    """Nor on how many blocks share it, where it's the batch that decides how many do."""
    x, spec = feature_map((3, 64, 16, 16), torch.float16), make_spec(64, 5, dtype=torch.float16)
    arguments = (*spec.selector_arguments, None, 5, *spec.conv_arguments)
    y, logits = Ops(program, clusters, FEW_SEEDS, multiprocessors=2).ops["mod_block"](x, *arguments)
    alone, alone_logits = Ops(program, clusters, FEW_SEEDS).ops["mod_block"](x[1:2], *arguments)
    assert same_bits(alone, y[1:2]) and same_bits(alone_logits, logits[1:2])


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "no clusters"])
def test_ties_in_a_block(clusters, program):
    """All logits equal, the lowest channels chosen, which are the ones written; and NaN logits rank first."""
    x, spec = feature_map((1, 36, 5, 5)).abs(), make_spec(36, 7, hidden=2)
    spec.fc1_weight.abs_().neg_()
    ops = Ops(program, clusters, FEW_SEEDS).ops
    y, logits = ops["mod_block"](x, *spec.selector_arguments, None, 7, *spec.conv_arguments)
    assert (logits == 0).all()
    check_block(x, spec, y, logits)
    spec.fc2_weight[[3, 30]] = float("nan")
    scores, index, logits, _, _ = ops["select_channels_saving"](x, *spec.selector_arguments, None, 7)
    assert index[0, :2].tolist() == [3, 30]
    check_ranking(7, scores, index, logits)


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("shape", BOTTLENECK + BASIC, ids=lambda shape: f"{shape.kind}-{shape.name}")
def test_a_block_of_the_papers_resnets_is_one_launch(shape, batch, program):
    """With clusters; without them two at most. float32 in NCHW, and in half precision channels_last."""
    for clusters, most in ((True, 1), (False, 2)):
        for dtype, layout in ((torch.float32, "nchw"), (torch.float16, "channels_last")):
            # A plan reads no values: one sample in memory stands for the batch.
            spec = make_spec(shape.channels, shape.k, shape.kind, dtype)
            x = feature_map((1, shape.channels, shape.height, shape.width), dtype, layout)
            arguments = (*spec.selector_arguments, None, spec.k, *spec.conv_arguments)
            launches = Ops(program, clusters).plan(x.expand(batch, -1, -1, -1), *arguments)
            assert 1 <= launches.count(",") <= most, launches

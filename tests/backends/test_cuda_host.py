"""The CUDA kernels, compiled for a machine of fibers on this host (tests/cuda_host), by the numerics check.

Every call runs in forward, reversed and 20 shuffled orders of threads, blocks and clusters, and on used scratch:
all must give the same bits. Each tensor has memory of exactly its size, under AddressSanitizer; outputs and
scratch are NaN before. What that finds in broken kernels: test_cuda_mutants.py.
"""

import itertools

import pytest
import torch

from mod_kernels import reference, verify
from mod_kernels._tolerances import VALUES, relative_norm

from ..support import feature_map
from .cuda_host_cases import DTYPES, Ops, Program
from .cuda_host_program import cases, need_sanitizers, once
from .triton.checks import same_bits

SHAPES = [(2, 12, 7, 7), (3, 5, 5, 7), (1, 40, 1, 1), (2, 9, 20, 3)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    need_sanitizers()
    folder = once(tmp_path_factory, "cuda_cases", lambda folder: cases(folder, ["maps"]))
    program = Program(folder / "run_cases", tmp_path_factory.mktemp("cuda_host") / "log")
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
            for position, in_place in itertools.product(case.positions, (False, True)):
                yield from self._fuse(inputs, position, in_place, other_layout=number % 2 == 1)
            for in_place in (False, True):
                yield from self._add_relu_pool(inputs, in_place)


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
    y, pooled = Ops(program, clusters=False).ops["add_relu_pool"](a, b, True)
    y_of_clusters, pooled_of_clusters = Ops(program, clusters=True).ops["add_relu_pool"](a, b, True)
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
    ops = Ops(program, clusters=True).ops
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
    ops = Ops(program, clusters=True).ops
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
    ops = Ops(program, clusters=True).ops
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
    ops = Ops(program, clusters=True).ops
    for layout in ("nchw", "channels_last"):
        x = feature_map((3, 24, 21, 20), torch.bfloat16, layout)
        _, pooled = ops["add_relu_pool"](x, x, True)
        _, alone = ops["add_relu_pool"](x[2:], x[2:], True)
        assert same_bits(alone, pooled[2:])

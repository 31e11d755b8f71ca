"""The CPU engine's raw ops against float64, in three stages: logits; selection from the kernel's own logits; the
rest from the kernel's own index and scores. Fresh outputs are NaN-filled before every call."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mod_kernels import _tolerances, reference
from mod_kernels._layout import layout_of
from mod_kernels.backends._engine import Call
from mod_kernels.backends.native import CPU, NATIVE, OPS, isa_levels

from ..support import LAYOUTS, double, feature_map, make_spec

pytestmark = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))

# (N, C, H, W), k: H*W of 49, 1 and 35, C no multiple of 16, k = 1 and C, N = 0, 1, 3, a k above the small limit.
SHAPES = [
    ((1, 256, 56, 56), 4),
    ((2, 96, 14, 14), 6),
    ((3, 2048, 7, 7), 32),
    ((3, 70, 5, 7), 9),
    ((2, 64, 1, 1), 8),
    ((1, 12, 2, 3), 12),
    ((3, 33, 28, 28), 1),
    ((2, 160, 3, 1), 100),
    ((0, 64, 7, 7), 4),
]


@pytest.fixture(autouse=True)
def poison():
    """Every tensor an op allocates is full of NaN (int64: its largest value) before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def selector(spec, pooled=None):
    return spec.fc1_weight, spec.fc2_weight, spec.fc1_bias, spec.fc2_bias, pooled, spec.k


def block(spec, pooled=None):
    return (*selector(spec, pooled), *spec.conv_arguments)


def check_logits(x, spec, logits, pooled=None):
    wide = double(spec)
    expected = reference.selector_logits(
        x.double(), wide.fc1_weight, wide.fc2_weight, wide.fc1_bias, wide.fc2_bias, pooled
    )
    assert _tolerances.relative_to_largest(logits, expected) <= _tolerances.LOGITS[torch.float32]
    return expected


def check_selection(x, spec, index, logits, pooled=None):
    expected = check_logits(x, spec, logits, pooled)
    assert torch.equal(index, reference.rank_channels(logits, spec.k))
    if len(x):
        kth = expected.topk(spec.k, dim=1).values[:, -1:]
        slack = 2 * _tolerances.LOGITS[torch.float32] * expected.abs().amax()
        assert (expected.gather(1, index) >= kth - slack).all()


def check_values(x, y, spec, logits):
    """y from x given the kernel's own logits, which say the index; untouched channels bit for bit."""
    index = reference.rank_channels(logits, spec.k)
    scores = torch.sigmoid(logits.double().gather(1, index))
    z = reference.narrow_conv_block(reference.gather_channels(x.double(), index), double(spec))
    expected = reference.fuse_channels(x.double(), z, scores, index, spec.position)
    assert _tolerances.relative_norm(y, expected) <= _tolerances.VALUES[torch.float32]
    touched = torch.zeros(x.shape[:2], dtype=torch.bool)
    if spec.position == "original":
        touched.scatter_(1, index, True)
    else:
        touched[:, : spec.k] = True
        touched = touched if spec.position == "first" else touched.flip(1)
    assert torch.equal(bits(y)[~touched], bits(x)[~touched])


def bits(x):
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_mod_block(shape, k, kind, layout):
    if kind == "basic" and k > 32:
        pytest.skip("a dense 3x3 over 100 channels tells nothing new and is slow in float64")
    for position, extras in (("first", {}), ("last", {"bias": True}), ("original", {"final_relu": True})):
        spec = make_spec(shape[1], k, kind, position=position, **extras)
        x = feature_map(shape, layout=layout)
        before = x.clone()
        y, logits = CPU.ops["mod_block"](x, *block(spec))
        assert torch.equal(bits(x), bits(before))
        assert (layout_of(y), y.is_contiguous() or layout_of(y) == "channels_last") == (layout_of(x), True)
        check_logits(x, spec, logits)
        check_values(x, y, spec, logits)
        outside = x._base.clone() if x._base is not None else None
        assert torch.equal(CPU.ops["mod_block_"](x, *block(spec)), logits)
        assert torch.equal(bits(x), bits(y))
        if outside is not None and layout.endswith("sliced"):
            assert torch.equal(x._base[1::2], outside[1::2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_select(shape, k, layout):
    for bias in (False, True):
        spec = make_spec(shape[1], k, bias=bias)
        x = feature_map(shape, layout=layout)
        scores, index, logits, hidden, pooled = CPU.ops["select_channels_saving"](x, *selector(spec))
        check_selection(x, spec, index, logits)
        exact = torch.sigmoid(logits.double().gather(1, index))
        assert _tolerances.relative_norm(scores, exact) <= _tolerances.VALUES[torch.float32]
        torch.testing.assert_close(pooled.double(), x.double().mean((2, 3)), rtol=1e-5, atol=1e-6)
        wide = F.relu(F.linear(pooled.double(), spec.fc1_weight.double(), double(spec).fc1_bias))
        assert _tolerances.relative_to_largest(hidden, wide) <= _tolerances.LOGITS[torch.float32]
        # The pooled vector given back: the same answer, and x is not read.
        unread = torch.full_like(x, float("nan")), *selector(spec, pooled)
        given = CPU.ops["select_channels_saving"](*unread)
        assert all(map(torch.equal, given[:4], (scores, index, logits, hidden)))
        assert given[4].shape == (0,)
        # Nothing saved: the same selection.
        for lean in (CPU.ops["select_channels"](x, *selector(spec)), CPU.ops["select_channels"](*unread)):
            assert len(lean) == 2 and all(map(torch.equal, lean, (scores, index)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("z_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_gather_and_fuse(shape, k, z_layout, layout):
    n, c, h, w = shape
    x, z = feature_map(shape, layout=layout), feature_map((n, k, h, w), layout=z_layout)
    scores, index = torch.rand(n, k), torch.randint(0, c, (n, k))  # with repeats
    gathered = CPU.ops["gather_channels"](x, index)
    assert torch.equal(bits(gathered), bits(reference.gather_channels(x, index)))
    for position in ("first", "last", "original"):
        expected = reference.fuse_channels(x.double(), z.double(), scores.double(), index, position)
        y = CPU.ops["fuse_channels"](x, z, scores, index, position)
        assert _tolerances.relative_norm(y, expected) <= _tolerances.VALUES[torch.float32]
        in_place = x.clone() if "sliced" not in layout else feature_map(shape, layout=layout).copy_(x)
        assert layout_of(in_place) == layout_of(x)
        assert CPU.ops["fuse_channels_"](in_place, z, scores, index, position) is None
        assert torch.equal(bits(in_place), bits(y))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "_k"), SHAPES)
def test_add_relu_pool(shape, _k, layout):
    for relu in (False, True):
        for b in (None, feature_map(shape, layout=layout)):
            a = feature_map(shape, layout=layout)
            expected, pooled = reference.add_relu_pool(a.double(), None if b is None else b.double(), relu)
            y, means = CPU.ops["add_relu_pool"](a, b, relu)
            torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(means.double(), pooled, rtol=1e-5, atol=1e-6)
            assert torch.equal(CPU.ops["add_relu_pool_"](a, b, relu), means)
            assert torch.equal(bits(a), bits(y))


def test_ties_and_zeros_go_to_the_lower_channel():
    """Equal logits in every size class of the top-k; a dead hidden layer is all ties.

    Weights of -0.0 are among them, but the kernel's sums start at +0.0: its own logits are never -0.0.
    """
    for channels in (7, 64, 2048):
        for k in {1, 5, min(channels, 40), channels}:
            spec = make_spec(channels, k)
            logits = torch.randint(-2, 3, (3, channels)).float()
            logits[logits == 0] = torch.where(torch.rand(int((logits == 0).sum())) < 0.5, 0.0, -0.0)
            logits[2] = 0.0
            # A hidden layer of three units, one per sample, passes the wanted logits through.
            spec.fc1_weight.resize_(3, channels).zero_()[:, :3] = torch.eye(3)
            pooled = torch.zeros(3, channels)
            pooled[:, :3] = torch.eye(3)
            out = CPU.ops["select_channels_saving"](
                torch.zeros(3, channels, 2, 2), spec.fc1_weight, logits.t().contiguous(), None, None, pooled, k
            )
            assert torch.equal(out[1], reference.rank_channels(out[2], k)), (channels, k)
            assert torch.equal(out[2], logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_not_finite(bad, layout):
    """No index out of range, NaN of either sign first, and the same NaNs in the result as the reference's."""
    for k in (1, 4, 70):
        spec = make_spec(128, k)
        x = feature_map((3, 128, 7, 7), layout=layout)
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


def test_negative_nan_ranks_first():
    logits_weight = torch.linspace(-1, 1, 64)[:, None].contiguous()
    bias = torch.zeros(64)
    bias[20] = float("nan")
    bias[40] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # 0xFFC00000
    assert bias[40].isnan()
    x, one = torch.zeros(1, 64, 1, 1), torch.ones(1, 64)
    for k in (3, 64):
        index = CPU.ops["select_channels"](x, torch.ones(1, 64) / 64, logits_weight, None, bias, one, k)[1]
        assert index[0, :3].tolist() == [20, 40, 63]


@pytest.mark.parametrize("wrong", [-1, 64, 2**40])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_index_out_of_range(wrong, layout):
    x, z = feature_map((2, 64, 3, 3), layout=layout), torch.randn(2, 4, 3, 3)
    before = x.clone()
    index = torch.zeros(2, 4, dtype=torch.int64)
    index[1, 3] = wrong
    message = rf"^index must be between 0 and C-1=63, got {wrong}"
    with pytest.raises(RuntimeError, match=message):
        CPU.ops["gather_channels"](x, index)
    for name in ("fuse_channels", "fuse_channels_"):
        with pytest.raises(RuntimeError, match=message):
            CPU.ops[name](x, z, torch.ones(2, 4), index, "original")
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_a_packed_tensor_of_another_size_is_refused(kind):
    """The kernels read as far into it as kind, k and mid_channels say."""
    x, spec = feature_map((2, 64, 3, 3)), make_spec(64, 8, kind)
    before = x.clone()
    packed, form = spec.conv_arguments
    wrong = [(packed[:-1], form), (torch.cat([packed, packed[:1]]), form)]
    if kind == "bottleneck":  # the other kind's are all k wide
        wrong += [(packed, f"bottleneck:{mid}:linear:first") for mid in (3, 0, 2**31)]
    for parameters, changed in wrong:
        for name in ("mod_block", "mod_block_"):
            with pytest.raises(RuntimeError, match=r"(conv_parameters of a .*|mid_channels) must be"):
                CPU.ops[name](x, *selector(spec), parameters, changed)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("", "form must be kind:mid_channels:relu or linear:position, got ''"),
        ("bottleneck:2:relu", "form must be kind"),
        ("bottleneck:2:relu:first:", "form must be kind"),
        ("inverted:2:relu:first", "kind must be 'bottleneck' or 'basic', got 'inverted'"),
        ("bottleneck::relu:first", "mid_channels must be a whole number, got ''"),
        ("bottleneck:-2:relu:first", "mid_channels must be a whole number, got '-2'"),
        ("bottleneck:2x:relu:first", "mid_channels must be a whole number, got '2x'"),
        (f"bottleneck:{2**64}:relu:first", "mid_channels must be a whole number, got '18446744073709551616'"),
        ("bottleneck:2:True:first", "must be followed by 'relu' or 'linear', got 'True'"),
        ("bottleneck:2:relu:middle", "position must be 'first', 'last' or 'original', got 'middle'"),
    ],
)
def test_a_form_that_says_nothing_is_refused(form, message):
    x, spec = feature_map((2, 64, 3, 3)), make_spec(64, 8)
    before = x.clone()
    for name in ("mod_block", "mod_block_"):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            CPU.ops[name](x, *selector(spec), spec.conv_arguments[0], form)
    assert torch.equal(x, before)


def test_scratch_that_a_larger_call_left_behind():
    """A thread keeps its scratch for scores and index: a wide selection, a narrow one, and a wider one."""
    for k in (100, 3, 160):
        spec = make_spec(160, k, bias=True)
        x = feature_map((3, 160, 2, 2))
        y, logits = CPU.ops["mod_block"](x, *block(spec))
        check_values(x, y, spec, logits)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 200, 28, 28), (3, 70, 35, 35), (9, 512, 7, 7)])
def test_bitwise_whatever_the_threads_and_the_batch(shape, layout):
    spec = make_spec(shape[1], 9)
    x = feature_map(shape, layout=layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(CPU.ops["mod_block"](x, *block(spec)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    alone = [CPU.ops["mod_block"](x[i : i + 1], *block(spec)) for i in range(len(x))]
    assert all(
        torch.equal(together, torch.cat(one))
        for together, one in zip(results[0], zip(*alone, strict=True), strict=True)
    )


def calls(layout):
    """Every op with arguments, for the checks that are the same for all."""
    spec = make_spec(64, 4)
    x, z = feature_map((2, 64, 5, 7), layout=layout), feature_map((2, 4, 5, 7), layout=layout)
    index, scores = torch.randint(0, 64, (2, 4)), torch.rand(2, 4)
    for name in ("select_channels", "select_channels_saving"):
        yield name, (x, *selector(spec))
        yield name, (x, *selector(spec, torch.rand(2, 64)))
    yield "gather_channels", (x, index)
    for name in ("fuse_channels", "fuse_channels_"):
        yield name, (x, z, scores, None, "last")
        yield name, (x, z, scores, index, "original")
    for name in ("add_relu_pool", "add_relu_pool_"):
        yield name, (x, x.clone(), True)
        yield name, (x, None, False)
    for name in ("mod_block", "mod_block_"):
        yield name, (x, *block(spec))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN-filled gaps and all
    for name, arguments in calls(layout):
        torch.library.opcheck(CPU.ops[name], arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_aten_operator_but_allocation(layout):
    torch.use_deterministic_algorithms(False)  # filling is an operator
    for name, arguments in calls(layout):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            CPU.ops[name](*arguments)
        ran = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
        assert ran <= {"aten::empty", "aten::new_empty"}, name
        assert f"mod_kernels_cpu::{name}" in {event.key for event in profile.key_averages()}


def test_outputs_are_poisoned():
    """The fixture works: an op's fresh output passes through the dispatcher's fill."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        CPU.ops["gather_channels"](torch.randn(1, 4, 2, 2), torch.zeros(1, 1, dtype=torch.int64))
    assert "aten::fill_" in {event.key for event in profile.key_averages()}


def test_every_op_is_tested():
    assert {name for name, _ in calls("nchw")} == set(OPS) == set(CPU.ops)


def test_supports_gives_reasons():
    call = Call("mod_block_", "cpu", torch.float32, "nchw", 64, 4, "bottleneck", "first", torch.float32)
    assert CPU.supports(call) == (True, "")
    for change, reason in (
        ({"dtype": torch.float8_e5m2}, "dtype torch.float8_e5m2 is not served"),
        ({"layout": "other"}, "layout other is not served"),
        ({"kind": "inverted"}, "conv block inverted is not served"),
        ({"device": "cuda"}, "device cuda is not served"),
        ({"op": "tail_"}, "tail_ is not served"),
    ):
        ok, why = CPU.supports(call._replace(**change))
        assert not ok
        assert reason in why


@pytest.mark.parametrize("level", isa_levels()[1:])
def test_lower_isa_levels(level):
    """The libraries this machine does not pick, but can run, pass the block and selection tests too."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("already lowered")
    if not (NATIVE / f"libmod_kernels_cpu_{level}.so").exists():
        pytest.skip(f"{level} was not built")
    capability = {"v3": "avx2", "v2": "default"}[level]
    script = f"import mod_kernels.backends.native as n; assert '_{level}.' in n.CPU.library.name, n.CPU.describe()"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    tests = "test_mod_block or test_select or test_ties or finite or nan or threads"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

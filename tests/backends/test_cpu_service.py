"""What holds for every op of the CPU engine: nothing of ATen beside it, refusals, every ISA level."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from mod_kernels.backends._engine import Call
from mod_kernels.backends.native import CPU, NATIVE, OPS, isa_levels
from mod_kernels.spec import CONV_KINDS

from ..support import LAYOUTS, feature_map, make_spec
from .cpu_cases import DTYPES, MARKS, bits, calls, selector

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last_sliced"])
def test_opcheck(layout, dtype):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN-filled gaps and all
    for name, arguments in calls(layout, dtype, dtype):
        torch.library.opcheck(CPU.ops[name], arguments)


@pytest.mark.parametrize("weight_dtype", ["x's", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_aten_operator_but_allocation(layout, dtype, weight_dtype):
    torch.use_deterministic_algorithms(False)  # filling is an operator
    for name, arguments in calls(layout, dtype, torch.float32 if weight_dtype == "float32" else dtype):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            CPU.ops[name](*arguments)
        ran = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
        assert ran <= {"aten::empty", "aten::new_empty"}, name
        assert f"mod_kernels_cpu::{name}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 200, 28, 28), (3, 70, 35, 35), (9, 512, 7, 7)])
def test_bitwise_whatever_the_threads_and_the_batch(shape, layout, dtype):
    """Of every op what it returns and what is in x after it; shapes that are split by stages and by samples."""

    def run(name, arguments):
        x, *rest = arguments
        x = x.clone()
        result = CPU.ops[name](x, *rest)
        return [x, *(tensor for tensor in tree_leaves(result) if tensor is not None)]

    for name, arguments in calls(layout, dtype, dtype, shape, k=9):
        results = []
        for count in (1, 2, 3):  # the fixture puts the one thread back
            torch.set_num_threads(count)
            results.append(run(name, arguments))
        for other in results[1:]:
            assert all(map(torch.equal, map(bits, results[0]), map(bits, other))), name
        if name.startswith("conv_block"):  # its statistics are the batch's
            continue
        alone = []
        for i in range(shape[0]):  # no weight has as many rows as the batch has samples
            of_samples = (isinstance(a, torch.Tensor) and len(a) == shape[0] for a in arguments)
            alone.append(
                run(name, [a[i : i + 1] if of else a for a, of in zip(arguments, of_samples, strict=True)])
            )
        by_sample = [torch.cat(one) for one in zip(*alone, strict=True)]
        if name == "select_channels_backward":  # after dpooled come sums over the batch
            by_sample = by_sample[:2]
        assert all(map(torch.equal, map(bits, results[0]), map(bits, by_sample))), name


def test_outputs_are_poisoned():
    """The fixture works: an op's fresh output passes through the dispatcher's fill."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        CPU.ops["gather_channels"](torch.randn(1, 4, 2, 2), torch.zeros(1, 1, dtype=torch.int64))
    assert "aten::fill_" in {event.key for event in profile.key_averages()}


def test_every_op_is_tested():
    assert {name for name, _ in calls("nchw", torch.float32, torch.float32)} == set(OPS) == set(CPU.ops)


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
    with pytest.raises(RuntimeError, match="index must be int64"):
        CPU.ops["gather_channels"](x, torch.zeros(2, 4, dtype=torch.int32))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_a_packed_tensor_of_another_size_is_refused(kind):
    """The kernels read as far into it as kind, k and mid_channels say."""
    x, spec = feature_map((2, 64, 3, 3)), make_spec(64, 8, kind)
    before = x.clone()
    packed, form = spec.conv_arguments
    wrong = [(packed[:-1], form), (torch.cat([packed, packed[:1]]), form)]
    if kind not in ("basic", "conv"):  # theirs are all k wide
        wrong += [(packed, f"{kind}:{mid}:linear:first") for mid in (3, 0, 2**31)]
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
        (
            "inverted:2:relu:first",
            "kind must be 'bottleneck', 'basic', 'inverted_residual', 'conv' or 'convnext', got 'inverted'",
        ),
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
    """The libraries this machine does not pick, but can run, pass the tests of values in every dtype too."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("already lowered")
    if not (NATIVE / f"libmod_kernels_cpu_{level}.so").exists():
        pytest.skip(f"{level} was not built")
    capability = {"v3": "avx2", "v2": "default"}[level]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    script = f"import mod_kernels.backends.native as n; assert '_{level}.' in n.CPU.library.name, n.CPU.describe()"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    tests = [str(Path(__file__).with_name(f"test_cpu_{what}.py")) for what in ("engine", "parts", "backward")]
    tests.append(str(Path(__file__).parents[1] / "training" / "test_conv_training.py"))
    # A slice is a distance between samples, which no level's code knows of.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", "not sliced"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

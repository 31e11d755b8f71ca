"""The engine around the kernels: what it serves and why not, its ops in torch.library, its launch variants."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from mod_kernels._layout import memory_format_of
from mod_kernels._library import accumulation_dtype
from mod_kernels.backends import Call
from mod_kernels.backends.triton import _BACKWARD, _OPS, TRITON, enumeration, launch

from ...support import feature_map, make_spec
from .checks import same_bits


def run_python(source, **environment):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, "-c", source], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_import_needs_no_triton_and_no_gpu():
    source = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from mod_kernels.backends.triton import TRITON\n"
        "from mod_kernels.backends import Call\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(TRITON.supports(Call('mod_block', 'cuda', torch.float32, 'nchw', 64, 3)).reason)\n"
        "print(TRITON.describe()['status'])\n"
    )
    for line in run_python(source).splitlines():
        assert line.startswith("triton cannot be imported: ")


def test_cpu_tensors_only_in_the_interpreter():
    source = (
        "import torch\n"
        "from mod_kernels.backends.triton import TRITON\n"
        "from mod_kernels.backends import Call\n"
        "print(TRITON.supports(Call('mod_block', 'cpu', torch.float32, 'nchw', 64, 3)))\n"
    )
    refusal = "Triton runs on CPU tensors only under TRITON_INTERPRET=1"
    assert run_python(source) == f"Support(ok=False, reason='{refusal}')\n"
    assert run_python(source, TRITON_INTERPRET="1") == "Support(ok=True, reason='')\n"


CALL = Call("mod_block", "cpu", torch.float16, "nchw", 64, 3, "basic", "first", torch.float32)


@pytest.mark.parametrize(
    "change,word",
    [
        ({}, ""),
        ({"device": "mps"}, "mps"),
        ({"dtype": torch.bfloat16}, ""),
        ({"dtype": torch.int32}, "int32"),
        ({"dtype": torch.float64}, "float64"),
        ({"weight_dtype": torch.float64}, "weights"),
        ({"layout": "channels_last"}, ""),
        ({"layout": "other"}, "other"),
        ({"channels": 8192}, "C=8192"),
        ({"k": 512}, "k=512"),
        ({"kind": "inverted_residual"}, ""),
        ({"kind": "conv", "op": "tail_"}, ""),
        ({"kind": "convnext", "op": "mod_block_", "layout": "channels_last"}, ""),
        ({"kind": "attention"}, "kind 'attention'"),
        ({"op": "add_relu_mod_block_", "dtype": torch.float64}, "float64"),
        ({"op": "add_relu_mod_block_", "k": 512}, "k=512"),
        ({"op": "add_relu_pool"}, ""),
        ({"op": "add_relu_pool_", "dtype": torch.float64, "layout": "channels_last"}, ""),
        ({"op": "gather_channels", "dtype": torch.float64, "layout": "channels_last"}, ""),
        ({"op": "fuse_channels", "dtype": torch.float64, "layout": "channels_last"}, ""),
        ({"op": "fuse_channels", "dtype": torch.int32}, "int32"),
        ({"op": "fuse_channels_", "layout": "other"}, "other"),
        ({"op": "tail_", "dtype": torch.float64}, "float64"),
        ({"op": "select_channels_saving", "channels": 8192}, "C=8192"),
        ({"op": "pool_channels"}, "pool_channels"),
        ({"op": "input_gradient", "dtype": torch.float64, "layout": "channels_last"}, ""),
        ({"op": "fuse_channels_backward", "dtype": torch.float64, "channels": 8192}, ""),
        ({"op": "select_channels_backward", "dtype": torch.float64}, "float64"),
    ],
)
def test_says_what_it_serves(change, word, device):
    answer = TRITON.supports(CALL._replace(**({"device": device} | change)))
    assert answer.ok == (not word) and word in answer.reason and bool(answer.reason) == bool(word)


def raw_calls(device):
    """(op, arguments) of every op."""
    x = feature_map((2, 24, 3, 5), device=device)
    spec = make_spec(24, 4, device=device, bias=True)
    selector = (*spec.selector_arguments, None, 4)
    pooled = (*spec.selector_arguments, torch.randn((2, 24), device=device), 4)
    scores = torch.rand((2, 4), device=device)
    index = torch.stack([torch.randperm(24)[:4] for _ in range(2)]).to(device)
    z = feature_map((2, 4, 3, 5), device=device)
    for name in ("select_channels", "select_channels_saving"):
        yield name, (x, *selector)
        yield name, (x, *pooled)
    yield "gather_channels", (x, index)
    yield "fuse_channels", (x, z, scores, None, "last")
    yield "fuse_channels_", (x, z, scores, index, "original")
    yield "add_relu_pool", (x, x.clone(), True)
    yield "add_relu_pool_", (x, None, True)
    wide, wide_scores = x.double().to(memory_format=torch.channels_last), scores.double()
    yield "gather_channels", (wide, index)
    yield "fuse_channels", (wide, z.double(), wide_scores, index, "original")
    yield "fuse_channels_", (wide, z.double(), wide_scores, None, "first")
    yield "add_relu_pool", (wide, None, True)
    yield "add_relu_pool_", (wide, wide.clone(), True)
    yield "tail_", (x, scores, index, *spec.conv_arguments)
    yield "fuse_channels_backward", (x, z, scores, None, "first", True, True)
    yield "fuse_channels_backward", (wide, z.double(), wide_scores, index, "original", False, True)
    hidden, means = torch.rand((2, spec.fc1_weight.shape[0]), device=device), torch.randn((2, 24), device=device)
    forward = (scores, index, hidden, means, spec.fc1_weight, spec.fc2_weight)
    yield "select_channels_backward", (scores, *forward, True, True, True, True, True)
    yield "select_channels_backward", (scores, *forward, True, False, True, False, False)
    yield "input_gradient", (x, means, z, index, x.clone(), z.clone(), "last")
    yield "input_gradient", (wide, means.double(), None, None, None, None, "first")
    counters = torch.zeros((2,), dtype=torch.int32, device=device)
    yield "mod_block", (x, *selector, *spec.conv_arguments, counters)
    yield "mod_block_", (x, *selector, *spec.conv_arguments, counters)
    pair = (*spec.selector_arguments, 4, *spec.conv_arguments, counters)
    yield "add_relu_mod_block_", (x, x.clone(), True, *pair)
    yield "add_relu_mod_block_", (x, None, False, *pair)


def test_opcheck(device):
    checked = set()
    for name, arguments in raw_calls(device):
        opcheck(getattr(torch.ops.mod_kernels_triton, name).default, arguments)
        checked.add(name)
    assert checked == set(_OPS) == set(TRITON.ops)


def test_compiled_call_is_one_graph(device):
    spec = make_spec(24, 4, device=device)

    def block(x):
        return TRITON.ops["mod_block"](x, *spec.selector_arguments, None, 4, *spec.conv_arguments)

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    x = feature_map((2, 24, 3, 5), device=device)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(compiled(x), block(x), strict=True))
    assert len(graphs) == 1


TORCH_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


SHAPES = [
    enumeration.Shape("bottleneck", 24, 3, 5, 1, 35),
    enumeration.Shape("basic", 6, 2, 2, 2, 1155),
    enumeration.Shape("bottleneck", 300, 70, 5, 1, 35),
    enumeration.Shape("inverted_residual", 24, 3, 5, 30, 35),
    enumeration.Shape("conv", 6, 2, 2, 2, 8400),
    enumeration.Shape("convnext", 24, 3, 5, 20, 1155),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_variants_are_what_the_launcher_launches(channels_last, shape, dtype, device, monkeypatch, with_tuning):
    """No launch outside the enumerated variants, none of them never launched, arguments typed as they say."""
    tuning = with_tuning(one_launch_weights=16384)
    launched = recorded_launches(monkeypatch)
    kind = getattr(torch, dtype)
    spec = make_spec(shape.channels, shape.k, shape.kind, kind, hidden=shape.hidden, device=device)
    for samples in (1, tuning.batch_samples + 1):
        x = torch.zeros((samples, shape.channels, shape.hw // 35, 35), dtype=kind, device=device)
        x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        z = x[:, : shape.k].contiguous(memory_format=memory_format_of(x))
        scores = torch.zeros((samples, shape.k), device=device)
        index = torch.zeros((samples, shape.k), dtype=torch.int64, device=device)
        for pooled in (None, torch.zeros((samples, shape.channels), device=device)):
            for op in ("mod_block", "mod_block_"):
                TRITON.ops[op](x, *spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)
            for op in ("select_channels", "select_channels_saving"):
                TRITON.ops[op](x, *spec.selector_arguments, pooled, spec.k)
        for b, relu in itertools.product((None, x.clone()), (False, True)):
            TRITON.ops["add_relu_mod_block_"](x, b, relu, *spec.selector_arguments, spec.k, *spec.conv_arguments)
        TRITON.ops["tail_"](x, scores, index, *spec.conv_arguments)
        run_plane_ops(x, z, scores, index)
    assert set(launched) == set(enumeration.variants(shape, dtype, channels_last=channels_last, tuning=tuning))
    check_arguments(launched)


@pytest.mark.parametrize("shape", [*SHAPES, enumeration.Shape("basic", 24, 3, 1, 1, 35)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_plane_variants_are_what_the_launcher_launches(dtype, layout, shape, device, monkeypatch):
    launched = recorded_launches(monkeypatch)
    for samples in (1, 3):
        size, kind = (samples, shape.channels, shape.hw // 35, 35), getattr(torch, dtype)
        x = feature_map(size, kind, layout, device)
        z = feature_map((samples, shape.k, *size[2:]), kind, layout, device)
        scores = torch.zeros((samples, shape.k), dtype=accumulation_dtype(kind), device=device)
        run_plane_ops(x, z, scores, torch.zeros((samples, shape.k), dtype=torch.int64, device=device))
    variants = enumeration.plane_variants(shape, dtype, channels_last=layout == "channels_last")
    assert set(launched) == set(variants)
    check_arguments(launched)


@pytest.mark.parametrize("shape", [*SHAPES, enumeration.Shape("basic", 24, 3, 1, 1, 49)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("position", ["first", "original"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_backward_variants_are_what_the_launcher_launches(
    dtype, position, channels_last, shape, device, monkeypatch
):
    launched = recorded_launches(monkeypatch)
    kind = getattr(torch, dtype)
    for samples in (1, 3):
        size = (samples, shape.channels, shape.hw // 7, 7)
        dy = feature_map(size, kind, "channels_last" if channels_last else "nchw", device)
        z = dy[:, : shape.k].contiguous(memory_format=memory_format_of(dy))
        scores = torch.zeros((samples, shape.k), dtype=accumulation_dtype(kind), device=device)
        index = torch.zeros((samples, shape.k), dtype=torch.int64, device=device)
        for needed in ((True, True), (True, False), (False, True)):
            TRITON.ops["fuse_channels_backward"](dy, z, scores, index, position, *needed)
        means = torch.zeros(size[:2], dtype=scores.dtype, device=device)
        for parts in enumeration.INPUT_GRADIENTS:
            given = [
                tensor if there else None
                for tensor, there in zip((means, z, dy, z), vars(parts).values(), strict=True)
            ]
            TRITON.ops["input_gradient"](dy, *given[:2], index, *given[2:], position)
        if dtype != "float64":
            spec = make_spec(shape.channels, shape.k, shape.kind, kind, hidden=shape.hidden, device=device)
            hidden = torch.zeros((samples, shape.hidden), device=device)
            forward = (scores, scores, index, hidden, means, spec.fc1_weight, spec.fc2_weight)
            for biases in (False, True):
                TRITON.ops["select_channels_backward"](*forward, True, True, True, biases, biases)
    enumerated = enumeration.plane_backward_variants if dtype == "float64" else enumeration.backward_variants
    assert set(launched) == set(enumerated(shape, dtype, position, channels_last))
    check_arguments(launched)


def test_launches_of_the_backward(device, monkeypatch):
    """As docs/gpu.md has them."""
    launches = []
    monkeypatch.setattr(launch, "run", lambda variant, *arguments: launches.append(variant.kernel))
    for name, arguments in raw_calls(device):
        if name in _BACKWARD:
            before = len(launches)
            TRITON.ops[name](*arguments)
            assert len(launches) - before == (2 if name == "select_channels_backward" else 1)
    assert launches


def recorded_launches(monkeypatch):
    """From now on launches run nothing: their arguments by their variants."""
    launched = {}

    def record(variant, programs, *arguments):
        launched[variant] = arguments

    monkeypatch.setattr(launch, "run", record)
    return launched


def run_plane_ops(x, z, scores, index):
    for b in (None, x.clone()):
        for relu in (False, True):
            TRITON.ops["add_relu_pool"](x, b, relu)
            TRITON.ops["add_relu_pool_"](x, b, relu)
    TRITON.ops["gather_channels"](x, index)
    TRITON.ops["fuse_channels"](x, z, scores, index, "first")
    TRITON.ops["fuse_channels_"](x, z, scores, None, "first")


def check_arguments(launched):
    """Named, ordered and typed as the kernels and the variants have them."""
    for variant, arguments in launched.items():
        names = launch.kernels()[variant.kernel].arg_names
        assert [*dict(variant.signature), *dict(variant.constexprs)] == [
            *names[: len(arguments)],
            *dict(variant.constexprs),
        ]
        assert {*dict(variant.constexprs)} == {*names[len(arguments) :]}
        for (name, kind), argument in zip(variant.signature, arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                assert kind == TORCH_TYPES[argument.dtype], name
            else:
                assert -(2**31) <= argument < 2 ** (63 if kind == "i64" else 31), name

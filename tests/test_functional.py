"""What the public ops refuse, and with which words; layouts and edge sizes; who serves a call."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mod_kernels import MoDSpec, backends, explain, functional, reference, use_backend
from mod_kernels.spec import CONV_KINDS, POSITIONS, read_form, unpacked, written_form

from .support import LAYOUTS, feature_map, make_spec, selector_of

N, C, H, W, K, R = 2, 16, 5, 3, 4, 6


def arguments(op):
    """Good arguments for an op, as keywords, for a test to spoil one of them."""
    x = feature_map((N, C, H, W))
    if op == "select_channels":
        return {"x": x, **selector_of(make_spec(C, K, hidden=R, bias=True)), "pooled": None}
    if op == "gather_channels":
        return {"x": x, "index": torch.tensor([[3, 0], [1, 15]])}
    if op.startswith("fuse_channels"):
        index = torch.tensor([[3, 0], [1, 15]])
        return {
            "x": x,
            "z": torch.randn(N, 2, H, W),
            "scores": torch.rand(N, 2),
            "index": index,
            "position": "first",
        }
    if op.startswith("add_relu_pool"):
        return {"a": x, "b": feature_map((N, C, H, W)), "relu": True}
    return {"x": x, "spec": make_spec(C, K, hidden=R), "pooled": None}


SELECT, GATHER, FUSE, ENDING, BLOCK = (
    "select_channels",
    "gather_channels",
    "fuse_channels",
    "add_relu_pool",
    "mod_block",
)
f64 = torch.float64

# op, the argument spoilt, its value, the error, what its message must say: the argument, the rule, what was got.
BAD = [
    (SELECT, "x", [1.0], TypeError, "x must be a tensor, got list"),
    (SELECT, "x", torch.randn(C, H, W), ValueError, "x must have 4 dimensions (N, C, H, W), got shape (16, 5, 3)"),
    (SELECT, "x", torch.ones(N, C, H, W, dtype=torch.int32), TypeError, "x must be float16, .* got torch.int32"),
    (SELECT, "x", torch.ones(N, C, H, W, dtype=torch.complex64), TypeError, "x must be float16, .* got torch.complex64"),
    (SELECT, "x", torch.randn(N, C, 0, W), ValueError, "x must have at least one channel, row and column"),
    (SELECT, "k", 0, ValueError, "k must be between 1 and C=16, got k=0"),
    (SELECT, "k", 17, ValueError, "k must be between 1 and C=16, got k=17"),
    (SELECT, "k", 2.0, TypeError, "k must be an int, got float"),
    (SELECT, "k", True, TypeError, "k must be an int, got bool"),
    (SELECT, "fc1_weight", torch.randn(R, 15), ValueError, "fc1_weight must be (R, C) with C=16, got shape (6, 15)"),
    (SELECT, "fc1_weight", torch.randn(0, C), ValueError, "fc1_weight must be (R, C) with R >= 1, got R=0"),
    (SELECT, "fc1_weight", None, TypeError, "fc1_weight must be a tensor, got NoneType"),
    (SELECT, "fc2_weight", torch.randn(R, C), ValueError, "fc2_weight must have shape (16, 6), got (6, 16)"),
    (SELECT, "fc1_bias", torch.randn(R, 1), ValueError, "fc1_bias must have shape (6,), got (6, 1)"),
    (SELECT, "fc2_bias", torch.randn(R), ValueError, "fc2_bias must have shape (16,), got (6,)"),
    (SELECT, "fc1_weight", torch.randn(R, C, dtype=f64), TypeError, "fc1_weight must be of x's dtype torch.float32"),
    (SELECT, "fc2_bias", torch.ones(C, dtype=torch.int64), TypeError, "fc2_bias must be of x's dtype torch.float32"),
    (SELECT, "fc2_weight", torch.randn(C, R, device="meta"), ValueError, "fc2_weight must be on x's device cpu, got meta"),
    (SELECT, "pooled", torch.randn(N, C, 1), ValueError, "pooled must have shape (2, 16), got (2, 16, 1)"),
    (SELECT, "pooled", torch.randn(N, C, dtype=f64), TypeError, "pooled must be torch.float32, got torch.float64"),
    (SELECT, "pooled", torch.randn(N, C, device="meta"), ValueError, "pooled must be on x's device cpu, got meta"),
    (GATHER, "index", torch.zeros(N, 17, dtype=torch.int64), ValueError, "index must be (N, k) with N=2 and 1 <= k <= C=16"),
    (GATHER, "index", torch.zeros(3, 2, dtype=torch.int64), ValueError, "index must be (N, k) with N=2"),
    (GATHER, "index", torch.zeros(N, 2, dtype=torch.int32), TypeError, "index must be torch.int64, got torch.int32"),
    (GATHER, "index", torch.zeros(N, 2, dtype=torch.int64, device="meta"), ValueError, "index must be on x's device cpu"),
    (GATHER, "index", torch.tensor([[0, 16], [0, 0]]), RuntimeError, "index must be between 0 and C-1=15, got 16"),
    (GATHER, "index", torch.tensor([[0, 0], [-1, 0]]), RuntimeError, "index must be between 0 and C-1=15, got -1"),
    (FUSE, "z", torch.randn(N, 2, H, W + 1), ValueError, "z must be (N=2, k, H=5, W=3) with 1 <= k <= C=16"),
    (FUSE, "z", torch.randn(N, 17, H, W), ValueError, "z must be (N=2, k, H=5, W=3) with 1 <= k <= C=16"),
    (FUSE, "z", torch.randn(N, 2, H, W, dtype=f64), TypeError, "z must be torch.float32, got torch.float64"),
    (FUSE, "scores", torch.rand(N, 3), ValueError, "scores must have shape (2, 2), got (2, 3)"),
    (FUSE, "scores", torch.rand(N, 2).half(), TypeError, "scores must be torch.float32, got torch.float16"),
    (FUSE, "position", "middle", ValueError, "position must be one of 'first', 'last', 'original', got 'middle'"),
    (FUSE, "index", torch.zeros(N, 3, dtype=torch.int64), ValueError, "index must have the shape of scores (2, 2), got (2, 3)"),
    (ENDING, "b", torch.randn(N, C, H, 1), ValueError, "b must have shape (2, 16, 5, 3), got (2, 16, 5, 1)"),
    (ENDING, "b", torch.randn(N, C, H, W).half(), TypeError, "b must be torch.float32, got torch.float16"),
    (BLOCK, "x", torch.randn(N, 8, H, W), ValueError, "x must have the spec's C=16 channels, got shape (2, 8, 5, 3)"),
    (BLOCK, "x", torch.ones(N, C, H, W, dtype=torch.int8), TypeError, "x must be float16"),
    (BLOCK, "x", torch.randn(N, C, H, W, device="meta"), ValueError, "spec's tensors must be on x's device meta, got cpu"),
    (BLOCK, "spec", None, TypeError, "spec must be a MoDSpec, got NoneType"),
    (BLOCK, "spec", make_spec(C, K, dtype=torch.float16), TypeError, "spec's tensors must be of x's dtype torch.float32 or float32"),
    (BLOCK, "pooled", torch.randn(N, C).half(), TypeError, "pooled must be torch.float32, got torch.float16"),
]  # fmt: skip


def _id(case):
    return f"{case[0]}-{case[1]}-{case[4][:40]}"


@pytest.mark.parametrize("case", BAD, ids=_id)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_is_refused_before_anything_is_written(case, backend):
    op, name, value, error, message = case
    pattern = ".*".join(map(re.escape, message.split(" .* ")))
    for variant in (op, op + "_"):
        if not hasattr(functional, variant):
            continue
        good = arguments(variant)
        before = {key: t.clone() for key, t in good.items() if isinstance(t, torch.Tensor)}
        with use_backend(backend), pytest.raises(error, match=pattern):
            getattr(functional, variant)(**{**good, name: value})
        for key, t in before.items():
            assert torch.equal(good[key], t), f"{variant} wrote into {key}"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", ["fuse_channels", "fuse_channels_"])
@pytest.mark.parametrize("bad", [16, -1, 2**62])
def test_index_out_of_range_in_fuse(op, backend, bad):
    good = arguments(op) | {"position": "original"}
    before = good["x"].clone()
    good["index"][1, 1] = bad
    with (
        use_backend(backend),
        pytest.raises(RuntimeError, match=f"^index must be between 0 and C-1=15, got {bad}"),
    ):
        getattr(functional, op)(**good)
    assert torch.equal(good["x"], before)


def test_original_position_needs_an_index():
    with pytest.raises(ValueError, match="index must be given where position is 'original', got None"):
        functional.fuse_channels(**(arguments("fuse_channels") | {"index": None, "position": "original"}))


BAD_SPEC = [
    ("k", 17, ValueError, "k must be between 1 and C=16, got k=17"),
    ("kind", "dense", ValueError, "kind must be one of 'bottleneck', 'basic', 'inverted_residual', 'conv', 'convnext'"),
    ("position", "end", ValueError, "position must be one of"),
    ("fc1_weight", torch.randn(R), ValueError, "fc1_weight must be (R, C), got shape (6,)"),
    ("fc2_weight", torch.randn(C, R + 1), ValueError, "fc2_weight must have shape (16, 6), got (16, 7)"),
    ("conv_weights", [torch.randn(1, 4, 1, 1)], ValueError, "conv_weights of a 'bottleneck' must be 3 tensors, got 1"),
    ("conv_weights", [], ValueError, "conv_weights must not be empty"),
    ("conv_weights", [None] * 3, TypeError, "conv_weights[0] must be a tensor, got NoneType"),
    ("conv_biases", [torch.randn(2)] * 3, ValueError, "conv_biases[0] must have shape (1,), got (2,)"),
    ("fc1_weight", torch.ones(R, C, dtype=torch.int64), TypeError, "spec's tensors must be float16"),
    ("fc2_weight", torch.randn(C, R, device="meta"), ValueError, "spec's tensors must all be on one device"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_SPEC, ids=lambda case: f"{case[0]}-{case[3][:40]}")
def test_bad_spec(case):
    name, value, error, message = case
    with pytest.raises(error, match=re.escape(message)):
        replace(make_spec(C, K, hidden=R), **{name: value})


IN_PLACE = ["fuse_channels_", "add_relu_pool_", "mod_block_"]


def destination(op):
    return "a" if op == "add_relu_pool_" else "x"


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.expand(N, -1, -1, -1),
        lambda x: x.new_zeros(N, C, H, 2 * W)[..., ::2],
        lambda x: x.new_zeros(N, 2 * C, H, W)[:, ::2],
        lambda x: x.new_zeros(N, C, W, H).transpose(2, 3),
        lambda x: x.new_zeros(N, H, C, W).transpose(1, 2),
        lambda x: x.new_zeros(C * H * W + 1).as_strided((N, C, H, W), (1, H * W, W, 1)),
    ],
    ids=["expanded", "every second column", "channel-sliced", "transposed", "NHCW", "overlapping"],
)
def test_in_place_refuses_what_is_not_dense(op, spoil):
    good = arguments(op)
    x = spoil(torch.zeros(1, C, H, W))
    before = x.clone()
    with pytest.raises(ValueError, match=r"must be dense to be written into .* strides"):
        getattr(functional, op)(**{**good, destination(op): x})
    assert torch.equal(x, before)


@pytest.mark.parametrize("op", IN_PLACE[:2])
def test_in_place_refuses_a_leaf_that_requires_grad(op):
    good = arguments(op)
    x = good[destination(op)].requires_grad_()
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="is a leaf that requires grad: it can't be written into"):
        getattr(functional, op)(**good)
    assert torch.equal(x, before)
    with torch.no_grad():
        getattr(functional, op)(**good)
    assert not torch.equal(x, before)


def test_in_place_refuses_a_z_that_shares_memory():
    x = feature_map((N, C, H, W))
    with pytest.raises(ValueError, match="z must not share memory with x"):
        functional.fuse_channels_(x, x[:, 4:6], torch.rand(N, 2))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_in_place_an_addend_is_the_map_itself_or_apart_from_it(backend):
    """Sample n of one that begins a sample later is sample n + 1 of a, which may have been written by then."""
    storage = feature_map((N + 1, C, H, W))
    before = storage.clone()
    with use_backend(backend):
        for a, b in ((storage[:-1], storage[1:]), (storage[1:], storage[:-1])):
            with pytest.raises(ValueError, match="b must not share memory with a"):
                functional.add_relu_pool_(a, b)
        assert torch.equal(storage, before)
        y, _ = functional.add_relu_pool_(storage[1:], storage[1:])
        assert torch.equal(y, (2 * before[1:]).relu())


@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
@pytest.mark.parametrize("which", ["x", "spec", "pooled"])
def test_block_refuses_gradients(op, which):
    x, spec, pooled = feature_map((N, C, H, W)), make_spec(C, K), torch.randn(N, C)
    {"x": x, "spec": spec.conv_weights[1], "pooled": pooled}[which].requires_grad_()
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match=f"{op} has no gradients: run it under torch.no_grad"):
        getattr(functional, op)(x, spec, pooled)
    assert torch.equal(x, before)
    with torch.no_grad():
        getattr(functional, op)(x, spec, pooled)


def test_odd_layouts_are_copied_out_of_place_and_explained():
    x, spec = feature_map((N, C, H, W)), make_spec(C, K)
    odd = torch.zeros(N, C, H, 2 * W)[..., ::2].copy_(x)
    assert torch.equal(functional.mod_block(odd, spec), functional.mod_block(x, spec))
    selected = [
        functional.select_channels(one, spec.fc1_weight, spec.fc2_weight, spec.k, pooled=x.mean((2, 3)))
        for one in (odd, x)
    ]
    assert all(map(torch.equal, *selected))
    assert "its layout is neither" in explain("mod_block", odd, spec).copies
    for layout in LAYOUTS:
        assert explain("mod_block", feature_map((N, C, H, W), layout=layout), spec).copies == ""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["gather_channels", "fuse_channels", "add_relu_pool", "mod_block"])
def test_outputs_keep_the_layout(op, layout):
    good = arguments(op)
    name = "a" if op == "add_relu_pool" else "x"
    out = getattr(functional, op)(**{**good, name: feature_map((N, C, H, W), layout=layout)})
    out = out[0] if isinstance(out, tuple) else out
    last = layout.startswith("channels_last")
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("poison", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["everything", "one element"])
def test_nan_and_inf_never_index_out_of_range(poison, where):
    x = feature_map((N, C, H, W))
    x[...] = float(poison) if where == "everything" else x
    x[0, 3, 1, 1] = float(poison)
    for k in (1, K, C):
        _, index = functional.select_channels(x, **selector_of(make_spec(C, K)) | {"k": k})
        assert ((index >= 0) & (index < C)).all()
        assert all(len(set(row)) == k for row in index.tolist())
    functional.mod_block(x, make_spec(C, K))


@pytest.mark.parametrize("shape,k", [((0, C, H, W), 4), ((2, C, 1, 1), 1), ((1, 5, 7, 7), 5), ((3, 1, 1, 1), 1)])
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_edge_sizes(shape, k, kind):
    x, spec = feature_map(shape), make_spec(shape[1], k, kind)
    y = functional.mod_block(x, spec)
    assert torch.allclose(y, reference.mod_block(x, spec), rtol=1e-5, atol=1e-5)
    assert torch.equal(functional.mod_block_(x, spec), y)


# ---- who serves


def test_version_counter_moves_with_every_in_place_op():
    for op in IN_PLACE:
        good = arguments(op)
        x = good[destination(op)]
        version = x._version
        getattr(functional, op)(**good)
        assert x._version > version, op


def test_in_place_works_on_inference_tensors():
    with torch.inference_mode():
        x, spec = feature_map((N, C, H, W)), make_spec(C, K)
        expected = reference.mod_block(x, spec)
        assert torch.allclose(functional.mod_block_(x, spec), expected, rtol=1e-5, atol=1e-5)


def test_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match=r"backend must be one of 'auto', 'reference', .* got 'tpu'"),
        use_backend("tpu"),
    ):
        pass


def test_a_named_backend_that_cannot_serve_raises_with_the_reason():
    x = feature_map((N, C, H, W), torch.float64)  # which Triton's engine has nowhere
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"backend 'triton' can't serve gather_channels: ."),
    ):
        functional.gather_channels(x, torch.zeros(N, 2, dtype=torch.int64))
    with use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' can't serve .* run on cuda, not on cpu"):
        functional.gather_channels(x.float(), torch.zeros(N, 2, dtype=torch.int64))


def test_use_backend_nests_and_restores():
    x, spec = feature_map((N, C, H, W)), make_spec(C, K)

    def served():
        return explain(functional.mod_block, x, spec).backend

    outside = served()
    with use_backend("reference"):
        assert served() == "reference"
        with use_backend("cpu"):
            assert served() == "cpu"
        assert served() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert served() == outside == "cpu"


def test_explain_gives_a_reason_for_every_other_backend():
    x = feature_map((N, C, H, W), torch.bfloat16)
    answer = explain("gather_channels", x, torch.zeros(N, 2, dtype=torch.int64))
    assert answer.backend == "cpu"
    assert set(answer.reasons) == {"reference", "triton", "cuda"} and all(answer.reasons.values())
    assert "served by cpu" in str(answer)
    with pytest.raises(ValueError, match=r"op must be one of select_channels, .* got 'softmax'"):
        explain("softmax", x)
    with pytest.raises(ValueError, match="k must be between"):
        explain("select_channels", x, torch.randn(2, C), torch.randn(C, 2), 0)


@pytest.mark.parametrize("name,expected", [("reference", "reference"), ("cpu", "cpu"), ("tpu", "ValueError")])
def test_environment_names_the_backend(name, expected):
    code = """
import torch, mod_kernels
x, index = torch.randn(1, 4, 2, 2), torch.zeros(1, 1, dtype=torch.int64)
try:
    print(mod_kernels.explain("gather_channels", x, index).backend)
except ValueError as error:
    print("ValueError", error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MOD_KERNELS_BACKEND": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(expected)
    if expected == "ValueError":
        assert "MOD_KERNELS_BACKEND must be one of" in result.stdout and "'tpu'" in result.stdout


def test_import_needs_neither_triton_nor_a_gpu_nor_torchvision():
    code = """
import sys, torch
before = set(sys.modules)
import mod_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "torchvision", "typer", "rich", "matplotlib"}, new
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_spec_is_dense_oihw_whatever_the_model_was():
    spec = make_spec(C, 8)
    weights = [w.to(memory_format=torch.channels_last) for w in spec.conv_weights]
    assert all(w.is_contiguous() for w in replace(spec, conv_weights=weights).conv_weights)
    assert isinstance(replace(spec, conv_weights=weights), MoDSpec)


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("dtype,packed_dtype", [(torch.float16, torch.float32), (f64, f64)])
def test_spec_packs_its_convolutions(kind, dtype, packed_dtype):
    spec = make_spec(C, 8, kind, dtype=dtype)
    packed, form = spec.conv_arguments
    assert packed.dtype == packed_dtype and packed.is_contiguous()
    assert form == {"bottleneck": "bottleneck:2:linear:first", "basic": "basic:8:linear:first"}[kind]
    weights, biases = unpacked(packed, form, 8)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(weights, spec.conv_weights, strict=True))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(biases, spec.conv_biases, strict=True))


@pytest.mark.parametrize("final_relu", [False, True])
def test_a_form_reads_as_it_was_written(final_relu):
    for kind, position in itertools.product(CONV_KINDS, POSITIONS):
        assert read_form(written_form(kind, 12, final_relu, position)) == (kind, 12, final_relu, position)
    assert written_form("bottleneck", 8, True, "first") == "bottleneck:8:relu:first"


@pytest.mark.parametrize(
    "form,message",
    [
        ("", "form must be kind:mid_channels:relu or linear:position, got ''"),
        ("bottleneck:8:relu", "form must be kind"),
        ("bottleneck:8:relu:first:", "form must be kind"),
        (
            "inverted:8:relu:first",
            "kind must be one of bottleneck, basic, inverted_residual, conv, convnext, got 'inverted'",
        ),
        ("bottleneck:-8:relu:first", "mid_channels must be a whole number, got '-8'"),
        ("bottleneck::relu:first", "mid_channels must be a whole number, got ''"),
        ("bottleneck:8:True:first", "must be followed by 'relu' or 'linear', got 'True'"),
        ("bottleneck:8:relu:middle", "position must be one of first, last, original, got 'middle'"),
    ],
)
def test_another_form_is_refused(form, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_form(form)


def test_backends_are_listed():
    assert backends.BACKENDS == ("auto", "reference", "cpu", "triton", "cuda")

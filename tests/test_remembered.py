"""A repeated call skips its checks; one that differs in anything they look at does not."""

import gc
import re
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mod_kernels import _checks, _remembered, backends, functional, reference, use_backend

from .export.test_portable import Ops
from .support import LAYOUTS, feature_map, make_spec, relative_error
from .test_functional import BAD, IN_PLACE, C, H, K, N, W, arguments, destination

OUT_OF_PLACE = ["select_channels", "gather_channels", "fuse_channels", "add_relu_pool", "mod_block"]

pytestmark = pytest.mark.skipif(not backends.native.CPU.ops, reason="; ".join(backends.native.CPU.problems))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(_remembered, "_passed", {})


@pytest.fixture
def checked(monkeypatch):
    """Names of the feature maps that were checked."""
    seen = []
    check = _checks.feature_map
    monkeypatch.setattr(_checks, "feature_map", lambda name, x: (seen.append(name), check(name, x)))
    return seen


def copied(kwargs):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}


def tensors_of(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OUT_OF_PLACE + IN_PLACE)
def test_a_repeated_call_is_not_checked_again_and_gives_the_same(op, layout, checked):
    good = arguments(op)
    first, second = feature_map((N, C, H, W), layout=layout), feature_map((N, C, H, W), layout=layout)
    second.copy_(first)
    name = "x"
    if op.startswith("add_relu_pool"):
        name, good["b"] = "a", feature_map((N, C, H, W), layout=layout)
    run = getattr(functional, op)
    expected = tensors_of(run(**good | {name: first}))
    assert len(checked) == 1
    got = tensors_of(run(**good | {name: second}))
    assert len(checked) == 1
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]}-{case[1]}-{case[4][:40]}")
def test_what_is_refused_is_refused_after_a_call_that_passed(case):
    op, name, value, error, message = case
    pattern = ".*".join(map(re.escape, message.split(" .* ")))
    for variant in (op, op + "_"):
        if hasattr(functional, variant):
            good = arguments(variant)
            for _ in range(2):
                getattr(functional, variant)(**copied(good))
            with pytest.raises(error, match=pattern):
                getattr(functional, variant)(**{**good, name: value})


def test_a_bool_is_not_the_int_it_equals():
    good = arguments("select_channels") | {"k": 1}
    functional.select_channels(**good)
    with pytest.raises(TypeError, match="k must be an int, got bool"):
        functional.select_channels(**good | {"k": True})


@pytest.mark.parametrize("op", IN_PLACE)
def test_what_may_not_be_written_is_refused_after_a_call_that_passed(op):
    good = arguments(op)
    getattr(functional, op)(**copied(good))
    odd = good[destination(op)].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="must be dense to be written into"):
        getattr(functional, op)(**good | {destination(op): odd})
    leaf = good[destination(op)].clone().requires_grad_()
    message = "has no gradients" if op == "mod_block_" else "is a leaf that requires grad"
    with pytest.raises(RuntimeError, match=message):
        getattr(functional, op)(**good | {destination(op): leaf})


def test_shared_memory_is_looked_for_every_time():
    x, scores = feature_map((N, C, H, W)), torch.rand(N, 2)
    base = feature_map((N, C, H, W))
    functional.fuse_channels_(x, base[:, 4:6], scores)
    functional.fuse_channels_(x, base[:, 4:6], scores)
    with pytest.raises(ValueError, match="z must not share memory with x"):
        functional.fuse_channels_(x, x[:, 4:6], scores)
    whole = feature_map((N + 1, C, H, W))
    for _ in range(2):
        functional.add_relu_pool_(whole[1:], whole[1:].clone())
    with pytest.raises(ValueError, match="b must not share memory with a"):
        functional.add_relu_pool_(whole[1:], whole[:-1])


def test_gradients_are_looked_at_every_time():
    good = arguments("fuse_channels")
    functional.fuse_channels(**good)
    assert functional.fuse_channels(**good | {"z": good["z"].requires_grad_()}).requires_grad
    x, spec = feature_map((N, C, H, W)), make_spec(C, K)
    functional.mod_block(x, spec)
    spec.conv_biases[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradients"):
        functional.mod_block(x, spec)
    with torch.no_grad():
        functional.mod_block(x, spec)


def test_the_version_counter_moves_in_a_repeated_call():
    for op in IN_PLACE:
        good = arguments(op)
        versions = [
            getattr(functional, op)(**good) is not None and good[destination(op)]._version for _ in range(3)
        ]
        assert versions[0] < versions[1] < versions[2], op


def test_a_narrower_z_is_cast_after_a_call_that_passed():
    good = arguments("fuse_channels")
    expected = functional.fuse_channels(**good)
    low = good["z"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert relative_error(functional.fuse_channels(**good | {"z": low}), expected) < 1e-2
    with pytest.raises(TypeError, match=r"z must be torch\.float32, got torch\.bfloat16"):
        functional.fuse_channels(**good | {"z": low})


def test_another_backend_is_another_call(monkeypatch):
    good = arguments("gather_channels")
    functional.gather_channels(**good)
    assert len(_remembered._passed) == 1
    monkeypatch.setattr(reference, "gather_channels", lambda x, index: "the reference's")
    with use_backend("reference"):
        assert functional.gather_channels(**good) == "the reference's"
    assert functional.gather_channels(**good) != "the reference's"


def test_what_is_copied_first_is_not_remembered():
    x, spec = feature_map((N, C, H, W)), make_spec(C, K)
    odd = torch.zeros(N, C, H, 2 * W)[..., ::2].copy_(x)
    functional.mod_block(odd, spec)
    functional.gather_channels(x, torch.zeros(2, N, dtype=torch.int64).t())
    functional.mod_block(x, spec, torch.zeros(C, N).t())
    assert _remembered._passed == {}


def test_no_tensor_is_kept_alive():
    x, spec = feature_map((N, C, H, W)), make_spec(C, K)
    functional.mod_block_(x, spec)
    assert _remembered._passed
    references = [weakref.ref(x), weakref.ref(spec), weakref.ref(spec.conv_arguments[0])]
    del x, spec
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_another_spec_with_the_same_shapes_is_another_call(checked):
    x = feature_map((N, C, H, W))
    functional.mod_block(x, make_spec(C, K))
    functional.mod_block(x, make_spec(C, K, "basic"))
    assert len(checked) == 2


def test_a_spec_is_safe_from_new_data_in_its_parameters():
    """Module.half() gives a Parameter another dtype behind everybody's back; the kernels read aliases."""
    spec = make_spec(C, K)
    x = feature_map((N, C, H, W))
    expected = functional.mod_block(x, spec)
    spec.fc1_weight.data = torch.zeros(1, C, dtype=torch.float16)
    assert torch.equal(functional.mod_block(x, spec), expected)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(_remembered, "_MOST", 8)
    for n in range(1, 30):
        functional.add_relu_pool(torch.randn(n, 4, 1, 1))
        assert 1 <= len(_remembered._passed) <= 8


def test_export_after_a_call_that_passed_is_plain():
    module, x = Ops(make_spec(C, K)), feature_map((2, C, 4, 4))
    with torch.no_grad():
        module(x)
        program = torch.export.export(module, (x,))
    assert not [node for node in program.graph.nodes if "mod_kernels" in str(node.target)]


def test_symbolic_sizes_are_not_remembered():
    """make_fx runs our Python with sizes that can't be hashed, and says nothing of compiling."""
    index = torch.zeros(N, 2, dtype=torch.int64)
    x = feature_map((N, C, H, W))
    graph = make_fx(lambda x: functional.add_relu_pool(x)[0], tracing_mode="symbolic")(x)
    assert torch.equal(graph(x), functional.add_relu_pool(x)[0])
    assert torch.equal(functional.gather_channels(x, index), x[:, :1].expand(-1, 2, -1, -1))

"""Every cell the CPU engine promises: the engine serves it (explain), and nothing but allocation runs beside it.

A silent fallback to the reference, or a copy of x or of a weight in another dtype or layout, shows up as an ATen
operator.
"""

import pytest
import torch

from mod_kernels import explain, functional, use_backend
from mod_kernels._library import accumulation_dtype
from mod_kernels.spec import CONV_KINDS

from .support import LAYOUTS, feature_map, make_spec, selector_of

SHAPE, K = (2, 32, 7, 5), 4
ALLOCATION = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::empty.memory_format",
}


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cells():
    for layout in LAYOUTS:
        yield "select_channels", layout, {}
        yield "gather_channels", layout, {}
        for op in ("fuse_channels", "fuse_channels_"):
            for position in ("first", "last", "original"):
                yield op, layout, {"position": position}
        for op in ("add_relu_pool", "add_relu_pool_"):
            yield op, layout, {}
        for op in ("mod_block", "mod_block_"):
            for kind in CONV_KINDS:
                for position in ("first", "last", "original"):
                    yield op, layout, {"kind": kind, "position": position}


def arguments(op, layout, options, dtype=torch.float32, weight_dtype=torch.float32):
    x = feature_map(SHAPE, dtype, layout)
    if op == "select_channels":
        return (x,), selector_of(make_spec(SHAPE[1], K, dtype=weight_dtype, bias=True))
    index = torch.stack([torch.randperm(SHAPE[1])[:K] for _ in range(SHAPE[0])])
    if op == "gather_channels":
        return (x, index), {}
    if op.startswith("fuse"):
        z = feature_map((SHAPE[0], K, *SHAPE[2:]), dtype, layout)
        return (x, z, torch.rand(SHAPE[0], K, dtype=accumulation_dtype(dtype)), index), options
    if op.startswith("add"):
        return (x, feature_map(SHAPE, dtype, layout)), {}
    return (x, make_spec(SHAPE[1], K, dtype=weight_dtype, bias=True, **options)), {}


def operators(op, *args, **kwargs):
    """Operators that ran during the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        getattr(functional, op)(*args, **kwargs)
    return {event.key for event in profile.key_averages()}


def operators_beside(op, *args, **kwargs):
    """The ATen ones among them."""
    return {name for name in operators(op, *args, **kwargs) if name.startswith("aten::")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op,layout,options", list(cells()), ids=lambda value: str(value))
def test_cpu_engine_serves_the_cell(op, layout, options, dtype):
    for weight_dtype in {dtype, torch.float32}:
        args, kwargs = arguments(op, layout, options, dtype, weight_dtype)
        with torch.no_grad(), use_backend("auto"):
            answer = explain(op, *args, **kwargs)
            assert answer.backend == "cpu" and answer.copies == ""
            for _ in range(2):  # the second call is a remembered one
                ran = operators(op, *args, **kwargs)
                assert {name for name in ran if name.startswith("aten::")} <= ALLOCATION
                assert ours(ran) == {f"mod_kernels_cpu::{op}"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["select_channels", "mod_block", "mod_block_"])
def test_a_pooled_vector_is_read_as_it_is(op, layout, dtype):
    (x, *rest), kwargs = arguments(op, layout, {}, dtype, dtype)
    pooled = torch.rand(SHAPE[:2], dtype=accumulation_dtype(dtype))
    with torch.no_grad(), use_backend("auto"):
        assert operators_beside(op, x, *rest, **kwargs, pooled=pooled) <= ALLOCATION


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["x", "fc2_weight", "fc1_bias"])
def test_a_selection_with_gradients_is_served_too(layout, where, dtype):
    """By the op that gives what the backward needs, and only where a gradient is needed."""
    (x,), kwargs = arguments("select_channels", layout, {}, dtype, dtype)
    (x if where == "x" else kwargs[where]).requires_grad_()
    for _ in range(2):  # the second call is a remembered one
        with use_backend("auto"):
            answer = explain("select_channels", x, **kwargs)
            assert answer.backend == "cpu" and answer.copies == ""
            ran = operators("select_channels", x, **kwargs)
            assert ours(ran) == {"mod_kernels_cpu::select_channels_saving"}
            # autograd's own: new aliases of what it is given
            aten = {name for name in ran if name.startswith("aten::")}
            assert aten <= ALLOCATION | {"aten::detach", "aten::view_as", "aten::alias"}
            with torch.no_grad():
                assert ours(operators("select_channels", x, **kwargs)) == {"mod_kernels_cpu::select_channels"}


def ours(ran):
    return {name for name in ran if name.startswith("mod_kernels")}


def test_a_fallback_would_be_seen():
    """The same look at the reference finds ATen at work: the assertion above can fail."""
    args, kwargs = arguments("mod_block", "nchw", {}, torch.bfloat16, torch.bfloat16)
    with torch.no_grad(), use_backend("reference"):
        ran = operators_beside("mod_block", *args, **kwargs)
        assert "aten::_to_copy" in ran and not ran <= ALLOCATION
    with torch.no_grad(), use_backend("auto"):
        odd = torch.zeros(*SHAPE, 2, dtype=torch.bfloat16)[..., 0].copy_(args[0])
        assert "aten::clone" in operators_beside("mod_block", odd, args[1])

"""Gradients: float64 gradcheck through the engine path and the reference; the CPU engine's in every dtype."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mod_kernels import functional, reference, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU

from .support import feature_map, make_spec, relative_error, selector_of

POSITIONS = ("first", "last", "original")


@pytest.fixture(params=["engine", "cpu", "reference"])
def path(request, one_thread):
    """The ways a gradient can take: the Functions of _autograd before either engine, and through the reference."""
    if request.param == "cpu" and CPU.library is None:
        pytest.skip("; ".join(CPU.problems))
    if request.param == "engine":
        request.getfixturevalue("oracle_engine")
        yield request.param
    else:
        with use_backend(request.param):
            yield request.param


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def asserts_path(path, op, *args, **kwargs):
    assert functional.explain(op, *args, **kwargs).backend == {"engine": "oracle"}.get(path, path)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_select(path, bias):
    x, fc1, fc2 = leaf(2, 7, 3, 2), leaf(4, 7), leaf(7, 4)
    biases = (leaf(4), leaf(7)) if bias else (None, None)
    asserts_path(path, "select_channels", x, fc1, fc2, 3, *biases)
    assert gradcheck(lambda *a: functional.select_channels(*a[:3], 3, *a[3:])[0], (x, fc1, fc2, *biases))


def test_gradcheck_select_through_pooled(path):
    x, fc1, fc2, pooled = torch.randn(2, 7, 3, 2, dtype=torch.float64), leaf(4, 7), leaf(7, 4), leaf(2, 7)
    assert gradcheck(lambda a, b, p: functional.select_channels(x, a, b, 3, pooled=p)[0], (fc1, fc2, pooled))


def test_gradcheck_gather(path):
    x, index = leaf(2, 5, 3, 2), torch.tensor([[4, 0, 2], [1, 1, 3]])  # a repeated channel adds up
    asserts_path(path, "gather_channels", x, index)
    assert gradcheck(lambda a: functional.gather_channels(a, index), (x,))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("in_place", [False, True])
def test_gradcheck_fuse(path, position, in_place):
    x, z, scores, index = leaf(2, 5, 3, 2), leaf(2, 3, 3, 2), leaf(2, 3), torch.tensor([[4, 0, 2], [1, 0, 3]])

    def fuse(a, b, c):
        if in_place:
            return functional.fuse_channels_(a.clone(), b, c, index, position)
        return functional.fuse_channels(a, b, c, index, position)

    asserts_path(path, "fuse_channels", x, z, scores, index, position)
    assert gradcheck(fuse, (x, z, scores))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradcheck_add_relu_pool(path, relu, in_place):
    a, b = leaf(2, 5, 3, 2), leaf(2, 5, 3, 2)

    def ending(p, q):
        if in_place:
            return functional.add_relu_pool_(p.clone(), q, relu)
        return functional.add_relu_pool(p, q, relu)

    asserts_path(path, "add_relu_pool", a, b, relu)
    assert gradcheck(ending, (a, b))


def test_index_has_no_gradient(path):
    scores, index = functional.select_channels(leaf(1, 4, 2, 2), leaf(2, 4), leaf(4, 2), 2)
    assert scores.requires_grad and not index.requires_grad


def test_frozen_inputs_get_no_gradient(oracle_engine):
    x, z, scores = leaf(1, 4, 2, 2), leaf(1, 2, 2, 2).detach(), leaf(1, 2).detach()
    functional.fuse_channels(x, z, scores).sum().backward()
    assert z.grad is None and scores.grad is None and (x.grad == 1).all()


def block(x, fc1, fc2, conv, k):
    """A training block out of the public ops, with a 1x1 conv as its conv block."""
    scores, index = functional.select_channels(x, fc1, fc2, k)
    z = torch.conv2d(functional.gather_channels(x, index), conv)
    return functional.fuse_channels(x, z, scores)


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_cpu_engine_gradients_agree_with_float64(layout, dtype):
    """Every gradient of a block on the compiled engine against the float64 reference, as a norm."""
    x = feature_map((3, 32, 7, 5), dtype, layout)
    spec = make_spec(32, 4, hidden=8, dtype=dtype)
    leaves = [t.detach().clone().requires_grad_() for t in (x, spec.fc1_weight, spec.fc2_weight)]
    leaves.append(torch.randn(4, 4, 1, 1, dtype=dtype, requires_grad=True))
    dy = feature_map((3, 32, 7, 5), dtype, layout)
    with use_backend("cpu"):
        grads = torch.autograd.grad(block(*leaves, 4), leaves, dy)
    twins = [t.detach().double().requires_grad_() for t in leaves]
    with use_backend("reference"):
        expected = torch.autograd.grad(block(*twins, 4), twins, dy.double())
    for name, got, want in zip(("x", "fc1", "fc2", "conv"), grads, expected, strict=True):
        assert want.abs().max() > 1e-6, name  # the path exists at all
        assert got.dtype == dtype and relative_error(got, want) < VALUES[dtype], name


@pytest.mark.parametrize("frozen", ["selector", "x"])
def test_select_backward_skips_what_nobody_needs(oracle_engine, frozen, monkeypatch):
    """Counted in matrix products: three for everything, fewer where a leaf is frozen."""
    x, fc1, fc2 = leaf(1, 6, 2, 2), leaf(3, 6), leaf(6, 3)
    for t in (fc1, fc2) if frozen == "selector" else (x,):
        t.requires_grad_(False)
    scores, _ = functional.select_channels(x, fc1, fc2, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scores.sum().backward()
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    assert products == {"selector": 2, "x": 3}[frozen]


def test_in_place_write_is_known_to_autograd():
    """A tensor saved for backward and then written by an op without gradients must be refused, not used."""
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    y = x * 2
    loss = (y * y).sum()
    with torch.no_grad():
        functional.fuse_channels_(y, torch.ones(1, 2, 2, 2), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("write", ["fuse_channels_", "add_relu_pool_"])
def test_in_place_training_in_eager(oracle_engine, write):
    """On a non-leaf: the gradient equals the out-of-place op's."""
    a = leaf(2, 5, 3, 2)
    z, scores = leaf(2, 3, 3, 2), leaf(2, 3)

    def run(in_place):
        y = a * 1.5
        if write == "fuse_channels_":
            op = functional.fuse_channels_ if in_place else functional.fuse_channels
            return op(y, z, scores)
        return (functional.add_relu_pool_ if in_place else functional.add_relu_pool)(y, a)[0]

    weights = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    inputs = [a, z, scores] if write == "fuse_channels_" else [a]
    got = torch.autograd.grad((run(True) * weights).sum(), inputs)
    expected = torch.autograd.grad((run(False) * weights).sum(), inputs)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_in_place_on_a_view(oracle_engine):
    """A batch-sliced map: what the op writes is the base's, and so is its gradient."""
    a, b = leaf(3, 5, 3, 2), leaf(2, 5, 3, 2)
    weights = torch.randn(3, 5, 3, 2, dtype=torch.float64)

    def run(write):
        base = a * 1.5
        written = write(base[1:])
        assert written.data_ptr() == base[1:].data_ptr()
        return torch.autograd.grad((base * weights).sum(), [a, b])

    got = run(lambda x: functional.add_relu_pool_(x, b)[0])
    expected = run(lambda x: x.add_(b).relu_())
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("write", ["fuse_channels_", "add_relu_pool_"])
def test_a_view_of_a_leaf_is_refused_before_it_is_written(write):
    a, z, scores = torch.zeros(3, 5, 3, 2, requires_grad=True), torch.ones(2, 2, 3, 2), torch.ones(2, 2)
    arguments = {"fuse_channels_": (z, scores), "add_relu_pool_": (torch.ones(2, 5, 3, 2),)}
    with pytest.raises(RuntimeError, match="is a view of a leaf that requires grad"):
        getattr(functional, write)(a[1:], *arguments[write])
    assert (a == 0).all()


def test_forward_mode_has_its_tangents():
    """By the reference, also where a call like it was served by an engine before; by name it is refused."""
    x, index = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.tensor([[1, 0], [3, 7]])
    spec = make_spec(8, 2, dtype=torch.float64)
    run = {
        "gather_channels": lambda x: functional.gather_channels(x, index),
        "add_relu_pool": lambda x: functional.add_relu_pool(x)[1],
        "mod_block": lambda x: functional.mod_block(x, spec),
    }
    for call in run.values():
        expected, step = call(x), 1e-6
        y, tangent = torch.func.jvp(call, (x,), (torch.ones_like(x),))
        slope = (call(x + step) - call(x - step)) / (2 * step)
        assert relative_norm(y, expected) < 1e-12 and relative_norm(tangent, slope) < 1e-6
        if CPU.library is not None:
            with use_backend("cpu"), pytest.raises(RuntimeError, match="has no forward-mode derivatives"):
                torch.func.jvp(call, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("bias", [False, True])
def test_double_backward_of_select(oracle_engine, bias):
    x, fc1, fc2 = leaf(2, 7, 3, 2), leaf(4, 7), leaf(7, 4)
    biases = (leaf(4), leaf(7)) if bias else (None, None)
    assert gradgradcheck(lambda *a: functional.select_channels(*a[:3], 3, *a[3:])[0], (x, fc1, fc2, *biases))


@pytest.mark.parametrize("position", POSITIONS)
def test_double_backward_of_gather_and_fuse(oracle_engine, position):
    x, z, scores, index = leaf(2, 5, 3, 2), leaf(2, 3, 3, 2), leaf(2, 3), torch.tensor([[4, 0, 2], [1, 0, 3]])
    assert gradgradcheck(lambda a: functional.gather_channels(a, index), (x,))
    assert gradgradcheck(lambda *a: functional.fuse_channels(*a, index, position), (x, z, scores))


def test_double_backward_of_add_relu_pool(oracle_engine):
    assert gradgradcheck(lambda a, b: functional.add_relu_pool(a, b), (leaf(2, 5, 3, 2), leaf(2, 5, 3, 2)))


def test_autocast_casts_z_to_x_and_keeps_the_selector_in_float32():
    x = feature_map((2, 16, 3, 3))
    spec = make_spec(16, 4)
    plain_scores, plain_index = reference.select_channels(x, **selector_of(spec))
    with torch.autocast("cpu", torch.bfloat16):
        scores, index = functional.select_channels(x, **selector_of(spec))
        z = torch.conv2d(functional.gather_channels(x, index), torch.randn(4, 4, 1, 1))
        assert z.dtype == torch.bfloat16
        y = functional.fuse_channels(x, z, scores)
        reference_scores, _ = reference.select_channels(x, **selector_of(spec))
    assert y.dtype == torch.float32 and torch.equal(index, plain_index)
    assert torch.allclose(scores, plain_scores, rtol=1e-5) and torch.equal(reference_scores, plain_scores)

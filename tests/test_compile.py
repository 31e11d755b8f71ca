"""One graph under torch.compile(fullgraph=True), the same numbers, no copies added; plain ATen on export."""

import pytest
import torch

from mod_kernels import functional, use_backend

from .support import feature_map, make_spec, relative_error

BACKENDS = ["cpu", "reference"]
LAYOUTS = ["nchw", "channels_last"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operators_of(compiled, *args):
    """The operators that run when ``compiled`` is called once more, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(*args)
    return [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_block_is_one_graph(backend, layout, compiler):
    spec = make_spec(32, 4, hidden=8)
    x = feature_map((2, 32, 7, 7), layout=layout)

    def network(x):
        return functional.mod_block(x * 2, spec) + 1

    with use_backend(backend), torch.no_grad():
        expected = network(x)
        compiled = torch.compile(network, fullgraph=True, backend=compiler)
        y = compiled(x)
        assert relative_error(y, expected) < 1e-6
        assert y.stride() == expected.stride()
        if backend == "cpu" and compiler == "inductor":  # aot_eager copies the Python scalars about
            operators = operators_of(compiled, x)
            assert any(name.startswith("mod_kernels_cpu::mod_block") for name in operators)
            assert not {"aten::clone", "aten::copy_", "aten::contiguous"} & set(operators)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["graph input", "intermediate"])
def test_in_place_block_is_one_graph(backend, layout, where):
    spec = make_spec(32, 4, hidden=8)
    x = feature_map((2, 32, 7, 7), layout=layout)

    def network(x):
        y = x if where == "graph input" else x * 2
        before = y.sum()
        return functional.mod_block_(y, spec) * 3, before

    with use_backend(backend), torch.no_grad():
        eager_x, compiled_x = x.clone(), x.clone()
        expected = network(eager_x)
        compiled = torch.compile(network, fullgraph=True)
        got = compiled(compiled_x)
        assert relative_error(got[0], expected[0]) < 1e-6 and relative_error(got[1], expected[1]) < 1e-5
        assert relative_error(compiled_x, eager_x) < 1e-6
        if backend == "cpu":
            assert not {"aten::clone", "aten::copy_"} & set(operators_of(compiled, compiled_x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("in_place", [False, True])
def test_training_is_one_graph(backend, compiler, in_place):
    """Forward and backward of the whole chain of ops, x read before and after the write."""
    spec = make_spec(32, 4, hidden=8, bias=True)

    def network(x, fc1, fc2, conv):
        a = x * 1.5
        a, pooled = functional.add_relu_pool(a, x, relu=not in_place)  # a ReLU's output may not be written
        scores, index = functional.select_channels(a, fc1, fc2, 4, pooled=pooled)
        z = torch.conv2d(functional.gather_channels(a, index), conv)
        fuse = functional.fuse_channels_ if in_place else functional.fuse_channels
        kept = a.sum()
        return fuse(a, z, scores), kept

    leaves = [feature_map((2, 32, 7, 5)), spec.fc1_weight, spec.fc2_weight, torch.randn(4, 4, 1, 1)]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    dy = feature_map((2, 32, 7, 5))

    def gradients(function):
        y, kept = function(*leaves)
        return torch.autograd.grad((y * dy).sum() + kept, leaves)

    with use_backend(backend):
        expected = gradients(network)
        got = gradients(torch.compile(network, fullgraph=True, backend=compiler))
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-5


def test_in_place_training_on_a_graph_input_read_before():
    """The case that marks a write wrongly inside a traced Function: x is a graph input, read, then written."""

    def network(base, z, scores):
        x = base.clone()

        def inner(x):
            before = (x * 3).sum()
            return functional.fuse_channels_(x, z, scores), before

        return inner, x

    base, z = torch.randn(1, 4, 2, 2, requires_grad=True), torch.randn(1, 2, 2, 2, requires_grad=True)
    scores = torch.rand(1, 2, requires_grad=True)

    def gradients(transform):
        inner, x = network(base, z, scores)
        y, before = transform(inner)(x)
        return torch.autograd.grad((y * y).sum() + before, (z, scores))

    expected = gradients(lambda inner: inner)
    got = gradients(lambda inner: torch.compile(inner, fullgraph=True, backend="aot_eager"))
    for g, e in zip(got, expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_selection_saves_only_for_a_gradient(grad):
    """What a graph calls depends on nothing but whether a gradient is needed."""
    x, spec = feature_map((2, 32, 7, 5)), make_spec(32, 4, hidden=8)
    fc1 = spec.fc1_weight.clone().requires_grad_()

    def select(x, fc1):
        return functional.select_channels(x, fc1, spec.fc2_weight, 4)

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        scores, index = compiled(x, fc1)
        ran = {name for name in operators_of(compiled, x, fc1) if name.startswith("mod_kernels_cpu")}
        expected_scores, expected_index = select(x, fc1)
    assert ran == {"mod_kernels_cpu::select_channels" + ("_saving" if grad else "")}
    assert scores.requires_grad == grad
    assert torch.equal(scores, expected_scores) and torch.equal(index, expected_index)


@pytest.mark.parametrize("dynamic", [True])
def test_dynamic_batch(dynamic):
    spec = make_spec(16, 4, hidden=8)
    compiled = torch.compile(
        lambda x: functional.mod_block(x, spec), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    with torch.no_grad():
        for n in (2, 3, 5):
            x = feature_map((n, 16, 4, 4))
            assert torch.equal(compiled(x), functional.mod_block(x, spec))


def test_use_backend_recompiles():
    spec = make_spec(16, 4, hidden=8)
    compiled = torch.compile(lambda x: functional.mod_block(x, spec), fullgraph=True, backend="aot_eager")
    x = feature_map((2, 16, 4, 4))
    with torch.no_grad():
        compiled(x)
        assert any("mod_kernels_cpu" in name for name in operators_of(compiled, x))
        with use_backend("reference"):
            compiled(x)
            assert not any("mod_kernels_cpu" in name for name in operators_of(compiled, x))

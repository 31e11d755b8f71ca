"""torch.export without a word: plain ATen, the numbers of eager."""

import pytest
import torch

from mod_kernels import accelerate, functional
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.spec import POSITIONS

from ..support import feature_map, make_spec, selector_of
from .support import AGREES, operators, small_network


class Ops(torch.nn.Module):
    """Each op once."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def forward(self, x):
        y, pooled = functional.add_relu_pool(x)
        scores, index = functional.select_channels(y, **selector_of(self.spec), pooled=pooled)
        y = functional.fuse_channels(y, functional.gather_channels(y, index), scores, index, self.spec.position)
        return functional.mod_block(y, self.spec)


class OpsInPlace(Ops):
    """The same numbers from those that write into their input."""

    def forward(self, x):
        y, pooled = functional.add_relu_pool_(x.clone())
        scores, index = functional.select_channels(y, **selector_of(self.spec), pooled=pooled)
        z = functional.gather_channels(y, index)
        functional.fuse_channels_(y, z, scores, index, self.spec.position)
        return functional.mod_block_(y, self.spec)


@pytest.mark.parametrize("kind", [Ops, OpsInPlace])
@pytest.mark.parametrize("strict, position", [*((False, position) for position in POSITIONS), (True, "first")])
def test_ops_become_plain_aten(strict, kind, position):
    module, x = kind(make_spec(16, 4, hidden=8, position=position)), feature_map((2, 16, 4, 4))
    with torch.no_grad():
        program = torch.export.export(module, (x,), strict=strict)
        found = operators(program)
        assert "aten.topk.default" in found
        assert not [name for name in found if not name.startswith("aten.") or "sort" in name]
        assert relative_norm(program.module()(x), module(x)) <= VALUES[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights_follow", [False, True])
def test_other_dtypes_keep_the_selector_wide_and_the_result_narrow(dtype, weights_follow):
    spec = make_spec(16, 4, hidden=8, dtype=dtype if weights_follow else torch.float32)
    module, x = Ops(spec), feature_map((2, 16, 4, 4), dtype)
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
        y = exported(x)
        assert y.dtype == dtype
        assert relative_norm(y, module(x)) <= VALUES[dtype]


def test_logits_are_ranked_and_not_sigmoids():
    """Logits past 20 all have the sigmoid 1.0 in float32; they are no ties."""
    spec = make_spec(16, 4, hidden=8)
    selector = selector_of(spec) | {"fc2_weight": spec.fc2_weight * 1e4}

    class Select(torch.nn.Module):
        def forward(self, x):
            return functional.select_channels(x, **selector)

    x = feature_map((3, 16, 4, 4))
    scores, index = torch.export.export(Select(), (x,)).module()(x)
    expected_scores, expected = functional.select_channels(x, **selector)
    assert (expected_scores == 1).all()
    assert torch.equal(index, expected) and torch.equal(scores, expected_scores)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_network_with_any_batch(accelerated, grad):
    """Accelerated or not: the parts, as they are, for any runtime to fuse."""
    network, x = small_network(), torch.randn(2, 3, 6, 5)
    if accelerated:
        accelerate(network)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert not [name for name in operators(program) if not name.startswith("aten.")]
    assert any("batch_norm" in name for name in operators(program))
    with torch.no_grad():
        for n in (1, 5):
            x = torch.randn(n, 3, 6, 5)
            assert relative_norm(program.module()(x), network(x)) <= AGREES

"""Real data: a small ResNet-MoD on scikit-learn's digits, trained with the reference and with the CPU engine.

The Triton engine's turn is in tests/backends/triton/test_training.py.
"""

import copy

import pytest
import torch

from mod_kernels.backends.native import CPU

from .digits import DigitsNet, train
from .digits import digits as load

STEPS = 120


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def by_reference(digits):
    torch.manual_seed(3)
    net = DigitsNet()
    start = copy.deepcopy(net)
    return start, net, *train(net, digits, "reference", STEPS)


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_the_cpu_engine_trains_like_the_reference(digits, by_reference):
    start, _, expected, expected_accuracy, _ = by_reference
    losses, accuracy, _ = train(copy.deepcopy(start), digits, "cpu", STEPS)
    for step in range(5):
        assert abs(losses[step] / expected[step] - 1) < 1e-5, step
    assert min(accuracy, expected_accuracy) > 95
    assert abs(accuracy - expected_accuracy) < 1.5


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_twenty_steps(digits):
    """Step for step the reference's losses, in float32.

    At a learning rate where no channels are near enough to a tie for the two to select differently: after that
    trainings part. At the 0.1 of the others they do after some seven steps, as PyTorch's own of float32 and
    float64 do after seventeen.
    """
    torch.manual_seed(4)
    start = DigitsNet()
    found, expected = (train(copy.deepcopy(start), digits, one, 20, lr=0.02)[0] for one in ("cpu", "reference"))
    assert expected[-1] < 0.9 * expected[0]  # it learns
    for step in range(20):
        assert abs(found[step] / expected[step] - 1) < 1e-3, step


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_twenty_steps_in_float64(digits, by_reference):
    """At the learning rate of the others."""
    start = by_reference[0]
    wide = [one.double() if one.is_floating_point() else one for one in digits]
    found, expected = (
        train(copy.deepcopy(start).double(), wide, backend, 20)[0] for backend in ("cpu", "reference")
    )
    for step in range(20):
        assert abs(found[step] / expected[step] - 1) < 1e-9, step


def test_the_selector_learns(digits, by_reference):
    """Its weights move; and frozen, other channels are selected."""
    start, net, _, _, counts = by_reference
    for before, after in zip(start.selectors(), net.selectors(), strict=True):
        for name, weight in before.named_parameters():
            moved = (after.get_parameter(name) - weight).norm() / weight.norm()
            assert moved > 1e-3, name
    frozen = copy.deepcopy(start)
    for selector in frozen.selectors():
        selector.requires_grad_(False)
    _, _, other = train(frozen, digits, "auto", STEPS)
    for before, after in zip(start.selectors(), frozen.selectors(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert any((a - b).abs().sum() > 0.05 * a.sum() for a, b in zip(counts, other, strict=True))

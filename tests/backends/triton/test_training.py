"""Training on the Triton engine: gradients through its backward kernels, and twenty steps on real data."""

import copy

import pytest
import torch

from mod_kernels import MoDBlock, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.triton import TRITON
from mod_kernels.bench.networks import PlainBlock
from mod_kernels.nn import NarrowBottleneck

from ...support import feature_map
from ...training.digits import DigitsNet, digits, train
from ...training.support import count_calls, gradients, make_stages

BACKWARD = ("select_channels_backward", "fuse_channels_backward", "input_gradient")


@pytest.fixture
def called(monkeypatch):
    """Counts the raw ops of the engine."""
    return count_calls(TRITON, monkeypatch)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("position", ["first", "last", "original"])
def test_gradients_are_the_plain_forms(position, layout, called, device):
    block = MoDBlock(24, NarrowBottleneck(8), 8, reduction=2, position=position, bias=True).to(device)
    torch.nn.init.normal_(block.selector.fc1.weight, std=0.5)
    for norm in (block.conv_block.bn1, block.conv_block.bn2):
        torch.nn.init.normal_(norm.bias)  # with none the gradients of weights before a norm come near zero
    plain = PlainBlock(copy.deepcopy(block).double(), "cat")
    x, dy = (feature_map((3, 24, 7, 5), torch.float32, layout, device) for _ in range(2))
    with use_backend("triton"):
        y, found = gradients(block, x, dy)
    assert [called[name] for name in BACKWARD] == [1, 1, 1]
    expected_y, expected = gradients(plain, x.double(), dy.double())
    assert relative_norm(y, expected_y) < VALUES[torch.float32]
    for got, wanted, name in zip(found, expected, ["x", *dict(block.named_parameters())], strict=True):
        # Through three batch norms errors grow, as on the CPU engine.
        assert relative_norm(got, wanted) < 20 * VALUES[torch.float32], name


def test_an_ending_and_the_block_after_it_on_one_map(called, device):
    stage, plain = make_stages(torch.float32)
    stage, plain = stage.to(device), plain.to(device).double()
    x, dy = torch.randn(2, 32, 10, 10, device=device), torch.randn(2, 64, 5, 5, device=device)
    with use_backend("triton"):
        y, found = gradients(stage, x, dy)
    assert called["add_relu_pool_"] == called["input_gradient"] == called["fuse_channels_"] == 2
    expected_y, expected = gradients(plain, x.double(), dy.double())
    assert relative_norm(y, expected_y) < 20 * VALUES[torch.float32]
    assert relative_norm(found[0], expected[0]) < 100 * VALUES[torch.float32]  # some ten batch norms


def test_twenty_steps_on_digits_are_the_references(interpreter, called):
    """Losses within 1e-3; the whole training is the CPU engine's test, interpreted it would take an hour."""
    torch.manual_seed(3)
    start, data = DigitsNet(), digits()
    data = (*data[:2], *(part[:8] for part in data[2:]))  # what is held out is not asked for here
    expected, _, _ = train(copy.deepcopy(start), data, "reference", 20, batch_size=8)
    losses, _, _ = train(start, data, "triton", 20, batch_size=8)
    assert called["input_gradient"] == 40
    for step in range(20):
        assert abs(losses[step] / expected[step] - 1) < 1e-3, step

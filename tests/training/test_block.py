"""MoDBlock in training: its gradients against the plain form's, what it saves, what it does not compute."""

import copy

import pytest
import torch
from torch import nn

from mod_kernels import MoDBlock, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU
from mod_kernels.bench.networks import PlainBlock
from mod_kernels.nn import NarrowBasicBlock, NarrowBottleneck

from ..support import feature_map
from .support import CHANNELS, K, count_calls, gradients

pytestmark = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
BACKWARD = ("select_channels_backward", "fuse_channels_backward", "input_gradient")


def make_block(conv_block=None, dtype=torch.float64, **options):
    block = MoDBlock(CHANNELS, conv_block or NarrowBottleneck(K), K, **{"reduction": 2, **options})
    nn.init.normal_(block.selector.fc1.weight, std=0.5)
    return block.to(dtype)


@pytest.fixture
def called(monkeypatch):
    """Counts the raw ops of the CPU engine."""
    return count_calls(CPU, monkeypatch)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "nchw_sliced"])
@pytest.mark.parametrize("position", ["first", "last", "original"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_the_plain_forms(dtype, position, layout, called):
    """On the CPU engine's kernels, against autograd of plain PyTorch in float64."""
    block = make_block(NarrowBasicBlock(K), dtype, position=position, bias=True)
    plain = PlainBlock(copy.deepcopy(block).double(), "cat")
    x, dy = (feature_map((3, CHANNELS, 7, 5), dtype, layout) for _ in range(2))
    with use_backend("cpu"):
        y, found = gradients(block, x, dy)
    assert [called[name] for name in BACKWARD] == [1, 1, 1]
    expected_y, expected = gradients(plain, x.double(), dy.double())
    assert relative_norm(y, expected_y) < VALUES[dtype]
    for got, wanted, name in zip(found, expected, ["x", *dict(block.named_parameters())], strict=True):
        # Through two batch norms errors grow: by a factor of some ten here, in either dtype.
        assert relative_norm(got, wanted) < 20 * VALUES[dtype], name
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_of_x_is_one_pass(called):
    """Nothing as large as x is made in the backward but x's gradient."""
    block, x = make_block(dtype=torch.float32), torch.randn(2, CHANNELS, 9, 9, requires_grad=True)
    dy = torch.randn_like(x)
    with use_backend("cpu"):
        y = block(x)
        with torch.profiler.profile(profile_memory=True) as profile:
            y.backward(dy)
    fresh = [e for e in profile.events() if e.self_device_memory_usage or e.self_cpu_memory_usage >= 4 * x.numel()]
    assert len(fresh) == 1 and called["input_gradient"] == 1, [e.name for e in fresh]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_for_the_backward(dtype):
    """At most 6 k/C of x beside tensors of (N, C) and the parameters, and x itself never."""
    n, h = 4, 14
    block = MoDBlock(CHANNELS, NarrowBottleneck(K), K).to(dtype)
    x = torch.randn(n, CHANNELS, h, h).to(dtype).requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with use_backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    known = {p.untyped_storage().data_ptr() for p in block.parameters()}
    known |= {b.untyped_storage().data_ptr() for b in block.buffers()}
    sizes = [t.untyped_storage().nbytes() for at, t in saved.items() if at not in known]
    maps = [size for size in sizes if size > 8 * n * CHANNELS]
    assert maps and sum(maps) <= 6 * K / CHANNELS * x.numel() * x.element_size()
    assert not {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()} & set(saved)


@pytest.mark.parametrize(
    "frozen,expected",
    [
        ("nothing", [1, 1, 1]),
        ("selector", [1, 1, 1]),  # x still gets its gradient through the selector
        ("selector and x", [0, 1, 0]),
        ("x", [1, 1, 0]),
        ("conv_block", [1, 1, 1]),
        ("all but the last convolution", [0, 1, 0]),
    ],
)
def test_a_gradient_that_nobody_needs_is_not_computed(frozen, expected, called):
    block = make_block(dtype=torch.float32)
    x = torch.randn(2, CHANNELS, 6, 6, requires_grad=frozen in ("nothing", "selector", "conv_block"))
    for part in ("selector", "conv_block"):
        if part in frozen:
            getattr(block, part).requires_grad_(False)
    if frozen.startswith("all but"):
        block.requires_grad_(False)
        block.conv_block.conv3.requires_grad_(True)
    with use_backend("cpu"):
        block(x).sum().backward()
    assert [called[name] for name in BACKWARD] == expected
    for name, parameter in block.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_weights_of_a_frozen_selector_get_no_products(monkeypatch):
    """What a kernel need not compute it is told."""
    flags = []
    op = CPU.ops["select_channels_backward"]
    recording = {"select_channels_backward": lambda *arguments: flags.append(arguments[7:]) or op(*arguments)}
    monkeypatch.setattr(CPU, "ops", CPU.ops | recording)
    block = make_block(dtype=torch.float32)
    block.selector.fc1.requires_grad_(False)
    with use_backend("cpu"):
        block(torch.randn(2, CHANNELS, 6, 6)).sum().backward()
    assert flags == [(False, False, True, False, False)]


@pytest.mark.parametrize("position", ["first", "original"])
def test_second_derivatives(position):
    block = MoDBlock(6, nn.Conv2d(2, 2, 3, padding=1), 2, reduction=2, position=position).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    with use_backend("cpu"):
        assert torch.autograd.gradgradcheck(block, (x,))


def test_gradcheck_through_every_kernel(called):
    """The kernels' own gradients against finite differences, in float64."""
    block = MoDBlock(6, nn.Conv2d(2, 2, 3, padding=1), 2, reduction=2, bias=True).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*block.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(run, (x, *parameters))
    assert all(called[name] for name in BACKWARD)


def test_two_runs_give_the_same_bits():
    torch.use_deterministic_algorithms(True)
    try:
        block, x = make_block(dtype=torch.float32), torch.randn(8, CHANNELS, 12, 12)
        dy = torch.randn_like(x)
        with use_backend("cpu"):
            _, first = gradients(block, x, dy)
            _, second = gradients(block, x, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

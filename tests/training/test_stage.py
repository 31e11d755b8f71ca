"""MoDStage in training: an ending and the MoD block after it on one map, with the plain stage's gradients."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import BasicBlock, Bottleneck

from mod_kernels import _training, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU
from mod_kernels.nn import MoDBlock, MoDStage, NarrowBasicBlock

from .support import gradients, make_stages

pytestmark = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))


@pytest.fixture
def pairs(monkeypatch):
    """Counts the pairs."""
    begun = []
    begin = _training.Pair.begin
    monkeypatch.setattr(_training.Pair, "begin", lambda self, *a: begun.append(1) or begin(self, *a))
    return begun


def check(stage, plain, dtype, run=None, memory_format=torch.contiguous_format):
    x = torch.randn(2, 32, 10, 10, dtype=dtype).contiguous(memory_format=memory_format)
    dy = torch.randn(2, 64, 5, 5, dtype=dtype)
    with use_backend("cpu"):
        y, found = gradients(stage, x, dy) if run is None else run(x, dy)
    expected_y, expected = gradients(plain, x, dy)
    assert relative_norm(y, expected_y) < 20 * VALUES[dtype]
    for got, wanted in zip(found, expected, strict=True):
        assert relative_norm(got, wanted) < 2000 * VALUES[dtype]  # eight batch norms
    return found


@pytest.mark.parametrize("host", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("position", ["first", "last", "original"])
def test_gradients_are_the_plain_stages(position, host, pairs):
    stage, plain = make_stages(position=position, host=host)
    check(stage, plain, torch.float64)
    assert len(pairs) == 2


def test_channels_last(pairs):
    stage, plain = make_stages()
    stage, plain = (one.to(memory_format=torch.channels_last) for one in (stage, plain))
    found = check(stage, plain, torch.float64, memory_format=torch.channels_last)
    assert len(pairs) == 2 and found[0].is_contiguous(memory_format=torch.channels_last)


def test_the_pair_keeps_one_map():
    """Of the maps (N, C, H, W) that a stage saves, the plain form has one more for each MoD block."""

    def maps_saved(module):
        saved = {}

        def pack(tensor):
            if tensor.shape == (2, 64, 5, 5):
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(2, 32, 10, 10)
        with use_backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x).square()  # like the block after it, this saves what the last one gives
        return len(saved)

    stage, plain = make_stages(torch.float32)
    assert maps_saved(plain) - maps_saved(stage) == 2


def test_second_derivatives_of_the_pair(pairs):
    block = MoDBlock(6, torch.nn.Conv2d(2, 2, 3, padding=1), 2, reduction=2).double()
    a, b = (torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def ending_and_block(a, b):
        return block.after_ending(a * 1, b, True)

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(ending_and_block, (a, b))
        assert torch.autograd.gradgradcheck(ending_and_block, (a, b))
    assert pairs


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_of_a_block_that_overwrites_its_input(use_reentrant):
    """It is run again from its input: reentrant, that was first seen with gradients switched off."""
    block, h = make_stages()[0][-1], torch.randn(2, 64, 5, 5, dtype=torch.float64)
    block.overwrite_input = True
    dy = torch.randn_like(h)

    def found(run):
        block.zero_grad()
        x = h.clone().requires_grad_()
        run(x * 1.5).backward(dy)
        return [x.grad, *(one.grad for one in block.parameters())]

    with use_backend("cpu"):
        again, expected = found(lambda x: checkpoint(block, x, use_reentrant=use_reentrant)), found(block)
    assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("norm", [torch.nn.InstanceNorm2d, LayerNorm2d])
def test_norms_that_return_views(norm):
    """Autograd takes no node that writes a view and returns more than it: nothing is to go that way."""
    torch.manual_seed(0)
    blocks = [BasicBlock(16, 16, norm_layer=norm), MoDBlock(16, NarrowBasicBlock(4), 4, reduction=4)]
    stage, plain = MoDStage(*blocks), torch.nn.Sequential(*copy.deepcopy(blocks))
    x, dy = torch.randn(2, 16, 6, 6), torch.randn(2, 16, 6, 6)
    with use_backend("cpu"):
        y, found = gradients(stage, x, dy)
    expected_y, expected = gradients(plain, x, dy)
    assert relative_norm(y, expected_y) < VALUES[torch.float32]
    for got, wanted in zip(found, expected, strict=True):
        assert relative_norm(got, wanted) < 100 * VALUES[torch.float32]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, pairs):
    stage, plain = make_stages()
    once = copy.deepcopy(stage)

    def run(x, dy):
        x = x.requires_grad_()
        y = checkpoint(once, x, use_reentrant=use_reentrant)
        y.backward(dy)
        return y.detach(), [x.grad, *(parameter.grad for parameter in once.parameters())]

    check(once, plain, torch.float64, run)
    assert len(pairs) >= 2


def test_saved_tensors_that_live_elsewhere(pairs):
    stage, plain = make_stages()

    def run(x, dy):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return gradients(stage, x, dy)

    check(stage, plain, torch.float64, run)


def test_backward_twice_through_a_kept_graph(pairs):
    stage, _ = make_stages()
    x = torch.randn(2, 32, 10, 10, dtype=torch.float64, requires_grad=True)
    with use_backend("cpu"):
        loss = stage(x).square().sum()
        (first,) = torch.autograd.grad(loss, [x], retain_graph=True)
        (second,) = torch.autograd.grad(loss, [x])
    assert torch.equal(first, second) and pairs


def test_a_later_write_is_refused(pairs):
    stage, _ = make_stages()
    with use_backend("cpu"):
        y = stage(torch.randn(2, 32, 10, 10, dtype=torch.float64))
        loss = y.sum()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_loss_on_the_inside_alone_is_refused_in_words():
    stage, _ = make_stages()
    inner = []
    stage[1].conv_block.register_forward_hook(lambda module, args, output: inner.append(output))
    with use_backend("cpu"):
        stage(torch.randn(2, 32, 10, 10, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="let the loss depend on the block's output"):
            inner[0].sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_the_pair_is_two_blocks(compiler, pairs):
    torch._dynamo.reset()
    stage, plain = make_stages()
    compiled = torch.compile(stage, fullgraph=True, backend=compiler)

    def run(x, dy):
        x = x.requires_grad_()
        y = compiled(x)
        return y.detach(), torch.autograd.grad(y, [x, *stage.parameters()], dy)

    check(stage, plain, torch.float64, run)
    assert not pairs

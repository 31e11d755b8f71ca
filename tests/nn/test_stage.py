"""MoDStage is a plain Sequential in keys and numbers, and hands on pooled only where nothing can notice."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.resnet import BasicBlock, Bottleneck

from mod_kernels import MoDBlock, accelerate, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU
from mod_kernels.nn import MoDStage, NarrowBasicBlock, NarrowBottleneck, mod_block

CHANNELS, K = 64, 8


def make_stages(host):
    """A MoDStage (standard, MoD, standard, MoD) and a nn.Sequential with the same weights."""
    narrow = {BasicBlock: NarrowBasicBlock, Bottleneck: NarrowBottleneck}[host]
    planes = CHANNELS // host.expansion

    def blocks():
        downsample = nn.Sequential(nn.Conv2d(32, CHANNELS, 1, 2, bias=False), nn.BatchNorm2d(CHANNELS))
        yield host(32, planes, 2, downsample)
        yield MoDBlock(CHANNELS, narrow(K), K, reduction=2, overwrite_input=True)
        yield host(CHANNELS, planes)
        yield MoDBlock(CHANNELS, narrow(K), K, reduction=2)

    stage = MoDStage(*blocks())
    plain = nn.Sequential(*copy.deepcopy(list(stage)))
    assert list(stage.state_dict()) == list(plain.state_dict())
    return stage, plain


@pytest.fixture
def handed_over(monkeypatch):
    """How each MoD block was called: whether with pooled, or as a pair with the ending before it."""
    calls = []
    forward = mod_block.MoDBlock.forward

    def recording(self, x, pooled=None, *rest):
        calls.append(pooled is not None)
        return forward(self, x, pooled, *rest)

    def recording_pairs(self, *ending):
        y = after_ending(self, *ending)
        return y if y is None else calls.append("pair") or y

    after_ending = mod_block.MoDBlock.after_ending
    monkeypatch.setattr(mod_block.MoDBlock, "forward", recording)
    monkeypatch.setattr(mod_block.MoDBlock, "after_ending", recording_pairs)
    return calls


@pytest.mark.parametrize("host", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_numbers_of_a_sequential(host, training, backend, handed_over):
    stage, plain = make_stages(host)
    stage.train(training)
    plain.train(training)
    x = torch.randn(2, 32, 10, 10)
    with torch.set_grad_enabled(training), use_backend(backend):
        y, expected = stage(x), plain(x)
        # The reference's autograd needs no pair, and it has no engine to write with.
        pairs = training and backend == "auto" and CPU.library is not None
        assert handed_over == ["pair" if pairs else True] * 2 + [False, False]
        if backend == "reference":
            assert torch.equal(y, expected)
        else:  # an engine may sum a plane in another order where it pools on the way
            assert relative_norm(y.detach(), expected.detach()) < VALUES[torch.float32]
        if training:
            dy = torch.randn_like(y)
            got = torch.autograd.grad((y * dy).sum(), list(stage.parameters()))
            wanted = torch.autograd.grad((expected * dy).sum(), list(plain.parameters()))
            scale = max(w.norm() for w in wanted)
            for g, w in zip(got, wanted, strict=True):
                assert (g - w).norm() < 1e-5 * scale
            for (name, a), b in zip(stage.named_buffers(), plain.buffers(), strict=True):
                assert torch.allclose(a, b, rtol=1e-5), name


def test_inference_goes_through_no_parameters(monkeypatch):
    """Inside a network that takes as long as a whole kernel does."""
    stage, _ = make_stages(Bottleneck)
    accelerate(stage.eval())
    x = torch.randn(2, 32, 14, 14)
    with torch.inference_mode():
        expected = stage(x)
        monkeypatch.setattr(nn.Module, "named_parameters", None)
        assert torch.equal(stage(x), expected)


def test_input_is_not_written():
    stage, _ = make_stages(BasicBlock)
    x = torch.randn(2, 32, 10, 10)
    kept = x.clone()
    with torch.no_grad():
        stage.eval()(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
def test_maps_that_the_stage_owns_are_written(watched, accelerated):
    """Not its input, not what a block with a forward hook returns, not where a block is called by itself."""
    row = [nn.Conv2d(CHANNELS, CHANNELS, 1), MoDBlock(CHANNELS, NarrowBasicBlock(K), K, reduction=2)]
    stage = MoDStage(*[copy.deepcopy(one) for one in (row[1], *row, *row)]).eval()
    if accelerated:
        accelerate(stage)
    x, inputs = torch.randn(2, CHANNELS, 10, 10), []
    if watched:
        for block in stage:
            block.register_forward_hook(lambda module, args, y: None)
    with torch.no_grad():
        expected = nn.Sequential(*stage)(x)
        y = x
        for block in stage:
            inputs.append((y, y.clone()))
            y = block(y)
        assert torch.equal(y, expected) and all(torch.equal(*one) for one in inputs)
        stage.owns_maps = True
        shared, forwards = [], MoDBlock.forward
        with pytest.MonkeyPatch.context() as patch:

            def seen(block, x, *rest):
                y = forwards(block, x, *rest)
                shared.append(y.data_ptr() == x.data_ptr())
                return y

            patch.setattr(MoDBlock, "forward", seen)
            kept = x.clone()
            assert torch.equal(stage(x), expected) and torch.equal(x, kept)
        unchanged = MoDStage(nn.Identity(), *stage)
        unchanged.owns_maps = True
        assert torch.equal(unchanged(x), expected) and torch.equal(x, kept)
    assert shared == ([False] * 3 if watched else [False, True, True])
    assert stage[1:].owns_maps and not MoDStage(*stage).owns_maps


def test_torch_fx_traces_it():
    """Its standard blocks in parts, the MoD blocks as a node each."""
    stage, plain = make_stages(Bottleneck)
    accelerate(stage.eval())
    stage[1].overwrite_input = False  # a map before it is wanted
    network = nn.Sequential(OrderedDict(stage=stage)).eval()
    x = torch.randn(2, 32, 10, 10)
    names = get_graph_node_names(network)[1]
    assert "stage.0.conv1" in names and "stage.1" in names
    traced = create_feature_extractor(network, ["stage.0.relu_2", "stage.3"])
    assert isinstance(traced.get_submodule("stage.1"), MoDBlock)
    with torch.no_grad():
        found, first, last = traced(x), plain.eval()[0](x), plain(x)
    assert relative_norm(found["stage.0.relu_2"], first) < 1e-5 and relative_norm(found["stage.3"], last) < 1e-5


@pytest.mark.parametrize("amp", [torch.bfloat16])
def test_autocast(amp):
    """Under autocast the branch may be narrower than the identity: torchvision's own addition then."""
    stage, plain = make_stages(Bottleneck)
    x = torch.randn(2, 32, 10, 10)
    with torch.autocast("cpu", amp), use_backend("reference"):
        y, expected = stage(x), plain(x)
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        y.float().sum().backward()


def test_one_graph_under_compile():
    torch._dynamo.reset()
    stage, plain = make_stages(Bottleneck)
    stage.eval(), plain.eval()
    x = torch.randn(2, 32, 10, 10)
    with torch.no_grad():
        y = torch.compile(stage, fullgraph=True, backend="aot_eager")(x)
        assert relative_norm(y, plain(x)) < VALUES[torch.float32]


class Doubled(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def subclass(stage):
    stage[0].__class__ = Doubled


def hook(stage):
    stage[0].register_forward_hook(lambda module, args, output: output * 2)


def hook_on_the_mod_block(stage):
    stage[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_on_the_relu(stage):
    stage[0].relu.register_forward_hook(lambda module, args, output: output * 2)


def other_activation(stage):
    stage[0].relu = nn.SiLU()


def replaced_forward(stage):
    block = stage[0]
    block.forward = lambda x: BasicBlock.forward(block, x) * 2


@pytest.mark.parametrize(
    "change", [subclass, hook, hook_on_the_mod_block, hook_on_the_relu, other_activation, replaced_forward]
)
def test_whatever_is_not_standard_runs_as_it_is(change, handed_over):
    stage, plain = make_stages(BasicBlock)
    stage.eval(), plain.eval()
    change(stage)
    change(plain)
    x = torch.randn(2, 32, 10, 10)
    with torch.no_grad(), use_backend("reference"):
        y = stage(x)
        assert handed_over == [False, True]  # only the second pair
        assert torch.equal(y, plain(x))


def test_slices_and_other_modules():
    stage, plain = make_stages(BasicBlock)
    stage.eval(), plain.eval()
    assert type(stage[:2]) is MoDStage
    x = torch.randn(2, 32, 10, 10)
    with torch.no_grad(), use_backend("reference"):
        assert torch.equal(stage[:2](x), plain[:2](x))
        y = torch.relu(plain(x))
        assert torch.equal(MoDStage(*stage, nn.ReLU())(x), y)
        assert torch.equal(MoDStage()(x), x)

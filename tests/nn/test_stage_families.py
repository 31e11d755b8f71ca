"""MoDStage on the blocks of MobileNetV2, VGG and ConvNeXt: the numbers of a Sequential, and who pooled."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.convnext import CNBlock
from torchvision.models.mobilenetv2 import InvertedResidual

from mod_kernels import MoDBlock, functional, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU
from mod_kernels.nn import MoDStage, NarrowConv, NarrowConvNeXt, NarrowInvertedResidual

C, K = 32, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def mod(narrow):
    return MoDBlock(C, narrow, K, reduction=4, overwrite_input=True)


def mobilenet():
    """The first block has no shortcut: there is nothing to add, and its MoD block pools for itself."""
    narrow = NarrowInvertedResidual
    return [
        InvertedResidual(16, C, 2, 6),
        mod(narrow(K)),
        InvertedResidual(C, C, 1, 6),
        mod(narrow(K)),
        InvertedResidual(C, C, 1, 6),
    ]


def vgg():
    layers = []
    for channels in (16, C):
        layers += [nn.Conv2d(channels, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(inplace=True)]
        layers += [mod(NarrowConv(K, bias=True)), nn.MaxPool2d(2)]
    return layers


def convnext():
    start = nn.Conv2d(16, C, 2, 2)
    blocks = [CNBlock(C, 0.5, 0.3), mod(NarrowConvNeXt(K, layer_scale=0.5))]
    return [start, *blocks, CNBlock(C, 0.5, 0.3), mod(NarrowConvNeXt(K, layer_scale=0.5))]


# How many endings of each pool for a MoD block, in inference and in training as a pair with it.
POOLED = {mobilenet: (1, 0), vgg: (2, 2), convnext: (2, 0)}
FAMILIES = list(POOLED)


def make_stages(family, dtype=torch.float32):
    """A MoDStage and a nn.Sequential with the same weights, norms as of a trained network."""
    stage = MoDStage(*family()).to(dtype)
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    plain = nn.Sequential(*copy.deepcopy(list(stage)))
    assert list(stage.state_dict()) == list(plain.state_dict())
    return stage, plain


class Ran(TorchDispatchMode):
    """The names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))

    def count(self, name):
        return self.names.count(f"mod_kernels_cpu.{name}.default")


@pytest.fixture
def endings(monkeypatch):
    """(relu, whether something was added) of each call of ``add_relu_pool_``."""
    calls, op = [], functional.add_relu_pool_

    def recording(a, b=None, relu=True):
        calls.append((relu, b is not None))
        return op(a, b, relu)

    monkeypatch.setattr(functional, "add_relu_pool_", recording)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_of_a_sequential(family, backend, layout, endings):
    stage, plain = make_stages(family, torch.float64)
    stage.eval(), plain.eval()
    x = torch.randn(2, 16, 10, 10, dtype=torch.float64).to(memory_format=layout)
    kept = x.clone()
    with torch.no_grad(), use_backend(backend):
        with Ran() as ran:
            y = stage(x)
        expected = plain(x)
    assert relative_norm(y, expected) < VALUES[torch.float64]
    assert torch.equal(x, kept)
    assert endings == [(family is vgg, family is not vgg)] * POOLED[family][0]
    if backend == "auto" and CPU.library is not None:
        assert ran.count("add_relu_pool_") == POOLED[family][0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradients_of_a_sequential(family, backend, endings):
    stage, plain = make_stages(family, torch.float64)
    x = torch.randn(2, 16, 10, 10, dtype=torch.float64, requires_grad=True)
    results = []
    with use_backend(backend):
        for model in (stage, plain):
            torch.manual_seed(1)  # of the stochastic depth
            with Ran() as ran:
                y = model(x)
            results.append((y, torch.autograd.grad(y.square().sum(), [x, *model.parameters()]), ran))
    (y, got, ran), (expected, wanted, _) = results
    if backend == "auto" and CPU.library is not None:
        assert ran.count("add_relu_pool_") == POOLED[family][1] and endings == []
    assert relative_norm(y.detach(), expected.detach()) < VALUES[torch.float64]
    scale = max(w.norm() for w in wanted)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() < 1e-11 * scale
    for (name, a), b in zip(stage.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12), name


@pytest.mark.parametrize(
    "family, first, parameters",
    [
        (mobilenet, 2, torch.float32),
        (vgg, 0, torch.float32),
        (convnext, 1, torch.float32),
        (convnext, 1, torch.bfloat16),
    ],
)
def test_autocast(family, first, parameters):
    """Where a branch is narrower than its shortcut: the plain addition, in value and dtype."""
    stage, plain = make_stages(family, parameters)
    stage, plain = stage[first:].eval(), plain[first:].eval()
    x = torch.randn(2, 16 if first == 0 else C, 10, 10)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), use_backend("reference"):
        y, expected = stage(x), plain(x)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


class Doubled(InvertedResidual):
    def forward(self, x):
        return super().forward(x) * 2


def hook(module):
    """Doubles the module's output, and keeps what it gave: nobody may write into that."""
    module.register_forward_hook(lambda module, arguments, output: output * 2)


def not_in_place(relu):
    relu.inplace = False


def other_norm(branch):
    branch[-1] = nn.GroupNorm(4, C)


def subclass(block):
    block.__class__ = Doubled


def replaced_forward(block):
    forward = type(block).forward
    block.forward = lambda x: forward(block, x) * 2


@pytest.mark.parametrize(
    "family, where, change",
    [
        (mobilenet, lambda stage: stage[2], hook),
        (mobilenet, lambda stage: stage[2].conv, hook),
        (mobilenet, lambda stage: stage[2].conv[-1], hook),
        (mobilenet, lambda stage: stage[2].conv, other_norm),
        (mobilenet, lambda stage: stage[2], subclass),
        (mobilenet, lambda stage: stage[3], hook),
        (vgg, lambda stage: stage[1], hook),
        (vgg, lambda stage: stage[2], hook),
        (vgg, lambda stage: stage[2], not_in_place),
        (vgg, lambda stage: stage[2], replaced_forward),
        (convnext, lambda stage: stage[1], hook),
        (convnext, lambda stage: stage[1], replaced_forward),
    ],
)
def test_whatever_is_not_standard_runs_as_it_is(family, where, change, endings):
    stage, plain = make_stages(family)
    stage.eval(), plain.eval()
    change(where(stage))
    change(where(plain))
    x = torch.randn(2, 16, 10, 10)
    with torch.no_grad(), use_backend("reference"):
        assert torch.equal(stage(x), plain(x))
    assert len(endings) == POOLED[family][0] - 1


@pytest.mark.parametrize(
    "family, where",
    [
        (mobilenet, lambda stage: stage[2].conv),
        (mobilenet, lambda stage: stage[2].conv[-1]),
        (mobilenet, lambda stage: stage[2].conv[-2]),
        (convnext, lambda stage: stage[1].block),
    ],
)
def test_what_a_hook_has_seen_is_not_written(family, where):
    """Where the plain form would not have written it either."""
    stage, plain = make_stages(family)
    stage.eval(), plain.eval()
    seen = []
    for model in (stage, plain):
        where(model).register_forward_hook(lambda module, arguments, output: seen.append(output))
    x = torch.randn(2, 16, 10, 10)
    with torch.no_grad(), use_backend("reference"):
        stage(x), plain(x)
    assert torch.equal(*seen)


def test_a_hook_inside_the_branch_is_called(endings):
    stage, _ = make_stages(convnext)
    seen = []
    stage[1].block[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        stage.eval()(torch.randn(2, 16, 10, 10))
    assert len(seen) == 1 and len(endings) == 2


def test_a_relu_at_the_start_is_called(endings):
    """Its input is somebody else's, and may be a leaf."""
    stage, plain = make_stages(vgg)
    stage, plain = stage[2:4].eval(), plain[2:4].eval()
    x = torch.randn(2, C, 5, 5)
    with torch.no_grad():
        assert relative_norm(stage(x.clone()), plain(x)) < VALUES[torch.float32]
    assert endings == []

"""MobileNetV2-MoD, VGG-BN-MoD and ConvNeXt-MoD as wholes: numbers, training, torch.compile, torch.export."""

import copy

import pytest
import torch
from torch import nn

from mod_kernels import MoDBlock, accelerate, functional, models, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import MoDStage

FAMILIES = ["mobilenet_v2_mod", "vgg16_bn_mod", "convnext_tiny_mod"]

pytestmark = pytest.mark.usefixtures("one_thread")


def build(name, **options):
    """As trained: a branch that counts beside its shortcut, statistics other than 0 and 1."""
    if name.startswith("vgg"):
        options["stem"] = "cifar"
    if name.startswith("convnext"):
        options["layer_scale"] = 0.3
    model = getattr(models, name)(num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def without_stages(model):
    """The same modules in plain Sequentials."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, MoDStage):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Sequential(*module))
    assert not [module for module in model.modules() if isinstance(module, MoDStage)]
    return model


@pytest.mark.parametrize(
    "name, pooled",
    [
        ("mobilenet_v2_mod", 1),  # stages of four blocks: the last MoD block alone follows a shortcut
        ("mobilenet_v2_mod_l", 1),
        ("vgg16_bn_mod", 5),
        ("vgg19_bn_mod", 8),
        ("convnext_tiny_mod", 7),
        ("convnext_small_mod", 16),
    ],
)
def test_numbers_and_keys_are_the_plain_ones(name, pooled, monkeypatch):
    calls, op = [], functional.add_relu_pool_
    monkeypatch.setattr(functional, "add_relu_pool_", lambda *arguments: calls.append(1) or op(*arguments))
    model = build(name).double().eval()
    plain = without_stages(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    kept = x.clone()
    with torch.no_grad():
        with use_backend("reference"):
            expected = plain(x)
        assert calls == []
        assert relative_norm(model(x), expected) < VALUES[torch.float64]
        assert len(calls) == pooled
        assert relative_norm(accelerate(model)(x), expected) < VALUES[torch.float64]
        assert len(calls) == 2 * pooled
    assert torch.equal(x, kept)
    assert not [block for block in model.modules() if isinstance(block, MoDBlock) and block._fused is None]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_under_compile(name):
    torch._dynamo.reset()
    model = build(name).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert relative_norm(y, expected) < VALUES[torch.float32]


@pytest.mark.parametrize("name", FAMILIES)
def test_export_is_plain_aten(name):
    model = accelerate(build(name)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        names = {str(target) for target in targets if isinstance(target, torch._ops.OpOverload)}
        assert "aten.topk.default" in names and all(name.startswith("aten.") for name in names), names
        assert relative_norm(program.module()(x), model(x)) < VALUES[torch.float32]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_gives_the_plain_gradients(name):
    """Dropout and stochastic depth drawn alike."""
    model = build(name).double()
    plain = without_stages(model)
    x, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    for one in (model, plain):
        torch.manual_seed(3)
        nn.functional.cross_entropy(one(x), target).backward()
    scale = max(parameter.grad.norm() for parameter in plain.parameters())
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-10 * scale, key
    # The last one's: of four hidden units, as the first stages have, all may be dead, and ConvNeXt's block of one
    # channel gives nothing at first.
    assert [p for key, p in model.named_parameters() if "selector.fc2" in key][-1].grad.any()

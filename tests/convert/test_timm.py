"""convert: timm's networks."""

import pytest
import torch

from mod_kernels import accelerate, convert
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import (
    MoDStage,
)

from .networks import by_hand, mod_blocks, quietly, shapes

pytestmark = pytest.mark.usefixtures("one_thread")


TIMM = {  # with single-block stages or not, MoD blocks
    "resnet18": 4,
    "resnet50": 7,
    "mobilenetv2_100": 6,
    "vgg16_bn": 5,
    "convnext_tiny": 7,
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        dense = timm.create_model(name, num_classes=3)
        model = quietly(timm.create_model(name, num_classes=3), c=16)
    assert len(mod_blocks(model)) == TIMM[name]
    theirs, ours = shapes(dense), shapes(model)
    replaced = [f"{block}." for block in mod_blocks(model)]
    if name == "vgg16_bn":  # a MoD block stands for a convolution with the norm behind it
        replaced += [f"features.{int(block.rpartition('.')[2]) + 1}." for block in mod_blocks(model)]
    assert {k: v for k, v in theirs.items() if not k.startswith(tuple(replaced))} == {
        k: v for k, v in ours.items() if not k.startswith(tuple(replaced))
    }


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto"])
def test_timm_numbers(name):
    timm = pytest.importorskip("timm")
    model = quietly(timm.create_model(name, num_classes=3), c=8)
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    stages = [module for module in model.modules() if type(module) is MoDStage]
    model.eval()
    stage, seen = stages[0], []
    stage.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    stage.register_forward_hook(lambda _, inputs, y: seen.append(y.clone()))
    with torch.no_grad():
        before = model(x)
        assert relative_norm(seen[1], by_hand(stage, seen[0])) < len(stage) * VALUES[torch.float32]
        assert relative_norm(accelerate(model)(x), before) < 1e-4


def test_timm_blocks_start_as_timms():
    timm = pytest.importorskip("timm")
    block = convert(timm.create_model("resnet18"), c=1).layer4[1].conv_block
    assert block.conv1.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    assert not block.bn2.weight.any() and (block.bn1.weight == 1).all()
    depthwise = quietly(timm.create_model("mobilenetv2_100"), c=1).blocks[5][1].conv_block.conv2
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)


def test_timm_squeeze_and_excitation_is_refused():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("seresnet50")
    with pytest.raises(ValueError, match="layer1: it has se, a SEModule"):
        convert(model)


@pytest.mark.parametrize("name", TIMM)
def test_timm_finds_its_maps(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        dense, model = (timm.create_model(name, num_classes=3).eval() for _ in range(2))
        quietly(model, c=16)
        x = torch.randn(2, 3, 64, 64)
        theirs, ours = (one.forward_intermediates(x, intermediates_only=True) for one in (dense, model))
    assert [one.shape for one in ours] == [one.shape for one in theirs]


def test_timm_keeps_the_maps_it_hands_out():
    """Each is the input of a standard block, and may be that of a MoD block."""
    timm = pytest.importorskip("timm")
    model = accelerate(quietly(timm.create_model("vgg16_bn", num_classes=3), c=16)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        of_layers, y = [], x
        for layer in model.features:
            y = layer(y).clone()
            of_layers.append(y)
    assert len(maps) >= len(model.feature_info)
    for one in maps:
        assert any(torch.equal(one, other) for other in of_layers)

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
    if name != "vgg16_bn":  # whose indices move up
        theirs, ours = shapes(dense), shapes(model)
        replaced = tuple(f"{block}." for block in mod_blocks(model))
        assert {k: v for k, v in theirs.items() if not k.startswith(replaced)} == {
            k: v for k, v in ours.items() if not k.startswith(replaced)
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

"""ConvNeXt-MoD: which blocks are MoD, how they start, options."""

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlock

from mod_kernels import MoDBlock, models
from mod_kernels.nn import MoDStage, NarrowConvNeXt

LAYERS = {"convnext_tiny_mod": (3, 3, 9, 3), "convnext_small_mod": (3, 3, 27, 3)}


@pytest.mark.parametrize("name", LAYERS)
def test_blocks_with_an_odd_index_are_mod(name):
    with torch.device("meta"):
        model, dense = getattr(models, name)(position="last", c=48), models.dense_peer(name)
    for place, blocks, width in zip((1, 3, 5, 7), LAYERS[name], (96, 192, 384, 768), strict=True):
        stage, standard = model.features[place], dense.features[place]
        assert type(stage) is MoDStage and stage.owns_maps and len(stage) == blocks == len(standard)
        for i, (block, theirs) in enumerate(zip(stage, standard, strict=True)):
            if i % 2:
                assert type(block) is MoDBlock and type(block.conv_block) is NarrowConvNeXt
                assert block.channels == width and block.k == width // 48 and block.position == "last"
            else:
                assert type(block) is CNBlock and list(block.state_dict()) == list(theirs.state_dict())
                assert block.stochastic_depth.p == theirs.stochastic_depth.p


@pytest.mark.parametrize("name", LAYERS)
def test_forward(name):
    model = getattr(models, name)(num_classes=7).eval()
    assert [stage[1].k for stage in (model.features[i] for i in (1, 3, 5, 7))] == [1, 2, 4, 8]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_blocks_start_as_torchvisions():
    model = models.convnext_tiny_mod(c=8, layer_scale=0.5)
    narrow, standard = model.features[7][1].conv_block, model.features[7][0]
    assert torch.equal(narrow.gamma, torch.full((96,), 0.5)) and (standard.layer_scale == 0.5).all()
    for linear in (narrow.pwconv1, standard.block[3]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02) and not linear.bias.any()
    selector = model.features[7][1].selector.fc1.weight  # nn.Linear's own: uniform within 1 / sqrt(768)
    assert selector.std().item() == pytest.approx((1 / 768 / 3) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "wrong, message",
    [({"c": 0}, "c must be an int of at least 1, got 0"), ({"position": "middle"}, "position must be one of")],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        models.convnext_tiny_mod(**wrong)


def test_torchvisions_options_reach_it():
    with torch.device("meta"):
        model = models.convnext_tiny_mod(stochastic_depth_prob=0.5)
    assert model.features[7][2].stochastic_depth.p == 0.5
    assert isinstance(model.classifier[2], nn.Linear) and model.classifier[2].out_features == 1000

"""MobileNetV2-MoD: the paper's counts, which blocks are MoD, options."""

import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from mod_kernels import MoDBlock, models
from mod_kernels.nn import MoDStage, NarrowInvertedResidual

from .support import multiply_adds, parameters, rounded

PRINTED = {"mobilenet_v2_mod": "2.94", "mobilenet_v2_mod_l": "3.34"}
# With MoD blocks at which places of ``features``.
PLACES = {"mobilenet_v2_mod": [3, 5, 8, 10, 12, 15], "mobilenet_v2_mod_l": [3, 5, 8, 10, 12, 15]}


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert rounded(parameters(model), PRINTED[name]) == PRINTED[name]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "build, printed, counted",
    [
        (models.mobilenet_v2_mod, 0.221, 0.2060),
        (models.mobilenet_v2_mod_l, 0.345, 0.3269),
        (lambda: models.dense_peer("mobilenet_v2_mod"), 0.320, 0.3008),
    ],
)
def test_multiply_adds(build, printed, counted):
    """The paper's are 5 to 7 % above those of the products and convolutions, the dense network's too: they are met
    with what norms and activations take, which is more of these networks than of the others.
    """
    products, with_elements = multiply_adds(build(), 224)
    assert products / 1e9 == pytest.approx(counted, abs=1e-4)
    assert products / 1e9 < 0.95 * printed
    assert with_elements / 1e9 == pytest.approx(printed, rel=0.02)


@pytest.mark.parametrize("name", PRINTED)
def test_blocks_with_an_odd_index_are_mod(name):
    with torch.device("meta"):
        model = getattr(models, name)(position="last", c=8)
    assert type(model.features) is MoDStage and model.features.owns_maps
    blocks = {i: block for i, block in enumerate(model.features) if isinstance(block, MoDBlock)}
    assert list(blocks) == PLACES[name]
    for i, block in blocks.items():
        assert block.k == block.channels // 8 and block.position == "last"
        assert type(block.conv_block) is NarrowInvertedResidual
        assert block.conv_block.conv1.out_channels == 6 * block.k
        assert model.features[i - 1].out_channels == block.channels


@pytest.mark.parametrize("name", PRINTED)
def test_forward(name):
    model = getattr(models, name)(num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_standard_blocks_are_torchvisions():
    """And start as it starts them; so do the narrowed convolutions."""
    model, dense = models.mobilenet_v2_mod(c=1), models.dense_peer("mobilenet_v2_mod")
    for ours, theirs in zip(model.features, dense.features, strict=True):
        if isinstance(ours, InvertedResidual):
            assert list(ours.state_dict()) == list(theirs.state_dict())
    wide = model.features[15].conv_block.conv1.weight  # (960, 160, 1, 1): kaiming, fan_out
    assert wide.std().item() == pytest.approx((2 / 960) ** 0.5, rel=0.02)
    assert model.features[14].conv[0][0].weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)


def test_torchvisions_options_reach_it():
    model = models.mobilenet_v2_mod(
        width_mult=0.5, norm_layer=lambda channels: nn.GroupNorm(1, channels), dropout=0
    )
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model.features[15].channels == 80 and model.features[15].k == 5
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize(
    "wrong, message",
    [({"c": 0}, "c must be an int of at least 1, got 0"), ({"position": "middle"}, "position must be one of")],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        models.mobilenet_v2_mod(**wrong)

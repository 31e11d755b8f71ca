"""VGG-BN-MoD: the paper's counts, which convolutions are MoD, both forms."""

import pytest
import torch
from torch import nn
from torchvision.models import vgg16_bn

from mod_kernels import MoDBlock, models
from mod_kernels.nn import MoDStage, NarrowConv

from .support import multiply_adds, parameters, rounded

CIFAR = {"stem": "cifar", "num_classes": 10}
PRINTED = {"vgg16_bn_mod": "9.83", "vgg19_bn_mod": "9.91"}
PRINTED_DENSE = {"vgg16_bn_mod": "15.25", "vgg19_bn_mod": "20.57"}
# Widths of the MoD blocks.
WIDTHS = {
    "vgg16_bn_mod": [64, 128, 256, 512, 512],
    "vgg19_bn_mod": [64, 128, 256, 256, 512, 512, 512, 512],
}


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        model, dense = getattr(models, name)(**CIFAR), models.dense_peer(name, **CIFAR)
    assert rounded(parameters(model), PRINTED[name]) == PRINTED[name]
    assert rounded(parameters(dense), PRINTED_DENSE[name]) == PRINTED_DENSE[name]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name, printed, dense", [("vgg16_bn_mod", 155, 315), ("vgg19_bn_mod", 155, 400)])
def test_multiply_adds_are_the_papers(name, printed, dense):
    products, _ = multiply_adds(getattr(models, name)(**CIFAR), 32)
    assert products / 1e6 == pytest.approx(printed, rel=0.02)
    products, _ = multiply_adds(models.dense_peer(name, **CIFAR), 32)
    assert products / 1e6 == pytest.approx(dense, rel=0.02)


@pytest.mark.parametrize("name", PRINTED)
def test_convolutions_with_an_odd_index_are_mod(name):
    with torch.device("meta"):
        model = getattr(models, name)(position="last", c=16)
    assert type(model.features) is MoDStage and model.features.owns_maps
    layers = list(model.features)
    blocks = [layer for layer in layers if isinstance(layer, MoDBlock)]
    assert [block.channels for block in blocks] == WIDTHS[name]
    for block in blocks:
        assert block.k == block.channels // 16 and block.position == "last"
        assert type(block.conv_block) is NarrowConv and block.conv_block.final_relu
        before = layers[layers.index(block) - 3 :][:3]
        assert [type(layer) for layer in before] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_the_forms():
    with torch.device("meta"):
        dense, torchvisions = models.dense_peer("vgg16_bn_mod", num_classes=7), vgg16_bn(num_classes=7)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (dense, torchvisions)]
    assert shapes[0] == shapes[1] and str(dense) == str(torchvisions).replace("VGG", "StemVGG", 1)
    imagenet = models.vgg16_bn_mod(num_classes=7).eval()
    assert str(imagenet.classifier) == str(torchvisions.classifier)
    cifar = models.vgg16_bn_mod(stem="cifar", num_classes=7).eval()
    assert all(value.device.type == "cpu" for value in cifar.state_dict().values())
    with torch.no_grad():
        assert imagenet(torch.randn(1, 3, 64, 64)).shape == (1, 7)
        assert cifar(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_convolutions_start_as_torchvisions():
    model = models.vgg16_bn_mod(c=4, stem="cifar")
    narrow = [layer.conv_block for layer in model.features if isinstance(layer, MoDBlock)][-1]
    assert narrow.conv1.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not narrow.conv1.bias.any()
    last = [layer for layer in model.features if isinstance(layer, nn.Conv2d)][-1]
    assert last.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02) and not last.bias.any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"c": 0}, "c must be an int of at least 1, got 0"),
        ({"position": "middle"}, "position must be one of"),
        ({"stem": "mnist"}, "stem must be one of 'imagenet', 'cifar', got 'mnist'"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        models.vgg16_bn_mod(**wrong)

"""The networks: the paper's parameter counts, shapes, options."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101

import mod_kernels
from mod_kernels import MoDBlock, accelerate, models
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import MoDStage

from .support import multiply_adds, parameters, rounded

# Parameters in millions as arXiv 2409.17016 prints them for ImageNet.
PRINTED = {
    "resnet18_mod": "5.46",
    "resnet26_mod": "11.4",
    "resnet34_mod": "12.93",
    "resnet42_mod": "17.72",
    "resnet50_mod": "18.11",
    "resnet75_mod": "23.10",
    "resnet86_mod": "25.60",
    "resnet101_mod": "29.21",
    "resnet152_mod": "37.46",
}


# Multiply-adds, in thousands of millions, of one image of 224x224.
PRINTED_GMAC = {
    "resnet18_mod": 0.89,
    "resnet26_mod": 1.36,
    "resnet34_mod": 2.06,
    "resnet42_mod": 2.29,
    "resnet50_mod": 2.60,
    "resnet75_mod": 3.48,
    "resnet86_mod": 3.92,
    "resnet101_mod": 4.58,
    "resnet152_mod": 6.34,
}
PRINTED_GMAC_DENSE = {"resnet18_mod": 1.82, "resnet34_mod": 3.68, "resnet50_mod": 4.13, "resnet101_mod": 7.80}


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert rounded(parameters(model), PRINTED[name]) == PRINTED[name]


def test_shapes_without_values():
    with torch.device("meta"), torch.no_grad():
        assert models.resnet18_mod()(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRINTED_GMAC)
def test_multiply_adds_are_the_papers(name):
    products, _ = multiply_adds(getattr(models, name)(), 224)
    assert products / 1e9 == pytest.approx(PRINTED_GMAC[name], rel=0.02)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRINTED_GMAC_DENSE)
def test_multiply_adds_of_the_dense_peers_are_the_papers(name):
    products, _ = multiply_adds(models.dense_peer(name), 224)
    assert products / 1e9 == pytest.approx(PRINTED_GMAC_DENSE[name], rel=0.02)


def test_what_the_papers_counts_leave_out():
    """The MoD counts hold the last layer. Of the dense peers only the Bottleneck ones do: the dense ResNet18
    and 34 are printed without their 513,000 parameters of ``fc``, so ratios between those columns are off."""
    with torch.device("meta"):
        dense18, dense34, dense50, dense101 = resnet18(), resnet34(), resnet50(), resnet101()
    assert rounded(parameters(dense18) - parameters(dense18.fc), "11.18") == "11.18"
    assert rounded(parameters(dense34) - parameters(dense34.fc), "21.28") == "21.28"  # printed 21.29
    assert rounded(parameters(dense50), "25.56") == "25.56"
    assert rounded(parameters(dense101), "44.55") == "44.55"


def test_every_name_is_listed_and_tested():
    assert list(PRINTED) == [name for name in models.list_models() if name.startswith("resnet")]


@pytest.mark.parametrize("name", ["resnet34_mod", "resnet50_mod"])
def test_blocks_with_an_odd_index_are_mod(name):
    with torch.device("meta"):
        model = getattr(models, name)(position="last", c=16)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        assert type(stage) is MoDStage and stage.owns_maps
        for i, block in enumerate(stage):
            assert isinstance(block, MoDBlock) == (i % 2 == 1)
            if i % 2:
                assert block.k == block.channels // 16 and block.position == "last"


@pytest.mark.parametrize("name", PRINTED)
def test_forward(name):
    model = getattr(models, name)(num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_stems():
    imagenet, cifar = models.resnet18_mod(), models.resnet18_mod(stem="cifar", num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert imagenet.layer1(imagenet.maxpool(imagenet.conv1(x))).shape == (2, 64, 8, 8)
        assert cifar.layer1(cifar.maxpool(cifar.conv1(x))).shape == (2, 64, 32, 32)
        assert cifar.eval()(x).shape == (2, 10)


def test_torchvisions_options_reach_it():
    model = models.resnet50_mod(
        norm_layer=lambda channels: nn.GroupNorm(1, channels),
        zero_init_residual=True,
        replace_stride_with_dilation=[False, True, True],
    ).eval()
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    # As in torchvision, but with MoD blocks where every second branch was: each starts as the identity.
    x = torch.randn(2, 256, 4, 4)
    with torch.no_grad():
        assert torch.equal(model.layer1[1](x.clone()), x)
        y = model.layer3(model.layer2(x))
    assert y.shape == (2, 1024, 2, 2)  # layer3 dilates where it would stride
    assert model.layer4[0].conv2.dilation == (2, 2) and model.layer4[2].conv2.dilation == (4, 4)


def test_narrow_convolutions_start_as_torchvisions():
    model = models.resnet18_mod(c=2)
    weight = model.layer4[1].conv_block.conv1.weight  # (256, 256, 3, 3): kaiming, fan_out
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"c": 0}, "c must be an int of at least 1, got 0"),
        ({"c": 1.5}, "c must be an int of at least 1, got 1.5"),
        ({"position": "middle"}, "position must be one of"),
        ({"stem": "mnist"}, "stem must be one of 'imagenet', 'cifar', got 'mnist'"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        models.resnet18_mod(**wrong)


def test_export_is_plain_aten():
    model = accelerate(models.resnet18_mod(stem="cifar", num_classes=10)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        names = {str(target) for target in targets if isinstance(target, torch._ops.OpOverload)}
        assert "aten.topk.default" in names and all(name.startswith("aten.") for name in names), names
        assert not [t for t in targets if isinstance(t, torch._ops.HigherOrderOperator)]
        assert relative_norm(program.module()(x), model(x)) < VALUES[torch.float32]


def test_training_step():
    model = models.resnet18_mod(stem="cifar", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_importing_the_package_leaves_torchvision_alone():
    code = "import sys, mod_kernels; assert 'torchvision' not in sys.modules; mod_kernels.models.resnet18_mod"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'model'"):
        mod_kernels.model  # noqa: B018

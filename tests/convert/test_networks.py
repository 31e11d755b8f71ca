"""convert: which blocks become MoD blocks, what stays, and the numbers."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import _mobilenet_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation import fcn_resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

from mod_kernels import MoDBlock, accelerate, convert, models
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import (
    MoDStage,
    NarrowBasicBlock,
    NarrowConv,
)

from .networks import HOSTS, Network, Plain, by_hand, convnext, mod_blocks, quietly, resnet, shapes, vgg

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=HOSTS)
def host(request):
    build, names, narrow = HOSTS[request.param]
    return build(), names, narrow


def test_odd_blocks_are_replaced(host):
    model, names, narrow = host
    assert quietly(model, c=8, position="last") is model
    blocks = mod_blocks(model)
    assert list(blocks) == names
    for block in blocks.values():
        assert type(block.conv_block) is narrow
        assert block.k == block.channels // 8 and block.position == "last"
        assert block.training and all(p.requires_grad for p in block.parameters())


def test_all_else_stays_the_object_it_is(host):
    model, _, _ = host
    before = [id(module) for module in model.modules()]
    values = {id(p): p.detach().clone() for p in model.parameters()}
    quietly(model, c=8)
    fresh = {id(module) for block in mod_blocks(model).values() for module in block.modules()}
    kept = [id(module) for module in model.modules() if id(module) not in fresh]
    assert kept == [one for one in before if one in set(kept)] and len(before) > len(kept) > len(before) / 3
    theirs = {id(p) for block in mod_blocks(model).values() for p in block.parameters()}
    for parameter in model.parameters():
        assert id(parameter) in theirs or torch.equal(parameter, values[id(parameter)])


def test_forward_and_backward(host):
    model, _, _ = host
    quietly(model, c=8)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, block in mod_blocks(model).items():
        for key, parameter in block.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{name}.{key}"


@pytest.mark.parametrize("accelerated", [False, True])
def test_numbers_are_those_of_the_stages_run_by_hand(host, accelerated):
    model, _, _ = host
    quietly(model, c=8).eval()
    stages = [module for module in model.modules() if type(module) is MoDStage]
    assert stages
    seen = []
    twins = [copy.deepcopy(stage) for stage in stages]
    for stage in stages:
        stage.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        stage.register_forward_hook(lambda _, inputs, y: seen.append(y.clone()))
    if accelerated:
        accelerate(model)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
        for twin, x, y in zip(twins, seen[::2], seen[1::2], strict=True):
            assert relative_norm(y, by_hand(twin, x)) < len(twin) * VALUES[torch.float32]


def test_it_is_our_resnet():
    """The same keys and shapes, and, with its state, the same numbers."""
    converted = convert(resnet(layers=(2, 2, 3, 2)), c=8)
    ours = models.MoDResNet(BasicBlock, (2, 2, 3, 2), c=8, num_classes=5)
    assert shapes(converted) == shapes(ours)
    ours.load_state_dict(converted.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(converted.eval()(x), ours.eval()(x))
    assert [str(block) for block in mod_blocks(converted).values()] == [
        str(block) for block in mod_blocks(ours).values()
    ]


@pytest.mark.parametrize(
    "dense, c",
    [("resnet50", 64), ("resnet34", 32), ("mobilenet_v2", 16), ("vgg16_bn", 64), ("convnext_tiny", 96)],
)
def test_keys_are_those_of_our_models(dense, c):
    if not hasattr(models, f"{dense}_mod"):
        pytest.skip(f"models has no {dense}_mod")
    with torch.device("meta"):
        converted = quietly(getattr(torchvision.models, dense)(), c)
        assert shapes(converted) == shapes(getattr(models, f"{dense}_mod")(c=c))


def test_blocks_start_as_torchvisions():
    model = quietly(resnet(Bottleneck, (1, 1, 1, 2), norm_layer=nn.SyncBatchNorm), c=1)
    block = model.layer4[1].conv_block
    assert block.conv1.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert block.conv2.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    assert (block.bn3.weight == 1).all() and not block.bn3.bias.any()
    narrow = quietly(convnext(), c=1).features[3][1].conv_block
    assert narrow.pwconv1.weight.std().item() == pytest.approx(0.02, rel=0.05) and not narrow.pwconv1.bias.any()
    wide = [block for block in mod_blocks(quietly(vgg(), c=1)).values()][1].conv_block.conv1
    assert wide.weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05) and not wide.bias.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_norm_is_the_hosts(frozen):
    def norm_layer(channels):
        return FrozenBatchNorm2d(channels, eps=0.25) if frozen else nn.BatchNorm2d(channels, 0.25, momentum=0.5)

    norm = quietly(resnet(norm_layer=norm_layer), c=8).layer1[1].conv_block.bn1
    assert type(norm) is (FrozenBatchNorm2d if frozen else nn.BatchNorm2d) and norm.eps == 0.25
    assert frozen or norm.momentum == 0.5


def test_mode_dtype_device_and_frozen_hosts():
    model = resnet().eval().double().requires_grad_(False)
    block = quietly(model, c=8).layer1[1]
    assert not any(module.training for module in block.modules())
    assert all(p.dtype == torch.float64 and p.requires_grad for p in block.parameters())
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    assert all(p.is_meta for p in quietly(resnet().to("meta"), c=8).parameters())


def test_k_is_at_least_one():
    assert {block.k for block in mod_blocks(quietly(resnet(), c=10_000)).values()} == {1}


def test_single_blocks_are_named():
    with pytest.warns(UserWarning, match=r"left 1 of 4 stages alone:\n  layer2: a single BasicBlock of its shape"):
        convert(resnet(), c=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(resnet(layers=(2, 2, 2, 2)), c=8)


def test_hooks_and_shared_stages_stay():
    """The Sequential is the same object, wherever it is held."""
    stage = resnet().layer1
    calls = []
    stage.register_forward_hook(lambda *_: calls.append(1))
    model = nn.ModuleDict({"a": stage, "b": nn.Sequential(OrderedDict(inner=stage))})
    convert(model, c=8)
    assert model["a"] is stage and model["b"].inner is stage and type(stage) is MoDStage
    model["b"](torch.randn(1, 64, 8, 8))
    assert calls == [1]


def test_names_of_a_row_stay():
    row = nn.Sequential(OrderedDict(first=BasicBlock(16, 16), second=BasicBlock(16, 16)))
    assert [name for name, _ in convert(row, c=4).named_children()] == ["first", "second"]
    assert isinstance(row.second, MoDBlock)


def test_segmentation():
    torch.manual_seed(0)
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    convert(model, c=64)
    assert len(mod_blocks(model)) == 7 and type(model.backbone["layer4"]) is MoDStage
    assert model.backbone["layer4"][2].conv2.dilation == (4, 4)
    assert model.backbone["layer4"][1].conv_block.conv2.dilation == (1, 1)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)["out"]
        assert before.shape == (1, 3, 64, 64)
        assert relative_norm(accelerate(model)(x)["out"], before) < 1e-4


def test_detection():
    model = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).eval()
    convert(model, c=64)
    assert len(mod_blocks(model)) == 7
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        before = model.backbone(image[None])
        assert set(model([image])[0]) == {"boxes", "labels", "scores"}
        after = accelerate(model).backbone(image[None])
        assert set(model([image])[0]) == {"boxes", "labels", "scores"}
    for name, level in before.items():
        assert relative_norm(after[name], level) < 1e-4


@pytest.mark.parametrize(
    "build", [lambda: quietly(torchvision.models.mobilenet_v2(), c=16), models.mobilenet_v2_mod]
)
def test_a_flat_rows_inner_maps_may_be_read(build):
    """torchvision's FPN keeps the outputs of MobileNetV2's strided blocks, each a MoD block's input."""
    converted = build().eval()
    x = torch.randn(1, 3, 64, 64)
    kept = {}
    with torch.no_grad():
        y = x
        for i, block in enumerate(converted.features):
            y = kept[str(i)] = block(y).clone()
        pyramid = _mobilenet_extractor(
            accelerate(converted), fpn=True, trainable_layers=0, returned_layers=[2, 3, 4]
        )
        got = pyramid.body(x)
    assert len(got) == 3 and isinstance(converted.features[8], MoDBlock)
    for name, place in zip(got, ("4", "7", "14"), strict=True):
        assert isinstance(converted.features[int(place) + 1], MoDBlock)
        assert relative_norm(got[name], kept[place]) < VALUES[torch.float32] * 10


def test_named_stages():
    model = convert(resnet(), c=8, stages=["layer3"])
    assert list(mod_blocks(model)) == ["layer3.1"] and model.layer3.owns_maps
    model = convert(resnet(), c=8, stages={"layer3": [2, 1], "layer1": [0]})
    assert list(mod_blocks(model)) == ["layer1.0", "layer3.1", "layer3.2"]
    x = torch.randn(2, 3, 32, 32)
    before = []  # index 0 reads what came before the stage: its input stays as it is
    model.layer1.register_forward_pre_hook(lambda module, args: before.extend((args[0], args[0].clone())))
    with torch.no_grad():
        model.eval()(x)
    assert torch.equal(*before)


def test_what_stands_before_a_named_block_may_be_anything():
    row = nn.Sequential(nn.Dropout(), nn.Identity(), Bottleneck(64, 16), Bottleneck(64, 16))
    model = convert(nn.Sequential(OrderedDict(stage=row)), c=8, stages={"stage": [2]}).eval()
    x = torch.randn(2, 64, 8, 8)
    kept = x.clone()
    with torch.no_grad():
        assert not torch.equal(model(x), x) and torch.equal(x, kept)


def test_blocks_that_pad_by_another_module():
    class Reflecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3))

        def forward(self, x):
            return x + self.branch(x)

    model = nn.Sequential(OrderedDict(stage=nn.Sequential(Reflecting(), Reflecting())))
    assert len(mod_blocks(convert(model, c=2, stages=["stage"], conv_block=NarrowConv))) == 1


@pytest.mark.parametrize("row", [nn.Sequential, nn.ModuleList])
def test_other_classes(row):
    model = Network(Plain(8, 16, 2), Plain(16), Plain(16), Plain(16), row=row)
    convert(model, c=4, stages=["stage"], conv_block=lambda k: NarrowConv(k))
    assert list(mod_blocks(model)) == ["stage.1", "stage.3"]
    assert model.stage[3].channels == 16 and model.stage[3].k == 4
    assert model(torch.randn(1, 8, 8, 8)).shape == (1, 16, 4, 4)


def test_a_row_of_convolutions_is_a_stage_where_it_is_named():
    row = [layer for i in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    with pytest.raises(ValueError, match="has none of the classes known"):
        convert(Network(*row))
    model = convert(Network(*row), c=2, stages=["stage"])
    assert list(mod_blocks(model)) == ["stage.3"] and len(model.stage) == 7


def test_conv_block_for_known_classes():
    model = convert(resnet(layers=(2, 2, 2, 2)), c=8, conv_block=lambda k: NarrowBasicBlock(k, final_relu=True))
    assert all(block.conv_block.final_relu for block in mod_blocks(model).values())


def test_what_a_narrowed_block_would_lack():
    """A stage is left alone where the narrowed block would be of another kind than its host."""
    resnext = resnet(Bottleneck, (2, 2, 2, 2), groups=2, width_per_group=32)
    resnext.layer4 = resnet(Bottleneck, (1, 1, 1, 2)).layer4
    with pytest.warns(UserWarning, match=r"layer1: its convolution 2 has weights \(64, 32, 3, 3\)"):
        convert(resnext, c=64)
    assert list(mod_blocks(resnext)) == ["layer4.1"]
    model = resnet(layers=(2, 2, 2, 2))
    model.layer1[1].relu = nn.SiLU()
    model.layer2[1].bn2 = nn.GroupNorm(4, 128)
    with pytest.warns(UserWarning, match="left 2 of 4") as caught:
        convert(model, c=8)
    assert "its activation 1 is a SiLU, not nn.ReLU" in str(caught[0].message)
    assert "its norm 2 is a GroupNorm, of which no narrowed form is known" in str(caught[0].message)

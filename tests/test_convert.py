"""convert: which blocks become MoD blocks, what stays, the numbers, refusals that leave the model as it was."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import _mobilenet_extractor
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation import fcn_resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

from mod_kernels import MoDBlock, accelerate, convert, models, reference
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import (
    MoDStage,
    NarrowBasicBlock,
    NarrowBottleneck,
    NarrowConv,
    NarrowConvNeXt,
    NarrowInvertedResidual,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def resnet(block=BasicBlock, layers=(2, 1, 3, 2), **kwargs):
    return ResNet(block, list(layers), num_classes=5, **kwargs)


def mobilenet(**kwargs):
    setting = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 32, 1, 2]]
    return MobileNetV2(num_classes=5, inverted_residual_setting=setting, **kwargs)


def vgg():
    layers = torchvision.models.vgg.make_layers([16, 16, "M", 32, 32, 32, "M", 32, "M"], batch_norm=True)
    return nn.Sequential(OrderedDict(features=layers, pool=nn.AdaptiveAvgPool2d(1)))


def convnext(**kwargs):
    setting = [CNBlockConfig(16, 32, 3), CNBlockConfig(32, None, 2)]
    return ConvNeXt(setting, num_classes=5, layer_scale=0.5, **kwargs)


# Builder -> the MoD blocks' names, their conv block.
HOSTS = {
    "basic": (resnet, ["layer1.1", "layer3.1", "layer4.1"], NarrowBasicBlock),
    "bottleneck": (
        lambda: resnet(Bottleneck, (2, 1, 1, 3)),
        ["layer1.1", "layer4.1"],
        NarrowBottleneck,
    ),
    "inverted_residual": (mobilenet, ["features.3", "features.5"], NarrowInvertedResidual),
    "vgg": (vgg, ["features.3", "features.8"], NarrowConv),
    "convnext": (convnext, ["features.1.1", "features.3.1"], NarrowConvNeXt),
}


def quietly(*args, **kwargs):
    """convert, where single-block stages are part of the architecture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="convert left", category=UserWarning)
        return convert(*args, **kwargs)


def mod_blocks(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoDBlock)}


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


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


def by_hand(stage, x):
    """The stage, its MoD blocks in the reference's steps: where a selector's ReLU leaves zeros, logits tie."""
    for block in stage:
        if isinstance(block, MoDBlock):
            fc1, fc2 = block.selector.fc1.weight, block.selector.fc2.weight
            scores, index = reference.select_channels(x, fc1, fc2, block.k)
            z = block.conv_block(reference.gather_channels(x, index))
            x = reference.fuse_channels(x, z, scores, index, block.position)
        else:
            x = block(x)
    return x


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


def test_a_flat_rows_inner_maps_may_be_read():
    """torchvision's FPN keeps the outputs of MobileNetV2's strided blocks, each a MoD block's input."""
    converted = quietly(torchvision.models.mobilenet_v2(), c=16).eval()
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


class Plain(nn.Module):
    """A block of nobody's."""

    def __init__(self, channels, out=None, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, out or channels, 3, stride, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x))


class Network(nn.Module):
    def __init__(self, *blocks, row=nn.Sequential):
        super().__init__()
        self.stage = row(*blocks) if row is nn.Sequential else row(blocks)

    def forward(self, x):
        for block in self.stage:
            x = block(x)
        return x


def test_named_stages():
    model = convert(resnet(), c=8, stages=["layer3"])
    assert list(mod_blocks(model)) == ["layer3.1"] and model.layer3[1].overwrite_input
    model = convert(resnet(), c=8, stages={"layer3": [2, 1], "layer1": [0]})
    assert list(mod_blocks(model)) == ["layer1.0", "layer3.1", "layer3.2"]
    # Index 0 reads what came before the stage.
    assert not any(block.overwrite_input for block in mod_blocks(model).values())


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


def unequal():
    return Network(Plain(8), Plain(8, 16), Plain(16, 16, 2))


def quantized():
    model = resnet()
    model.fc = torch.ao.nn.quantized.dynamic.Linear(512, 5)
    return model


def failing(k):
    """Fails for the stage that comes third."""
    if k > 16:
        raise RuntimeError("no such block")
    return NarrowBasicBlock(k)


class Told(nn.Sequential):
    """A Sequential that does something else with its blocks."""

    def forward(self, x):
        return self[1](self[0](x) + x)


REFUSALS = {
    "no module": (lambda: "resnet50", {}, TypeError, "model must be an nn.Module, got str"),
    "scripted": (lambda: torch.jit.script(Plain(8)), {}, TypeError, "must not be scripted, the model is a"),
    "quantized": (quantized, {}, ValueError, "must not be quantized .*, fc is a torch.ao.nn.quantized"),
    "no stages": (lambda: nn.Sequential(nn.Linear(3, 3)), {}, ValueError, "Sequential has none of the classes"),
    "another's": (lambda: Network(Plain(8), Plain(8)), {}, ValueError, r"rows of blocks: stage \(Plain\)"),
    "another forward": (lambda: Told(BasicBlock(8, 8), BasicBlock(8, 8)), {}, ValueError, "has none of the cla"),
    "single blocks": (lambda: resnet(layers=(1, 1, 1, 1)), {}, ValueError, "has none:\n  layer1: a single Basic"),
    "c of 0": (resnet, {"c": 0}, ValueError, "c must be at least 1, got 0"),
    "c a float": (resnet, {"c": 64.0}, TypeError, "c must be an int, got float"),
    "c a bool": (resnet, {"c": True}, TypeError, "c must be an int, got bool"),
    "position": (resnet, {"position": "middle"}, ValueError, "position must be one of"),
    "stages a string": (resnet, {"stages": "layer1"}, TypeError, "stages must be names of modules or a mapping"),
    "no such stage": (resnet, {"stages": ["layer9"]}, ValueError, "names 'layer9', which is no module of ResNet"),
    "no row": (resnet, {"stages": ["conv1"]}, ValueError, "'conv1' is a Conv2d"),
    "a stage twice": (resnet, {"stages": ["layer1", "layer1"]}, ValueError, "names 'layer1' twice"),
    "nothing named": (resnet, {"stages": []}, ValueError, "must name at least one block"),
    "named, single": (resnet, {"stages": ["layer1", "layer2"]}, ValueError, "'layer2', of which no block can be"),
    "no such index": (resnet, {"stages": {"layer1": [2]}}, ValueError, "got 2, not one of its 2 modules"),
    "index a string": (resnet, {"stages": {"layer1": ["1"]}}, TypeError, "must hold ints, got '1'"),
    "a striding block": (
        resnet,
        {"stages": {"layer3": [0]}},
        ValueError,
        "it goes from 128 to 256 channels with stride 2",
    ),
    "unequal": (
        unequal,
        {"stages": ["stage"], "conv_block": NarrowConv},
        ValueError,
        r"8 to 16 channels, stride 1.*16 to 16 channels, stride 2",
    ),
    "no conv_block": (unequal, {"stages": {"stage": [0]}}, ValueError, "Plain is not a class that convert knows"),
    "a module": (resnet, {"conv_block": NarrowConv(1)}, TypeError, "must be a function that makes a module"),
    "makes none": (resnet, {"conv_block": lambda k: None}, TypeError, "must make a module from k, got NoneType"),
    "made for another k": (resnet, {"conv_block": lambda k: NarrowConv(k + 1)}, ValueError, "it takes"),
    "conv_block fails": (resnet, {"c": 8, "conv_block": failing}, RuntimeError, "no such block"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_the_model_as_it_was(case):
    build, kwargs, error, message = REFUSALS[case]
    model = build()
    if not isinstance(model, nn.Module):
        with pytest.raises(error, match=message):
            convert(model, **kwargs)
        return
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    state = {} if case == "quantized" else {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        convert(model, **kwargs)
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == before
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)


def test_wrapped_for_training_in_parallel():
    """Its reducer would not know the new parameters."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(resnet())
        with pytest.raises(ValueError, match=r"the model is a .*DistributedDataParallel: convert first"):
            convert(model, c=8)
        assert not mod_blocks(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_second_time():
    model = convert(resnet(layers=(2, 2, 2, 2)), c=8)
    with pytest.raises(ValueError, match="ResNet has none"):
        convert(model, c=8)


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

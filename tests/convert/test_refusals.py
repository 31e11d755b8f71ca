"""convert: what it refuses, and that a refusal leaves the model as it was."""

import warnings

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from mod_kernels import convert
from mod_kernels.nn import (
    NarrowBasicBlock,
    NarrowConv,
)

from .networks import Network, Plain, mod_blocks, resnet

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(
    "padding, dilation, fits", [(0, 1, False), (1, 2, False), (2, 2, True), ("same", 1, True)]
)
def test_blocks_that_shrink_a_map(padding, dilation, fits):
    convs = [nn.Conv2d(8, 8, 3, padding=padding, dilation=dilation) for _ in range(2)]
    row = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(*row, nn.MaxPool2d(2))
    if fits:
        assert len(mod_blocks(convert(model, c=2))) == 1
    else:
        with pytest.raises(ValueError, match=r"a single convolution .*stays|for want of padding"):
            convert(model, c=2)
        assert not mod_blocks(model)


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = resnet(layers=(2, 1, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="left 1 of 4 stages alone"):
            convert(model, c=8)
    assert not mod_blocks(model)


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

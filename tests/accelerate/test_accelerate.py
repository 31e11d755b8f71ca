"""accelerate: the same numbers, one op where it may be, and never the fold of weights that have changed."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from mod_kernels import MoDBlock, accelerate, functional, models
from mod_kernels._library import accumulation_dtype
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import NarrowBasicBlock, NarrowBottleneck

from ..blocks import CHANNELS, K, feature_map, make_block
from .support import in_place, ordinary

KINDS = [NarrowBottleneck, NarrowBasicBlock]


# ---- the same numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["first", "last", "original"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_numbers(kind, position, dtype, ran):
    block = accelerate(make_block(kind(K), dtype, position=position, bias=True).eval())
    x = feature_map(dtype)
    # The oracle is the ordinary path in float64 on the same (rounded) weights and input.
    expected = ordinary(copy.deepcopy(block).double(), x.double())
    ran.clear()
    with torch.no_grad():
        y = block(x)
        assert ran == ["mod_block"] and y.dtype == dtype
        assert relative_norm(y, expected) < VALUES[dtype]
        assert relative_norm(block(x, x.mean((2, 3), dtype=accumulation_dtype(dtype))), expected) < VALUES[dtype]


@pytest.mark.parametrize("name", ["resnet18_mod", "resnet50_mod"])
def test_network(name, ran):
    model = getattr(models, name)(num_classes=10).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    keys = list(model.state_dict())
    with torch.inference_mode():
        expected = model(x)
        ran.clear()
        assert accelerate(model) is model
        assert relative_norm(model(x), expected) < 1e-11
    blocks = sum(isinstance(module, MoDBlock) for module in model.modules())
    assert ran == ["mod_block_"] * blocks  # the models' own blocks may overwrite
    assert list(model.state_dict()) == keys


def test_overwrite_input(ran):
    x = feature_map()
    kept = x.clone()
    block = accelerate(make_block().eval())
    with torch.no_grad():
        y = block(x)
        assert torch.equal(x, kept)
        accelerate(block, overwrite_input=True)
        assert block(x) is x and relative_norm(x, y) < VALUES[torch.float32]
    assert ran == ["mod_block", "mod_block_"]


def test_ordinary_path_where_it_must(ran):
    block, x = accelerate(make_block().eval()), feature_map()
    block(x)  # gradients of the parameters may be wanted
    with torch.no_grad():
        block.train()(x)
    block.eval().requires_grad_(False)
    block(x.requires_grad_()).sum().backward()
    assert ran == ["fuse_channels"] * 3 and x.grad is not None
    block(x.detach())  # nothing wants one now
    assert ran[-1] == "mod_block"


# ---- copies


def by_pickle(block):
    return pickle.loads(pickle.dumps(block))


def by_torch_save(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_stand_alone(duplicate, ran):
    block, x = accelerate(make_block().eval()), feature_map()
    with torch.no_grad():
        y = block(x)
        twin = duplicate(block)
        in_place(block)
        assert torch.equal(twin(x), y)
        assert relative_norm(block(x), ordinary(block, x)) < VALUES[torch.float32]
        in_place(twin)
        assert relative_norm(twin(x), block(x)) < VALUES[torch.float32]
    assert set(ran) >= {"mod_block"} and "accelerated" in repr(twin)


def test_shallow_copy_with_its_own_children(ran):
    """What DataParallel's replicas are: the same attributes, other tables of children."""
    block, x = accelerate(make_block().eval()), feature_map()
    with torch.no_grad():
        block(x)
        twin = block._replicate_for_data_parallel()
        twin._modules = dict(copy.deepcopy(block)._modules)
        in_place(twin)
        for module in (twin, block, twin):
            expected = ordinary(block, x)
            if module is twin:
                changed = copy.deepcopy(block)
                in_place(changed)
                expected = ordinary(changed, x)
            assert relative_norm(module(x), expected) < VALUES[torch.float32]


# ---- torch.compile


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_under_compile(kind):
    """The fold is in the graph: weights changed in place need no new graph to be seen."""
    torch._dynamo.reset()
    block, x = accelerate(make_block(kind(K)).eval()), feature_map()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_norm(compiled(x), block(x)) < VALUES[torch.float32]
        in_place(block)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert relative_norm(compiled(x), ordinary(block, x)) < VALUES[torch.float32]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(x)
    names = {event.key for event in profile.key_averages()}
    if functional.explain("mod_block", x, block.spec()).backend == "cpu":
        assert any(name.startswith("mod_kernels_cpu::mod_block") for name in names), names
    y = compiled(x)  # gradients wanted: another graph, the ordinary path
    y.sum().backward()
    assert block.selector.fc1.weight.grad is not None


# ---- what it leaves alone


def test_foreign_conv_blocks_are_named():
    model = nn.Sequential(
        make_block(),
        MoDBlock(CHANNELS, nn.Conv2d(K, K, 1), K),
        MoDBlock(CHANNELS, NarrowBottleneck(K, norm_layer=nn.InstanceNorm2d), K),
    ).eval()
    with pytest.warns(UserWarning) as caught:
        accelerate(model)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "left 2 of 3 MoD blocks alone" in message
    assert "1: its conv_block is a Conv2d, none of NarrowBottleneck, NarrowBasicBlock, " in message
    assert "2: conv_block.bn1 is a InstanceNorm2d, not nn.BatchNorm2d" in message
    assert ["accelerated" in block.extra_repr() for block in model] == [True, False, False]
    x = feature_map()
    with torch.no_grad():
        assert relative_norm(model(x), ordinary(model, x)) < VALUES[torch.float32]


class Strided(NarrowBasicBlock):
    pass


@pytest.mark.parametrize(
    "alter, reason",
    [
        (lambda block: setattr(block, "conv_block", Strided(K)), "its conv_block is a Strided"),
        (lambda block: setattr(block.conv_block.conv2, "dilation", (2, 2)), "conv_block.conv2 is not of stride 1"),
        (lambda block: setattr(block.conv_block.conv2, "padding_mode", "circular"), "zero padding"),
        (
            lambda block: setattr(block.conv_block, "conv1", nn.Conv2d(K, 3, 1)),
            "weights do not fit a 'bottleneck'",
        ),
        (
            lambda block: setattr(block.conv_block, "bn2", nn.BatchNorm2d(2, track_running_stats=False)),
            "statistics",
        ),
        (lambda block: setattr(block, "selector", nn.Identity()), "its selector is a Identity"),
    ],
)
def test_reasons(alter, reason):
    block = make_block()
    alter(block)
    with pytest.warns(UserWarning, match=reason):
        accelerate(block)
    assert block._fused is None


def test_nothing_to_do():
    with pytest.raises(ValueError, match=r"model must contain a mod_kernels.nn.MoDBlock, .*, Linear has none$"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
        accelerate([])


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(accelerate(make_block()).eval())

"""Foreign blocks, registered or recognised: fused where they may be, never stale, copied like any module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from mod_kernels import MoDBlock, MoDSpec, accelerate, foreign, register_mod_block
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.foreign import FusedForeign
from mod_kernels.nn import fold_batch_norm

from .plain_blocks import C, K, LinearsGatherClone, SequentialInPlaceLast, conv_bn, feature_map, randomised


class Dropping(nn.Module):
    """Not recognised: it has dropout inside, which does nothing in eval mode."""

    def __init__(self):
        super().__init__()
        self.k = K
        self.fc1, self.fc2 = nn.Linear(C, C // 4, bias=False), nn.Linear(C // 4, C, bias=False)
        self.conv, self.norm = conv_bn(K, K, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        scores, index = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))).topk(self.k)
        z = torch.relu(self.norm(self.conv(x[torch.arange(len(x))[:, None], index])))
        return torch.cat((x[:, : self.k] + scores[:, :, None, None] * self.drop(z), x[:, self.k :]), 1)


def describe(block):
    weight, bias = fold_batch_norm(block.conv, block.norm)
    selector = block.fc1.weight, block.fc2.weight
    return MoDSpec(*selector, block.k, "conv", (weight,), (bias,), final_relu=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(foreign, "_DESCRIBED", {})
    register_mod_block(Dropping, describe)


BLOCKS = [Dropping, LinearsGatherClone]


def ordinary(block, x):
    """What the block's own forward gives."""
    twin = copy.deepcopy(block)
    twin.__class__ = foreign.original_class(block)
    with torch.no_grad():
        return twin(x.clone())


def made(style):
    return accelerate(randomised(style()))


# ---- registration


def test_registered(ran):
    block, x = made(Dropping), feature_map()
    with torch.no_grad():
        assert relative_norm(block(x), ordinary(block, x)) < VALUES[torch.float32]
    assert ran == ["mod_block"] and isinstance(block, Dropping) and "accelerated" in repr(block)


def test_exactly_this_class():
    class Other(Dropping):
        pass

    with pytest.raises(ValueError, match="dropout inside: drop is a Dropout"):
        accelerate(Other())


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (lambda block: None, "describe must return a MoDSpec, got NoneType"),
        (lambda block: describe(block).k, "describe must return a MoDSpec, got int"),
        (
            lambda block: MoDSpec(
                block.fc1.weight, block.fc2.weight, K, "conv", *zip(fold_batch_norm(block.conv, block.norm))
            ),
            "its registered description is not what it computes: on random inputs the branch differs by",
        ),
        (
            lambda block: MoDSpec(block.fc1.weight, block.fc2.weight, C + 1, "conv", (), ()),
            "k must be between 1 and C=48",
        ),
    ],
)
def test_wrong_descriptions_are_named(wrong, reason):
    register_mod_block(Dropping, wrong)
    model = nn.Sequential(LinearsGatherClone(), Dropping())
    with pytest.warns(UserWarning, match=f"1: {reason}"):
        accelerate(model)
    assert [isinstance(block, FusedForeign) for block in model] == [True, False]


def test_a_failing_description_leaves_the_model_as_it_was():
    register_mod_block(Dropping, lambda block: block.missing)
    model = nn.Sequential(LinearsGatherClone(), Dropping())
    with pytest.raises(AttributeError, match="missing"):
        accelerate(model)
    assert not any(isinstance(block, FusedForeign) for block in model)


def test_refusals():
    with pytest.raises(TypeError, match=r"cls must be a subclass of nn\.Module, got 3"):
        register_mod_block(3, describe)
    with pytest.raises(TypeError, match="describe must be a function from a module to a MoDSpec, got None"):
        register_mod_block(Dropping, None)
    with pytest.raises(ValueError, match="cls must not be a MoDBlock"):
        register_mod_block(MoDBlock, describe)


def test_the_inner_of_two_registered_blocks_wins():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Dropping()

    register_mod_block(Outer, describe)
    model = Outer()
    with pytest.warns(UserWarning, match="the model: another MoD block is inside it, a Dropping"):
        accelerate(model)
    assert isinstance(model.inner, FusedForeign) and type(model) is Outer


# ---- the path that runs


@pytest.mark.parametrize("style", BLOCKS)
def test_ordinary_path_where_it_must(style, ran):
    block, x = made(style), feature_map()
    block(x)  # gradients of the parameters may be wanted
    with torch.no_grad():
        block.train()(x)
        block.eval()
        handle = next(block.children()).register_forward_hook(lambda *_: None)
        block(x)
        handle.remove()
        block(x[0, :, :, :1].expand(1, C, 7, 1))
        block.half().float()
    assert ran == ["mod_block"]
    block.requires_grad_(False)
    block(x.requires_grad_()).sum().backward()
    assert ran == ["mod_block"] and x.grad is not None
    assert all("mod_kernels" not in str(node.target) for node in exported(block, x.detach()).graph.nodes)


def exported(block, x):
    with torch.no_grad():
        return torch.export.export(block, (x,))


def test_hooks_on_the_block_itself(ran):
    block, seen = made(LinearsGatherClone), []
    block.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    with torch.no_grad():
        block(feature_map())
    assert ran == ["mod_block"] and len(seen) == 1


def test_overwrite_input_only_when_asked(ran):
    block, x = made(SequentialInPlaceLast), feature_map()
    kept = x.clone()
    with torch.no_grad():
        y = block(x)
        assert torch.equal(x, kept)
        accelerate(block, overwrite_input=True)
        expanded = x[:1].expand(4, -1, -1, -1)
        block(expanded)  # not dense: copied
        assert torch.equal(x, kept)
        assert block(x) is x and relative_norm(x, y) < VALUES[torch.float32]
    assert ran == ["mod_block", "mod_block", "mod_block_"]


def test_twice_is_harmless():
    block, x = made(LinearsGatherClone), feature_map()
    cls = type(block)
    with torch.no_grad():
        y = block(x)
        assert type(accelerate(accelerate(block))) is cls and torch.equal(block(x), y)


@pytest.mark.parametrize("style", BLOCKS)
def test_compile(style):
    torch._dynamo.reset()
    block, x = made(style), feature_map()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_norm(compiled(x), ordinary(block, x)) < VALUES[torch.float32]
        block.fc2.weight.neg_()
        assert relative_norm(compiled(x), ordinary(block, x)) < VALUES[torch.float32]


# ---- copies


def by_pickle(block):
    return pickle.loads(pickle.dumps(block))


def by_torch_save(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("style", BLOCKS)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, by_pickle, by_torch_save, nn.Module._replicate_for_data_parallel]
)
def test_copies(style, duplicate, ran):
    block, x = made(style), feature_map()
    with torch.no_grad():
        y = block(x)
        twin = duplicate(block)
        assert type(twin) is type(block) and torch.equal(twin(x), y) and ran == ["mod_block"] * 2
        twin._modules = dict(copy.deepcopy(block)._modules)
        twin.fc2.weight.neg_()
        for module in (twin, block):
            assert relative_norm(module(x), ordinary(module, x)) < VALUES[torch.float32]
        assert torch.equal(block(x), y)


# ---- changes


# Much larger weights saturate the sigmoids that the plain code ranks in float32: it, not the fused op, is then
# far from float64.
LOADED = 1.2


def in_place(block):
    block.fc2.weight.neg_()


def statistics(block):
    norm(block).running_mean.add_(1)


def data_swap(block):
    block.fc1.weight.data = -block.fc1.weight.data


def load(block):
    block.load_state_dict({k: v * LOADED if v.is_floating_point() else v for k, v in block.state_dict().items()})


def load_by_assignment(block):
    state = {k: v * LOADED if v.is_floating_point() else v for k, v in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


def bypassing_write_then_eval(block):
    norm(block).weight.data.mul_(3)
    block.eval()


def training(block):
    block.train()
    block(feature_map() * 4)
    block.eval()


def eps(block):
    norm(block).eps = 2.0


def new_layer(block):
    block.fc2 = nn.Linear(*reversed(block.fc2.weight.shape), bias=False).eval()


def fewer_channels(block):
    block.fc1.weight[:, ::2] = 0


def hook(block):
    norm(block).register_forward_hook(lambda module, args, output: output * 2)


def own_forward(block):
    part = norm(block)
    part.forward = lambda z: 2 * type(part).forward(part, z)


def pruned(block):
    prune.l1_unstructured(block.fc2, "weight", 0.5)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrized(block):
    parametrize.register_parametrization(block.fc2, "weight", Doubled())


def norm(block):
    return next(part for part in block.modules() if isinstance(part, nn.BatchNorm2d))


CHANGES = [
    in_place, statistics, data_swap, load, load_by_assignment, bypassing_write_then_eval, training, eps, new_layer,
    fewer_channels, hook, own_forward, pruned, parametrized,
]  # fmt: skip


@pytest.mark.parametrize("style", BLOCKS)
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(style, change):
    block, x = made(style), feature_map()
    with torch.no_grad():
        before = block(x)
        change(block)
        expected = ordinary(block, x)
        assert relative_norm(expected, before) > 10 * VALUES[torch.float32]  # the change can be seen
        for _ in range(2):
            assert relative_norm(block(x), expected) < VALUES[torch.float32]


def test_a_recognised_block_that_is_another_now_runs_as_written(ran):
    block, x = made(LinearsGatherClone), feature_map()
    with torch.no_grad():
        block(x)
        block.conv_block.relu = nn.Tanh().eval()
        assert relative_norm(block(x), ordinary(block, x)) < VALUES[torch.float32]
    assert ran == ["mod_block"]


def test_the_fold_is_kept_while_nothing_changes(monkeypatch):
    block, x = made(Dropping), feature_map()
    with torch.no_grad():
        y = block(x)
        monkeypatch.setattr(foreign, "_fold", None)  # folding again would fail
        assert torch.equal(block(x), y)


@pytest.mark.parametrize("style", BLOCKS)
def test_to_another_dtype(style, ran):
    block, x = made(style), feature_map()
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32):
            y = block.to(dtype)(x.to(dtype))
            assert y.dtype == dtype and relative_norm(y, ordinary(block, x.to(dtype))) < VALUES[dtype]
    assert ran == ["mod_block"] * 2

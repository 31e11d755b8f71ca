"""Blocks in plain PyTorch: recognised in whatever style they are written, left alone where they differ."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mod_kernels import MoDBlock, accelerate, models
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.foreign import FusedForeign
from mod_kernels.nn import NarrowBottleneck
from mod_kernels.recognise import readings

from .plain_blocks import (
    STYLES,
    Bottleneck,
    C,
    ConvNeXtBlock,
    K,
    LinearsGatherClone,
    SelectorModuleScatter,
    SequentialInPlaceLast,
    SequentialOf1x1Cat,
    feature_map,
    randomised,
)

FORMS = {
    LinearsGatherClone: ("bottleneck", "first", False),
    SequentialOf1x1Cat: ("basic", "first", False),
    SequentialInPlaceLast: ("conv", "last", True),
    SelectorModuleScatter: ("inverted_residual", "original", False),
    ConvNeXtBlock: ("convnext", "first", False),
}


def plan_of(block):
    return block._mod_kernels_state.plan


# ---- what is recognised


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_style(style, dtype, ran):
    block, x = randomised(style()).to(dtype), feature_map(dtype=dtype)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with torch.no_grad():
        expected = copy.deepcopy(block).double()(x.double().clone())
        assert accelerate(block) is block and isinstance(block, style)
        kept = x.clone()
        y = block(x)
    assert (plan_of(block).kind, plan_of(block).position, plan_of(block).final_relu) == FORMS[style]
    assert ran == ["mod_block"] and torch.equal(x, kept)  # even where the plain code writes into x
    assert y.dtype == dtype and relative_norm(y, expected) < VALUES[dtype]
    assert list(block.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("style", STYLES)
def test_as_initialised_and_in_training_mode(style, ran):
    """A layer scale of 1e-6 or a last norm of zero leaves no branch to compare: random weights do."""
    block = style()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    accelerate(block)
    assert block.training and all(part.training for part in block.modules())
    assert plan_of(block).kind == FORMS[style][0]
    randomised(block)
    x = feature_map()
    with torch.no_grad():
        assert relative_norm(block(x), style.forward(copy.deepcopy(block), x.clone())) < VALUES[torch.float32]
    assert ran == ["mod_block"]


def test_channels_and_hidden_widths(ran):
    for c, k in ((16, 1), (64, 16), (40, 20)):
        block, x = accelerate(randomised(SequentialInPlaceLast(c, k))), feature_map(c)
        with torch.no_grad():
            y = block(x)
            expected = SequentialInPlaceLast.forward(block, x.clone())
            assert relative_norm(y, expected) < VALUES[torch.float32]
    assert ran == ["mod_block"] * 3


def test_an_inner_block_wins_and_siblings_are_found():
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.Sequential(LinearsGatherClone()), SequentialOf1x1Cat())
    accelerate(model)
    fused = [name for name, module in model.named_modules() if isinstance(module, FusedForeign)]
    assert fused == ["1.0", "2"]


def test_a_wrapper_whose_layers_are_in_two_parts(ran):
    """No part of it is an MoD block by itself; the whole is."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            whole = SequentialInPlaceLast()
            self.scoring, self.work = nn.ModuleDict({"mlp": whole.selector}), nn.ModuleList([whole.block])

        def forward(self, x):
            best, index = self.scoring["mlp"](x.mean((-1, -2))).sigmoid().topk(K)
            z = self.work[0](x[torch.arange(len(x))[:, None], index])
            return torch.cat((x[:, :-K], x[:, -K:] + best[:, :, None, None] * z), 1)

    block, x = accelerate(randomised(Halves())), feature_map()
    with torch.no_grad():
        assert relative_norm(block(x), Halves.forward(block, x)) < VALUES[torch.float32]
    assert ran == ["mod_block"] and plan_of(block).position == "last"


def test_a_selector_called_by_its_weights(ran):
    """The README's class: functional ops on the weights of layers that are never called."""
    from mod_kernels import functional as ops

    class OfOps(LinearsGatherClone):
        def forward(self, x):
            scores, index = ops.select_channels(x, self.fc1.weight, self.fc2.weight, self.k)
            return ops.fuse_channels(x, self.conv_block(ops.gather_channels(x, index)), scores, index)

    block, x = randomised(OfOps()), feature_map()
    with torch.no_grad():
        expected = block(x)
        accelerate(block)
        ran.clear()
        assert relative_norm(block(x), expected) < VALUES[torch.float32]
    assert ran == ["mod_block"]


# ---- what is left alone


class ScoresNotApplied(LinearsGatherClone):
    def ending(self, x, z, values, index):
        return super().ending(x, z, torch.ones_like(values), index)


class ReluAfterTheSum(LinearsGatherClone):
    def ending(self, x, z, values, index):
        return torch.relu(super().ending(x, z, values, index))


class MaxPooled(LinearsGatherClone):
    def pool(self, x):
        return x.amax((2, 3))


class MeanOverHeightOnly(LinearsGatherClone):
    def pool(self, x):
        return x.mean(2)[:, :, 0]


class SumPooled(LinearsGatherClone):
    def pool(self, x):
        return x.sum((2, 3)) / 49  # the mean, for maps of 7x7


class TheSmallest(LinearsGatherClone):
    def choose(self, x):
        weights = torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))
        return torch.topk(weights, self.k, dim=1, largest=False)


class InTheOrderOfChannels(LinearsGatherClone):
    def choose(self, x):
        values, index = super().choose(x)
        index, order = index.sort(dim=1)
        return values.gather(1, order), index


class SoftmaxScores(LinearsGatherClone):
    def choose(self, x):
        return torch.topk(torch.softmax(self.fc2(F.relu(self.fc1(self.pool(x)))), 1), self.k, dim=1)


class LogitScores(LinearsGatherClone):
    def choose(self, x):
        return torch.topk(self.fc2(F.relu(self.fc1(self.pool(x)))), self.k, dim=1)


class Replaced(LinearsGatherClone):
    def ending(self, x, z, values, index):
        return torch.cat((z * values[:, :, None, None], x[:, self.k :]), 1)


class InnerResidual(LinearsGatherClone):
    class Residual(Bottleneck):
        def forward(self, x):
            return x + super().forward(x)

    def __init__(self):
        super().__init__()
        self.conv_block = self.Residual()


class Noisy(LinearsGatherClone):
    def pool(self, x):
        return F.dropout(super().pool(x), 0.5)


class PlainRelu(SelectorModuleScatter):
    def __init__(self):
        super().__init__()
        self.layers[2] = self.layers[5] = nn.ReLU()


class OtherEps(ConvNeXtBlock):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(K, eps=1e-5)


class TanhGelu(ConvNeXtBlock):
    def forward(self, x):
        exact, F.gelu = F.gelu, lambda z: exact(z, approximate="tanh")
        try:
            return super().forward(x)
        finally:
            F.gelu = exact


class Dilated(SequentialOf1x1Cat):
    def __init__(self):
        super().__init__()
        self.conv_a.dilation = self.conv_a.padding = (2, 2)


class Circular(SequentialOf1x1Cat):
    def __init__(self):
        super().__init__()
        self.conv_a = nn.Conv2d(K, K, 3, padding=1, padding_mode="circular", bias=False)


DIFFERENT = [
    ScoresNotApplied,
    ReluAfterTheSum,
    MaxPooled,
    MeanOverHeightOnly,
    SumPooled,
    TheSmallest,
    InTheOrderOfChannels,
    SoftmaxScores,
    LogitScores,
    Replaced,
    InnerResidual,
    Noisy,
    PlainRelu,
    OtherEps,
    TanhGelu,
    Dilated,
    Circular,
]


def left_alone(block, reason):
    """``accelerate`` names ``block``, beside one it can fuse, with that reason, and does not change it."""
    x = feature_map()
    block, torch_state = block.eval(), torch.get_rng_state()
    model = nn.Sequential(LinearsGatherClone().eval(), block)
    torch.set_rng_state(torch_state)
    with pytest.warns(UserWarning, match=reason) as caught:
        accelerate(model)
    assert torch.equal(torch.get_rng_state(), torch_state)  # the copy's random numbers are its own
    assert len(caught) == 1 and "left 1 of 2 MoD blocks alone:\n  1: " in str(caught[0].message)
    assert not isinstance(block, FusedForeign) and "_mod_kernels_state" not in vars(block)
    with pytest.raises(ValueError, match="has none; looked at:\n  the model: ") as error:
        accelerate(block)
    assert reason in str(error.value) and x.shape[1] == C
    return block


@pytest.mark.parametrize("lookalike", DIFFERENT)
def test_lookalikes(lookalike):
    block, x = randomised(lookalike()), feature_map()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = block(x.clone())
        left_alone(block, "on random inputs the branch differs by ")
        torch.manual_seed(0)
        assert torch.equal(block(x.clone()), expected)


class Unsorted(LinearsGatherClone):
    def choose(self, x):
        return torch.topk(super().choose(x)[0].new_zeros(len(x), C) + self.pool(x), self.k, sorted=False)


class WithDropout(LinearsGatherClone):
    def __init__(self):
        super().__init__()
        self.conv_block = nn.Sequential(self.conv_block, nn.Dropout2d(0.1))


class NeedsMore(LinearsGatherClone):
    def forward(self, x, mask):
        return super().forward(x * mask)


class GivesTwo(LinearsGatherClone):
    def forward(self, x):
        return super().forward(x), x


class Preactivated(SequentialOf1x1Cat):
    def forward(self, x):
        scores, index = self.attention(x).flatten(1).topk(self.k, 1)
        z = x[torch.arange(len(x)).unsqueeze(1), index]
        z = self.conv_b(self.norm_b(torch.relu(self.conv_a(self.norm_a(z)))))
        return torch.cat([x[:, : self.k] + scores[..., None, None] * z, x[:, self.k :]], 1)


class LearnedScale(LinearsGatherClone):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))


class Activated(LinearsGatherClone):
    def __init__(self):
        super().__init__()
        self.conv_block.relu = nn.PReLU(K // 2)


class Adapted(nn.Linear):
    pass


class AdaptedSelector(LinearsGatherClone):
    def __init__(self):
        super().__init__()
        self.fc2 = Adapted(C // 8, C)


class NoStatistics(SequentialInPlaceLast):
    def __init__(self):
        super().__init__()
        self.block[1] = nn.BatchNorm2d(K, track_running_stats=False)


class Uncopyable(LinearsGatherClone):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one of me")


@pytest.mark.parametrize(
    "made, reason",
    [
        (Unsorted, "its top-k has sorted=False"),
        (WithDropout, "it has dropout inside: conv_block.1 is a Dropout2d"),
        (NeedsMore, "its forward did not run: TypeError: "),
        (GivesTwo, "its forward does not keep shape and dtype: (4, 48, 7, 5) of torch.float64 became tuple"),
        (Preactivated, "norm_a does not come after a convolution"),
        (Activated, "beside convolutions and batch norms it has conv_block.relu: no 'bottleneck'"),
        (LearnedScale, "it has parameters that no MoD block has: temperature"),
        (AdaptedSelector, "fc2 is a Adapted, none of Linear, Conv2d, "),
        (NoStatistics, "block.1 keeps no running statistics"),
        (Uncopyable, "it can't be copied in float64 on the CPU: RuntimeError: there is only one of me"),
    ],
)
def test_reasons(made, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error", append=True)
        block = made()
        with pytest.raises(ValueError) as error:
            accelerate(block)
    assert reason in str(error.value) and type(block) is made


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda block: torch.jit.trace(block, feature_map())])
def test_scripted(compiled):
    block = compiled(SequentialOf1x1Cat().eval())
    with pytest.raises(TypeError, match="model must not be scripted: accelerate the model it was scripted from"):
        accelerate(block)
    model = nn.Sequential(LinearsGatherClone(), block)
    with pytest.warns(UserWarning, match="1: it is scripted"):
        accelerate(model)
    assert isinstance(model[0], FusedForeign) and model[1] is block


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao.quantization")
def test_quantised():
    block = torch.ao.quantization.quantize_dynamic(LinearsGatherClone().eval(), {nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match=r"the model: fc1 is quantised \(torch.ao.nn.quantized.dynamic"):
        accelerate(block)
    y = block(feature_map())
    with pytest.warns(UserWarning, match="1: fc1 is quantised"):
        accelerate(nn.Sequential(LinearsGatherClone(), block))
    assert torch.equal(block(feature_map() * 0), block(feature_map() * 0)) and y.shape[1] == C


def test_what_chooses_no_channels_is_no_block():
    """Squeeze and excitation around narrow convolutions: the shapes, not the operation."""

    class Excited(SequentialOf1x1Cat):
        def forward(self, x):
            z = self.norm_b(self.conv_b(torch.relu(self.norm_a(self.conv_a(x[:, : self.k])))))
            return torch.cat([x[:, : self.k] + z, x[:, self.k :]], 1) * self.attention(x)

    with pytest.raises(ValueError, match=r"looked at:\n  the model: its forward chooses no channels"):
        accelerate(Excited())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not worth a word where there are blocks
        accelerate(nn.Sequential(LinearsGatherClone(), Excited()))


# ---- what it costs


@pytest.mark.parametrize("name", ["resnet50", "vgg11_bn", "mobilenet_v2", "convnext_tiny"])
def test_dense_networks_are_not_run(name):
    import torchvision

    model = getattr(torchvision.models, name)()
    assert not any(readings(module) for module in model.modules())
    with pytest.raises(ValueError, match=r"has none$"):
        accelerate(model)


def test_a_network_of_foreign_blocks(ran):
    model = models.resnet18_mod(num_classes=10, c=16)
    for name, module in list(model.named_modules()):
        if isinstance(module, MoDBlock):
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._modules[last] = LinearsGatherClone(module.channels, module.k)
    randomised(model).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        accelerate(model)
        assert ran == []  # the copies that were compared ran as they are written
        assert relative_norm(model(x), expected) < 1e-10
    assert ran == ["mod_block"] * 4


def test_own_and_foreign_blocks_in_one_model(ran):
    model = nn.Sequential(MoDBlock(C, NarrowBottleneck(K), K), LinearsGatherClone()).eval()
    accelerate(model)
    with torch.no_grad():
        model(feature_map())
    assert ran == ["mod_block"] * 2

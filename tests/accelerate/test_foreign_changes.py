"""Foreign blocks that differ from what was compared, at once or later: they run as they are written now."""

import types
import warnings
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from mod_kernels import MoDBlock, accelerate
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.foreign import FusedForeign
from mod_kernels.nn import NarrowConv

from .plain_blocks import C, ConvNeXtBlock, K, LinearsGatherClone, conv_bn, feature_map, randomised


class Masked(LinearsGatherClone):
    """Channels that are dead by a buffer; the comparison found all alive."""

    def __init__(self):
        super().__init__()
        self.register_buffer("alive", torch.ones(C, dtype=torch.bool))

    def choose(self, x):
        weights = torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))
        return torch.topk(weights.masked_fill(~self.alive, 0.0), self.k, dim=1)


class Scaled(LinearsGatherClone):
    """Factors by a tensor that is no buffer, by the class, and in containers; and a function of its own."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.tensor, self.factors, self.nested, self.tensors = torch.ones(()), [1.0], ([1.0],), [torch.ones(())]
        self.act = partial(torch.clamp, min=0.0)

    def ending(self, x, z, values, index):
        scale = self.tensor * self.factor * self.factors[0] * self.nested[0][0] * self.tensors[0]
        return super().ending(x, self.act(z) * scale, values, index)


class Ended(LinearsGatherClone):
    def __init__(self):
        super().__init__()
        self.end = nn.ReLU()

    def ending(self, x, z, values, index):
        return super().ending(x, self.end(z), values, index)


def mask(block):
    block.alive[: C // 2] = False


def loaded_mask(block):
    state = block.state_dict()
    block.load_state_dict(state | {"alive": torch.arange(C) % 2 == 0})


def tensor_attribute(block):
    block.tensor = torch.full((), 3.0)


def tensor_attribute_in_place(block):
    block.tensor.fill_(3.0)


def hides_the_class(block):
    block.factor = 3.0


def a_tensor_hides_the_class(block):
    block.factor = torch.full((K, 1, 1), 3.0)


def in_a_list(block):
    block.factors[0] = 3.0


def in_a_list_in_a_tuple(block):
    block.nested[0][0] = 3.0


def a_tensor_for_a_number(block):
    block.factors[0] = torch.full((K, 1, 1), 3.0)


def a_tensor_in_a_list(block):
    block.tensors[0] = torch.full((K, 1, 1), 3.0)


def method(block):
    block.ending = types.MethodType(lambda self, x, *rest: type(self).ending(self, 2 * x, *rest), block)


def function(block):
    block.act = torch.tanh


def submodule(block):
    block.end = nn.Tanh()


CHANGES = [
    (Masked, mask),
    (Masked, loaded_mask),
    (Scaled, tensor_attribute),
    (Scaled, tensor_attribute_in_place),
    (Scaled, hides_the_class),
    (Scaled, a_tensor_hides_the_class),
    (Scaled, in_a_list),
    (Scaled, in_a_list_in_a_tuple),
    (Scaled, a_tensor_for_a_number),
    (Scaled, a_tensor_in_a_list),
    (Scaled, function),
    (Scaled, method),
    (Ended, submodule),
]


def as_written(block, x):
    with torch.no_grad():
        return block._mod_kernels_original.forward(block, x.clone())


def fused(style):
    block = accelerate(randomised(style()))
    assert isinstance(block, FusedForeign)
    return block


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("style, change", CHANGES)
def test_a_change_is_seen(style, change, called_before, ran):
    block, x = fused(style), feature_map()
    with torch.no_grad():
        before = block(x)
        assert ran == ["mod_block"]
        if not called_before:
            block = fused(style)
        change(block)
        after = block(x)
    assert torch.equal(after, as_written(block, x)) and not torch.allclose(after, before)


# Dynamo by itself has no guard on a list in a tuple, of whatever module.
@pytest.mark.parametrize("style, change", [one for one in CHANGES if one[1] is not in_a_list_in_a_tuple])
def test_a_change_is_seen_in_a_graph(style, change):
    """Made before the graph, or after it."""
    torch._dynamo.reset()
    block, x = fused(style), feature_map()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_norm(compiled(x), as_written(block, x)) < VALUES[torch.float32]
        change(block)
        assert relative_norm(compiled(x), as_written(block, x)) < VALUES[torch.float32]
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert relative_norm(compiled(x), as_written(block, x)) < VALUES[torch.float32]


class Keeping(LinearsGatherClone):
    """Its forward keeps for others what it chose, and counts its calls in three ways."""

    def __init__(self):
        super().__init__()
        self.calls, self.log, self.last = 0, [], None
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def choose(self, x):
        values, index = super().choose(x)
        self.calls, self.last = self.calls + 1, index
        self.log.append(index)
        self.count += 1
        return values, index


def test_what_its_own_forward_writes_is_no_change(ran):
    block, x = fused(Keeping), feature_map()
    with torch.no_grad():
        block(x)
        block.train()(x)
        block.eval()(x)
    with torch.inference_mode():
        block.train()(x)
        block.eval()(x)
        entry = block._mod_kernels_state.cache._entry
        block(x)
    assert len(ran) == 4 and block.calls == 2
    assert entry is not None and block._mod_kernels_state.cache._entry is entry
    block.conv_block.relu = nn.Tanh()
    with torch.no_grad():
        block(x)
    assert len(ran) == 4 and block.calls == 3


def test_one_that_was_saved_before_all_this_was_kept(ran):
    block, x = fused(Scaled), feature_map()
    for name in ("settings", "constants"):
        delattr(block._mod_kernels_state, name)
    with torch.no_grad():
        block(x)
        assert ran == ["mod_block"]
        block.factor = 3.0
        block(x)
    assert ran == ["mod_block"]


def test_marks_of_others_are_no_change(ran):
    """DataParallel's on its replicas; a compiled call."""
    block, x = fused(LinearsGatherClone), feature_map()
    replica = block._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, one in block.named_children():
        replica._modules[name] = one
    with torch.no_grad():
        replica(x)
    block.compile(backend="eager")
    with torch.no_grad():
        block.forward(x)
    assert ran == ["mod_block"] * 2


def test_forward_mode_reaches_the_weights():
    block, x = fused(LinearsGatherClone), feature_map()
    with torch.no_grad():
        block(x)  # a fold is there
    values = {name: one.detach() for name, one in block.named_parameters()}

    def tangent(block):
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(one, torch.ones_like(one)) for name, one in values.items()}
            return forward_ad.unpack_dual(torch.func.functional_call(block, duals, x)).tangent

    plain = randomised(LinearsGatherClone())
    plain.load_state_dict(block.state_dict())
    assert torch.allclose(tangent(block), tangent(plain.eval()))


def test_arguments_by_the_blocks_own_names(ran):
    class Named(LinearsGatherClone):
        def forward(self, features, scale=None):
            return super().forward(features) * (1 if scale is None else scale)

    block, x = fused(Named), feature_map()
    with torch.no_grad():
        assert torch.equal(block(features=x), block(x)) and ran == ["mod_block"] * 2
        assert torch.equal(block(x, 2.0), block(features=x, scale=2.0)) and len(ran) == 2
    block.train()(features=x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'features'"):
        block()


def test_an_instance_made_anew_is_not_fused(ran):
    block, x = fused(LinearsGatherClone), feature_map()
    twin = type(block)(C, K).eval()
    twin.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.to(torch.float32)(x), as_written(block, x)) and ran == []
        assert relative_norm(accelerate(twin)(x), as_written(block, x)) < VALUES[torch.float32]
    assert ran == ["mod_block"]


def test_look_alikes_with_other_norms_are_left_alone():
    class OtherNorm(ConvNeXtBlock):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(K)

    class NormAfterLinear(ConvNeXtBlock):
        def __init__(self):
            super().__init__()
            self.norm, self.batch_norm = nn.Identity(), nn.BatchNorm2d(4 * K)
            self.up = nn.Sequential(nn.Linear(K, 4 * K), Turned(self.batch_norm))

    class Turned(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, z):
            return self.norm(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    for other, reason in ((OtherNorm, "a RMSNorm, not the LayerNorm"), (NormAfterLinear, "not come after a conv")):
        model = nn.Sequential(LinearsGatherClone(), other())
        with pytest.warns(UserWarning, match=reason):
            accelerate(model)
        assert [isinstance(block, FusedForeign) for block in model] == [True, False]


class Registered(nn.Module):
    """A class that knows its subclasses, each name once."""

    known: ClassVar[dict] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__name__ in Registered.known:
            raise KeyError(cls.__name__)
        Registered.known[cls.__name__] = cls


def test_a_class_that_refuses_subclasses_is_left_alone():
    Registered.known.clear()

    class Block(LinearsGatherClone, Registered):
        pass

    model = nn.Sequential(MoDBlock(C, NarrowConv(K), K), Block())
    with pytest.warns(UserWarning, match="1: its class can't be subclassed: KeyError: 'Block'"):
        accelerate(model)
    assert model[0]._fused is not None and type(model[1]) is Block


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    class Refused(LinearsGatherClone):
        def __init__(self):
            super().__init__()
            self.conv_block.conv1, self.conv_block.bn1 = conv_bn(K, K // 2, 1)
            self.conv_block.bn1 = nn.GroupNorm(1, K // 2)

    model = nn.Sequential(MoDBlock(C, NarrowConv(K), K), LinearsGatherClone(), Refused())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="left 1 of 3"):
            accelerate(model)
    assert model[0]._fused is None and not isinstance(model[1], FusedForeign)

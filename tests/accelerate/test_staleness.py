"""Every way a weight can change, and that the next call sees it."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

from mod_kernels import MoDBlock, accelerate
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import NarrowBottleneck, NarrowConvNeXt

from ..blocks import K, feature_map, make_block
from .support import in_place, ordinary


def optimizer_step(block):
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(block.parameters(), lr=0.5).step()
    block.zero_grad()


def selector_in_place(block):
    with torch.no_grad():
        block.selector.fc2.weight.neg_()


def in_place_under_inference_mode(block):
    with torch.inference_mode():
        block.conv_block.conv1.weight.mul_(2)


def in_place_through_a_view(block):
    with torch.no_grad():
        block.conv_block.conv1.weight[0].zero_()


def load(block):
    block.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in block.state_dict().items()})


def load_by_assignment(block):
    state = {k: v * 2 if v.is_floating_point() else v for k, v in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


def data_swap(block):
    block.conv_block.bn1.weight.data = block.conv_block.bn1.weight.data * 3


def data_swaps_that_reuse_the_address(block):
    parameter = block.conv_block.conv1.weight
    for factor in (2, 3, 5):  # freed and given out again: the last may lie where the first did
        parameter.data = parameter.data * factor


def data_swap_of_the_selector(block):
    block.selector.fc1.weight.data = -block.selector.fc1.weight.data


def new_parameter(block):
    block.conv_block.conv1.weight = nn.Parameter(block.conv_block.conv1.weight.detach() * 2)


def new_bias(block):
    block.conv_block.conv1.bias = nn.Parameter(torch.ones(K // 4))


def new_module(block):
    norm = nn.BatchNorm2d(K).eval()
    nn.init.constant_(norm.weight, 3)
    block.conv_block.bn3 = norm


def new_conv_block(block):
    block.conv_block = make_block().eval().conv_block


def new_selector(block):
    block.selector = make_block().selector


def running_statistics(block):
    block.train()
    with torch.no_grad():
        block(feature_map() * 4)
    block.eval()


def running_statistics_of_one_norm(block):
    block.conv_block.bn1.train()
    with torch.no_grad():
        block(feature_map() * 4)
    block.conv_block.bn1.eval()


def statistics_with_gradients(block):
    """By PyTorch's own batch norm, which does not count it in the versions of what it writes."""
    norms = block.conv_block.norms()
    for norm in norms:
        norm.train()
    x = torch.randn(8, K, 5, 3) * 2 + 1
    for conv, norm in block.conv_block.layers():
        x = norm(conv(x))
    for norm in norms:
        norm.eval()


def statistics_in_place(block):
    block.conv_block.bn1.running_var.mul_(4)


def eps(block):
    block.conv_block.bn2.eps = 0.5


def position(block):
    block.position = "last"


def final_relu(block):
    block.conv_block.final_relu = True


def there_and_back(block):
    block.bfloat16().float()


def bypassing_write_then_eval(block):
    block.conv_block.conv1.weight.data.mul_(2)
    block.eval()


def bypassing_write_then_load(block):
    block.conv_block.conv1.weight.data.mul_(2)
    block.load_state_dict({"selector.fc1.weight": block.selector.fc1.weight.detach()}, strict=False)


def parametrization(block):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(block.conv_block.conv1, "weight", Doubled())


def pruning(block):
    prune.l1_unstructured(block.conv_block.conv2, "weight", 0.5)


def hook_on_a_part(block):
    block.conv_block.bn2.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_the_selector(block):
    block.selector.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))


def norm_in_training_mode(block):
    block.conv_block.bn1.train()


def own_forward_of_a_part(block):
    norm = block.conv_block.bn2
    norm.forward = lambda z: 2 * nn.BatchNorm2d.forward(norm, z)


def own_forward_of_the_selector(block):
    selector = block.selector
    selector.forward = lambda x, pooled=None: type(selector).forward(selector, -x, pooled)


CHANGES = [
    in_place,
    optimizer_step,
    selector_in_place,
    in_place_under_inference_mode,
    in_place_through_a_view,
    load,
    load_by_assignment,
    data_swap,
    data_swaps_that_reuse_the_address,
    data_swap_of_the_selector,
    new_parameter,
    new_bias,
    new_module,
    new_conv_block,
    new_selector,
    running_statistics,
    running_statistics_of_one_norm,
    statistics_with_gradients,
    statistics_in_place,
    eps,
    position,
    final_relu,
    there_and_back,
    bypassing_write_then_eval,
    bypassing_write_then_load,
]
# After these the parts have to run one by one.
UNFUSED = [
    parametrization,
    pruning,
    hook_on_a_part,
    hook_on_the_selector,
    norm_in_training_mode,
    own_forward_of_a_part,
    own_forward_of_the_selector,
]


@pytest.mark.parametrize("change", CHANGES + UNFUSED)
def test_never_stale(change, ran):
    block, x = accelerate(make_block().eval()), feature_map()
    with torch.no_grad():
        before = block(x)
        assert ran == ["mod_block"]
        change(block)
        expected = ordinary(block, x)
        assert relative_norm(expected, before) > 10 * VALUES[torch.float32]  # the change can be seen
        ran.clear()
        for _ in range(2):  # folded afresh, and from the cache
            assert relative_norm(block(x), expected) < VALUES[torch.float32]
    assert set(ran) == ({"fuse_channels"} if change in UNFUSED else {"mod_block"})


def test_a_hook_that_is_taken_off_again(ran):
    block, x = accelerate(make_block().eval()), feature_map()
    seen = []
    with torch.no_grad():
        handle = block.conv_block.register_forward_hook(lambda *_: seen.append("part"))
        everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        block(x)
        everywhere.remove()
        block(x)
        handle.remove()
        block(x)
    assert seen.count("part") == 2 and NarrowBottleneck in seen
    assert ran == ["fuse_channels", "fuse_channels", "mod_block"]


def test_the_fold_is_kept_while_nothing_changes(monkeypatch):
    block, x = accelerate(make_block().eval()), feature_map()
    with torch.no_grad():
        y = block(x)
        monkeypatch.setattr(MoDBlock, "spec", None)  # folding again would fail
        assert torch.equal(block(x), y)
        with torch.inference_mode():
            assert torch.equal(block(x), y)


def test_parameters_without_a_version_counter(ran):
    with torch.inference_mode():
        block, x = accelerate(make_block().eval()), feature_map()
        before = block(x)
        block.conv_block.conv1.weight.mul_(2)
        expected = ordinary(block, x)
        assert relative_norm(block(x), expected) < VALUES[torch.float32] < relative_norm(before, expected)
    assert ran == ["mod_block", "fuse_channels", "mod_block"]


def test_fold_made_in_inference_mode_serves_outside():
    block, x = accelerate(make_block().eval()), feature_map()
    with torch.inference_mode():
        y = block(x)
    with torch.no_grad():
        assert torch.equal(block(x), y)
    block.requires_grad_(False)
    x = x.clone().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None


def test_half_and_back(ran):
    block, x = accelerate(make_block().eval()), feature_map()
    with torch.no_grad():
        block(x)
        for dtype in (torch.bfloat16, torch.float64):
            block.to(dtype)
            y = block(x.to(dtype))
            expected = ordinary(copy.deepcopy(block).double(), x.to(dtype).double())
            assert y.dtype == dtype and relative_norm(y, expected) < VALUES[dtype]


@pytest.mark.parametrize("conv_block", [NarrowBottleneck(K), NarrowConvNeXt(K, layer_scale=1.0)])
def test_a_fold_made_under_autocast_is_no_less_exact(conv_block):
    block, x = make_block(conv_block).eval(), feature_map()
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias)
    first_under_autocast, other = (accelerate(copy.deepcopy(block)) for _ in range(2))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            first_under_autocast(x)
        assert torch.equal(first_under_autocast(x), other(x))


def test_forward_mode_reaches_the_weights():
    block, x = accelerate(make_block().eval()), feature_map()
    with torch.no_grad():
        block(x)  # a fold is there
    values = {name: one.detach() for name, one in block.named_parameters()}

    def tangent():
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(one, torch.ones_like(one)) for name, one in values.items()}
            return forward_ad.unpack_dual(torch.func.functional_call(block, duals, x)).tangent

    found = tangent()
    block._fused = None
    assert torch.equal(found, tangent())

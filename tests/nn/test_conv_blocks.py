"""Every narrowed conv block: its folded form computes what it does in eval mode; what can't be folded is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mod_kernels import MoDBlock, accelerate, functional, reference, use_backend
from mod_kernels.nn import (
    FUSED_CONV_BLOCKS,
    NarrowBasicBlock,
    NarrowBottleneck,
    NarrowConv,
    NarrowConvNeXt,
    NarrowInvertedResidual,
)
from mod_kernels.spec import CONV_KINDS


def randomised(block):
    """Norms with statistics, weights and biases that a fold must not lose; a layer scale that shows."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, 1.0)  # so that no ReLU at the end leaves nothing
        if isinstance(module, NarrowConvNeXt):
            nn.init.normal_(module.gamma)
    return block.double().eval()


@pytest.mark.parametrize("cls", FUSED_CONV_BLOCKS)
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_the_folded_form_computes_what_the_block_does(cls, k):
    torch.manual_seed(0)
    block = MoDBlock(16, randomised(cls(k)), k).double().eval()
    x = torch.randn(3, 16, 9, 5, dtype=torch.float64) * 2
    plain = block(x)
    assert not torch.equal(plain, x)
    spec = block.spec()
    assert spec.kind == cls.kind
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(functional.mod_block(x, spec), plain, rtol=1e-12, atol=1e-12)


def test_the_kinds_and_the_blocks_are_the_same_list():
    assert [cls.kind for cls in FUSED_CONV_BLOCKS] == list(CONV_KINDS)
    for cls in FUSED_CONV_BLOCKS:
        folded, kind = randomised(cls(6)).folded(), CONV_KINDS[cls.kind]
        assert [tuple(w.shape) for w in folded.weights] == kind.shapes(kind.host_mid(6), 6)


def test_each_block_is_its_hosts_branch_written_out():
    torch.manual_seed(1)
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)

    def norm(z, bn):
        mean, var = (value[:, None, None] for value in (bn.running_mean, bn.running_var))
        weight, bias = bn.weight[:, None, None], bn.bias[:, None, None]
        return (z - mean) / (var + bn.eps).sqrt() * weight + bias

    inverted = randomised(NarrowInvertedResidual(6, expand=4))
    z = norm(F.conv2d(x, inverted.conv1.weight), inverted.bn1).clamp(0, 6)
    z = norm(F.conv2d(z, inverted.conv2.weight, padding=1, groups=24), inverted.bn2).clamp(0, 6)
    z = norm(F.conv2d(z, inverted.conv3.weight), inverted.bn3)
    torch.testing.assert_close(inverted(x), z)

    conv = randomised(NarrowConv(6))
    torch.testing.assert_close(conv(x), norm(F.conv2d(x, conv.conv1.weight, padding=1), conv.bn1).clamp(min=0))

    convnext = randomised(NarrowConvNeXt(6))
    z = F.conv2d(x, convnext.dwconv.weight, convnext.dwconv.bias, padding=3, groups=6).movedim(1, -1)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    z = z * convnext.norm.weight + convnext.norm.bias
    z = z @ convnext.pwconv1.weight.T + convnext.pwconv1.bias
    z = z * (1 + torch.erf(z / 2**0.5)) / 2 @ convnext.pwconv2.weight.T + convnext.pwconv2.bias
    torch.testing.assert_close(convnext(x), (z * convnext.gamma).movedim(-1, 1))


@pytest.mark.parametrize("cls", FUSED_CONV_BLOCKS)
def test_blocks_train(cls):
    torch.manual_seed(2)
    block = MoDBlock(16, cls(4), 4, reduction=1)
    x = torch.randn(3, 16, 6, 6, requires_grad=True)
    block(x).square().sum().backward()
    assert x.grad is not None
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "cls,change,reason",
    [
        (NarrowInvertedResidual, lambda b: setattr(b, "conv2", nn.Conv2d(24, 24, 3, padding=1)), "do not fit"),
        (NarrowInvertedResidual, lambda b: setattr(b, "bn2", nn.GroupNorm(1, 24)), "bn2 is a GroupNorm"),
        (NarrowConv, lambda b: setattr(b, "bn1", nn.BatchNorm2d(4, track_running_stats=False)), "no running"),
        (NarrowConv, lambda b: setattr(b.conv1, "stride", (2, 2)), "conv1 is not of stride 1"),
        (NarrowConvNeXt, lambda b: setattr(b.norm, "eps", 1e-5), "norm is not over 4 channels with eps 1e-06"),
        (NarrowConvNeXt, lambda b: setattr(b, "norm", nn.GroupNorm(1, 4)), "norm is a GroupNorm"),
        (NarrowConvNeXt, lambda b: setattr(b.pwconv1, "bias", None), "pwconv1 has no weight or no bias"),
        (NarrowConvNeXt, lambda b: setattr(b.dwconv, "padding_mode", "reflect"), "dwconv is not a depthwise 7x7"),
        (NarrowConvNeXt, lambda b: setattr(b, "pwconv2", nn.Linear(8, 4)), "do not go from k=4 channels and back"),
        (NarrowBottleneck, lambda b: setattr(b, "conv1", nn.Conv2d(4, 2, 1)), "conv2's weights do not fit"),
        (NarrowBasicBlock, lambda b: setattr(b, "k", 5), "takes k=5 channels"),
    ],
)
def test_what_can_not_be_folded_is_named(cls, change, reason):
    block = MoDBlock(16, cls(4), 4).eval()
    change(block.conv_block)
    with pytest.warns(UserWarning, match=reason):
        accelerate(block)
    with pytest.raises(ValueError, match=reason):
        block.spec()


@pytest.mark.parametrize("cls", FUSED_CONV_BLOCKS)
def test_a_changed_tensor_is_never_answered_with_the_old_fold(cls):
    torch.manual_seed(3)
    block = MoDBlock(16, randomised(cls(4)), 4).double().eval()
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        accelerate(block)(x)
        for name, tensor in block.state_dict(keep_vars=True).items():
            if name.endswith("num_batches_tracked"):
                continue
            tensor.mul_(1.5).add_(0.25)
            fresh = copy.deepcopy(block)
            fresh._fused = None
            torch.testing.assert_close(block(x), fresh(x), rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("expand", [0, -1, 1.5, True])
def test_an_impossible_expansion_is_refused(expand):
    with pytest.raises(ValueError, match="expand must be an int of at least 1"):
        NarrowInvertedResidual(4, expand)


def test_relu6_keeps_nan():
    x = torch.full((1, 16, 3, 3), float("nan"))
    block = MoDBlock(16, randomised(NarrowInvertedResidual(2)).float(), 2).eval()
    with torch.no_grad():
        assert reference.mod_block(x, block.spec())[:, :2].isnan().all()

"""BN folding against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mod_kernels.nn import fold_batch_norm
from mod_kernels.nn._folding import fold_layer_norm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_as_torch_folds(bias, affine):
    conv, norm = nn.Conv2d(4, 6, 3, bias=bias).double(), nn.BatchNorm2d(6, eps=1e-3, affine=affine).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    weight, folded_bias = fold_batch_norm(conv, norm)
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    expected = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    assert torch.allclose(weight, expected[0], rtol=1e-13) and torch.allclose(folded_bias, expected[1], rtol=1e-13)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.allclose(torch.conv2d(x, weight, folded_bias), norm.eval()(conv(x)), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_folded_in_float32(dtype):
    conv, norm = nn.Conv2d(4, 6, 1, bias=False).to(dtype), nn.BatchNorm2d(6).to(dtype)
    norm.running_var.uniform_(0.1, 2)
    weight, bias = fold_batch_norm(conv, norm)
    assert weight.dtype == bias.dtype == torch.float32
    scale = (norm.running_var.double() + norm.eps).rsqrt()[:, None, None, None]
    assert torch.allclose(weight.double(), conv.weight.double() * scale, rtol=1e-6)  # not rounded to half


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_norm_s_own_go_into_the_product_behind_it(autocast):
    """In full precision under autocast too: torch.compile traces the fold wherever the network is called."""
    norm, conv = nn.LayerNorm(6), nn.Conv2d(6, 9, 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weight, bias = fold_layer_norm(conv.weight.detach(), conv.bias.detach(), norm)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    bare = nn.functional.layer_norm(x.movedim(1, 3), (6,), eps=norm.eps).movedim(3, 1)
    expected = conv.double()(norm.double()(x.movedim(1, 3)).movedim(3, 1))
    assert torch.allclose(torch.conv2d(bare, weight.double(), bias.double()), expected, rtol=1e-5, atol=1e-5)

"""MoDBlock against a plain block written by hand, and the reference: outputs, gradients, keys, refusals."""

import copy

import pytest
import torch
from torch import nn

from mod_kernels import ChannelSelector, MoDBlock, reference, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.nn import NarrowBasicBlock, NarrowBottleneck

from ..blocks import CHANNELS, K, feature_map, make_block


class PlainMoDBlock(nn.Module):
    """The block as a user of plain PyTorch would write it: no part of mod_kernels in it."""

    class Selector(nn.Module):
        def __init__(self, channels, hidden, bias):
            super().__init__()
            self.fc1 = nn.Linear(channels, hidden, bias=bias)
            self.fc2 = nn.Linear(hidden, channels, bias=bias)

    class Bottleneck(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(k, k // 4, 1, bias=False), nn.BatchNorm2d(k // 4)
            self.conv2, self.bn2 = nn.Conv2d(k // 4, k // 4, 3, padding=1, bias=False), nn.BatchNorm2d(k // 4)
            self.conv3, self.bn3 = nn.Conv2d(k // 4, k, 1, bias=False), nn.BatchNorm2d(k)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = torch.relu(self.bn2(self.conv2(x)))
            return self.bn3(self.conv3(x))

    def __init__(self, channels, k, hidden, bias=False):
        super().__init__()
        self.k = k
        self.selector = self.Selector(channels, hidden, bias)
        self.conv_block = self.Bottleneck(k)

    def forward(self, x):
        hidden = torch.relu(self.selector.fc1(x.mean((2, 3))))
        scores, index = torch.topk(torch.sigmoid(self.selector.fc2(hidden)), self.k)
        z = self.conv_block(torch.stack([sample[row] for sample, row in zip(x, index, strict=True)]))
        added = x[:, : self.k] + scores[:, :, None, None] * z
        return torch.cat((added, x[:, self.k :]), dim=1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_weights_and_outputs_are_a_plain_blocks(bias, training):
    plain = PlainMoDBlock(CHANNELS, K, CHANNELS // 2, bias).double().train(training)
    block = make_block(bias=bias, dtype=torch.float64).train(training)
    assert list(block.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(block.state_dict())
    x = feature_map(torch.float64)
    assert relative_norm(block(x).detach(), plain(x).detach()) < VALUES[torch.float64]
    # Running statistics moved the same way, and the plain block's state goes back.
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(block.state_dict()[name], tensor), name
    block.load_state_dict(plain.state_dict())


def test_keys_are_those_of_the_design():
    keys = list(make_block(NarrowBasicBlock(K)).state_dict())
    assert keys[:3] == ["selector.fc1.weight", "selector.fc2.weight", "conv_block.conv1.weight"]
    assert "conv_block.bn2.running_var" in keys


@pytest.mark.parametrize("conv_block", [NarrowBottleneck(K), NarrowBasicBlock(K), nn.Conv2d(K, K, 3, padding=1)])
@pytest.mark.parametrize("position", ["first", "last", "original"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("given_to", ["reference", "auto"])
def test_gradients_reach_everything(conv_block, position, pooled, given_to, oracle_engine):
    """Gradients through the ops' own backward (an engine serves) against autograd of the plain formula."""
    block = make_block(copy.deepcopy(conv_block), torch.float64, position=position, bias=True)
    x = feature_map(torch.float64).requires_grad_()
    dy = torch.randn_like(x)
    wanted = [x, *block.parameters()]

    def formula(x):
        selector = block.selector
        hidden = torch.relu(x.mean((2, 3)) @ selector.fc1.weight.t() + selector.fc1.bias)
        scores, index = torch.topk(torch.sigmoid(hidden @ selector.fc2.weight.t() + selector.fc2.bias), K)
        rows = torch.arange(x.shape[0])[:, None]
        z = scores[:, :, None, None] * block.conv_block(x[rows, index])
        columns = {"first": torch.arange(K), "last": torch.arange(CHANNELS - K, CHANNELS), "original": index}
        target = columns[position].expand_as(index)
        return x.index_put((rows, target), z, accumulate=True)

    expected = torch.autograd.grad((formula(x) * dy).sum(), wanted)
    with use_backend(given_to):
        y = block(x, x.mean((2, 3))) if pooled else block(x)
        got = torch.autograd.grad((y * dy).sum(), wanted)
    for g, e, name in zip(got, expected, ["x", *dict(block.named_parameters())], strict=True):
        assert relative_norm(g, e) < 1e-11, name
        assert e.norm() > 0 or "conv" in name  # a conv's gradient before a BN may vanish; the selector's not


@pytest.mark.parametrize("position", ["first", "last", "original"])
@pytest.mark.parametrize("kind", [NarrowBottleneck, NarrowBasicBlock])
@pytest.mark.parametrize("final_relu", [False, True])
def test_spec_is_the_block_in_eval_mode(position, kind, final_relu):
    block = make_block(kind(K, final_relu=final_relu), torch.float64, position=position, bias=True).eval()
    x = feature_map(torch.float64)
    spec = block.spec()
    assert not any(tensor.requires_grad for tensor in spec.tensors)
    with torch.no_grad():
        assert relative_norm(reference.mod_block(x, spec), block(x)) < VALUES[torch.float64]


def test_only_permitted_writes():
    x = feature_map()
    kept = x.clone()
    block = make_block().eval()
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(x, kept)
        block.overwrite_input = True
        y = block(x)
        assert y is x and torch.equal(y, expected)

    # With a gradient to come, x stays.
    x = kept.clone()
    y = block(x)
    assert torch.equal(x, kept) and y.requires_grad

    # A permission, not a demand: a layout that can't be written into is left alone.
    x = kept.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    with torch.no_grad():
        assert relative_norm(block(x), expected) < VALUES[torch.float32]
    assert torch.equal(x, kept)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype):
    block = make_block()
    x = feature_map(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        assert y.dtype == x_dtype
        y.float().square().sum().backward()
    double = copy.deepcopy(block).double()
    reference_x = x.detach().double().requires_grad_()
    expected = double(reference_x)
    expected.square().sum().backward()
    # The conv block ran in bfloat16 (BN between: errors add up over three layers).
    assert relative_norm(y.detach(), expected.detach()) < 3 * VALUES[torch.bfloat16]
    assert torch.isfinite(x.grad).all() and torch.isfinite(block.selector.fc1.weight.grad).all()
    assert block.selector.fc2.weight.grad.norm() > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_graph_under_compile(training, compiler):
    torch._dynamo.reset()
    block = make_block().train(training)
    compiled_block = copy.deepcopy(block)
    compiled = torch.compile(compiled_block, fullgraph=True, backend=compiler)
    x = feature_map().requires_grad_()
    if training:
        expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *compiled_block.parameters()])
        for g, e in zip(got, expected, strict=True):
            assert torch.allclose(g, e, rtol=1e-3, atol=1e-4 * max(1, e.abs().max()))
    else:
        with torch.no_grad():
            assert relative_norm(compiled(x), block(x)) < VALUES[torch.float32]


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_plain_aten(strict):
    block, x = make_block(overwrite_input=True).eval(), feature_map()
    with torch.no_grad():
        program = torch.export.export(block, (x,), strict=strict)
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        names = {str(target) for target in targets if isinstance(target, torch._ops.OpOverload)}
        assert names and all(name.startswith("aten.") for name in names), names
        kept = x.clone()
        y = program.module()(x)
        assert torch.equal(x, kept)  # an exported graph does not write into its input
        assert relative_norm(y, block(x)) < VALUES[torch.float32]


def test_selector_alone():
    selector = ChannelSelector(48, 5)
    assert selector.fc1.weight.shape == (3, 48) and selector.fc2.weight.shape == (48, 3)
    assert ChannelSelector(4, 1).fc1.weight.shape == (1, 4)  # at least one hidden unit
    x = torch.randn(2, 48, 3, 3)
    scores, index = selector(x)
    assert scores.shape == index.shape == (2, 5)
    again, same = selector(torch.full_like(x, float("nan")), x.mean((2, 3)))  # pooled given: x is not read
    assert torch.equal(same, index) and torch.allclose(again, scores)


@pytest.mark.parametrize("k", [1, 2, 3, 16])
def test_narrow_blocks_keep_the_shape(k):
    bottleneck, basic = NarrowBottleneck(k), NarrowBasicBlock(k)
    assert bottleneck.conv2.weight.shape[:2] == (max(1, k // 4),) * 2
    x = torch.randn(2, k, 5, 4)
    assert bottleneck(x).shape == basic(x).shape == x.shape
    assert (bottleneck.eval()(x) < 0).any()
    assert (NarrowBottleneck(k, final_relu=True)(x) >= 0).all()


def test_a_conv_block_of_another_shape():
    with pytest.raises(ValueError, match=r"conv_block must keep the shape of its input \(3, 8, 7, 5\), got"):
        make_block(nn.Conv2d(K, K, 3))(feature_map())
    with pytest.raises(ValueError, match="conv_block must keep the shape"):
        make_block(nn.Conv2d(K, K + 1, 1))(feature_map())


def test_refusals():
    with pytest.raises(ValueError, match="k must be between 1 and C=8, got k=9"):
        MoDBlock(8, nn.Identity(), 9)
    with pytest.raises(ValueError, match="position must be one of"):
        MoDBlock(8, nn.Identity(), 2, position="middle")
    with pytest.raises(ValueError, match="conv_block must take the k=2 channels that are chosen, it takes 4"):
        MoDBlock(8, NarrowBottleneck(4), 2)
    with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
        MoDBlock(8, nn.Identity(), 2, reduction=0)
    with pytest.raises(ValueError, match=r"x must be \(N, C=32, H, W\), got shape \(1, 31, 2, 2\)"):
        make_block()(torch.randn(1, 31, 2, 2))
    with pytest.raises(ValueError, match="no spec: its conv_block is a Identity"):
        MoDBlock(8, nn.Identity(), 2).spec()


def test_repr():
    text = repr(MoDBlock(8, nn.Identity(), 2, overwrite_input=True))
    assert text.startswith("MoDBlock(\n  channels=8, k=2, position='first', overwrite_input=True")

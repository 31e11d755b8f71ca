"""The tools people train with: autocast, gradient scaling, compiled training, synchronised batch norms."""

import copy

import pytest
import torch
from torch import nn

from mod_kernels import MoDBlock, use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU
from mod_kernels.nn import NarrowBottleneck

from .support import CHANNELS, K, gradients, make_stages

pytestmark = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast(amp):
    """Gradients in the parameters' own float32, near those of float64 as far as the convolutions' dtype allows."""
    stage, plain = make_stages(torch.float32)
    plain = plain.double()
    x, dy = torch.randn(2, 32, 10, 10), torch.randn(2, 64, 5, 5)
    with use_backend("cpu"), torch.autocast("cpu", amp):
        y, found = gradients(stage, x, dy)
    expected_y, expected = gradients(plain, x.double(), dy.double())
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert relative_norm(y, expected_y) < 10 * VALUES[amp]
    # The selections may differ where logits are near each other, so that only the stem's direction is asked for.
    cosine = torch.cosine_similarity(found[0].double().flatten(), expected[0].flatten(), dim=0)
    assert cosine > 0.9


def test_gradient_scaling():
    """An overflow skips the step and lowers the scale; the next step moves every parameter."""
    block = MoDBlock(CHANNELS, NarrowBottleneck(K), K, reduction=2)
    nn.init.normal_(block.selector.fc1.weight, std=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x = torch.randn(4, CHANNELS, 6, 6)
    before = copy.deepcopy(block.state_dict())
    scales = []
    with use_backend("cpu"):
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = block(x.half()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            if len(scales) > 1 and scales[-1] == scales[-2]:
                break
    assert scales[0] < 2.0**40 and scales[-1] == scales[-2]
    for name, parameter in block.named_parameters():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_training_step(compiler, memory_format):
    """One graph forward, one backward, on the engine's kernels, in x's layout."""
    torch._dynamo.reset()
    block = MoDBlock(CHANNELS, NarrowBottleneck(K), K, reduction=2)
    nn.init.normal_(block.selector.fc1.weight, std=0.5)
    graphs = []

    def keeping(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    x, dy = (torch.randn(2, CHANNELS, 7, 5).contiguous(memory_format=memory_format) for _ in range(2))
    with use_backend("cpu"):
        y, expected = gradients(copy.deepcopy(block), x, dy)
        got_y, found = gradients(torch.compile(block, fullgraph=True, backend=compiler), x, dy)
        torch._dynamo.reset()
        backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keeping, bw_compiler=keeping)
        gradients(torch.compile(block, fullgraph=True, backend=backend), x, dy)
    assert relative_norm(got_y, y) < VALUES[torch.float32]
    for got, wanted in zip(found, expected, strict=True):
        assert relative_norm(got, wanted) < 20 * VALUES[torch.float32]
    assert found[0].is_contiguous(memory_format=memory_format)
    forward, backward = graphs
    assert "mod_kernels_cpu.select_channels_saving.default" in forward
    assert "mod_kernels_cpu.input_gradient.default" in backward


def test_batch_norms_can_be_synchronised():
    """The narrowed blocks hold PyTorch's own batch norms: converted, they keep their parameters and statistics."""
    block = MoDBlock(CHANNELS, NarrowBottleneck(K), K)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    norms = [m for m in converted.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 3 and list(converted.state_dict()) == list(block.state_dict())
    x = torch.randn(2, CHANNELS, 5, 5)
    # One process has nothing to synchronise with; in training it needs a GPU all the same.
    # PyTorch runs the synchronised ones, the engine the others.
    assert relative_norm(converted.eval()(x), block.eval()(x)) < VALUES[torch.float32]


@pytest.mark.parametrize("momentum", [0.3, None])  # None: the average of all batches
def test_running_statistics_are_those_of_a_plain_batch_norm(momentum):
    """The narrow block's first batch norm sees exactly the gathered channels, convolved."""
    conv_block = NarrowBottleneck(K, norm_layer=lambda channels: nn.BatchNorm2d(channels, momentum=momentum))
    block, seen = MoDBlock(CHANNELS, conv_block, K), []
    conv_block.conv1.register_forward_hook(lambda module, arguments, out: seen.append(out.detach()))
    with use_backend("cpu"):
        for _ in range(3):
            block(torch.randn(2, CHANNELS, 5, 5)).sum().backward()
    norm = nn.BatchNorm2d(K // 4, momentum=momentum)
    for out in seen:
        norm(out)
    assert torch.allclose(conv_block.bn1.running_mean, norm.running_mean)
    assert torch.allclose(conv_block.bn1.running_var, norm.running_var)
    assert conv_block.bn1.num_batches_tracked == 3

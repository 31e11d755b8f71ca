"""PyTorch's flop counter counts a network the same, whoever runs it."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mod_kernels import MoDBlock, accelerate, functional, models, use_backend
from mod_kernels.backends.native import CPU
from mod_kernels.nn import NarrowBasicBlock, NarrowBottleneck

pytestmark = [
    pytest.mark.skipif(CPU.library is None, reason="no compiled library"),
    pytest.mark.usefixtures("one_thread"),
]


class NoModules:
    """In place of the counter's tracker of modules, whose global hooks make a MoD block run part by part."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def counted(call, by_module=False):
    """The total, and the names of the ops that counted."""
    counter = FlopCounterMode(display=False)
    if not by_module:
        counter.mod_tracker = NoModules()
    with counter:
        call()
    return counter.get_total_flops(), {str(op) for op in counter.get_flop_counts()["Global"]}


@pytest.mark.parametrize("narrow", [NarrowBottleneck, NarrowBasicBlock])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_block_in_inference(narrow, overwrite):
    n, c, h, w, k, r = 3, 32, 5, 7, 8, 2
    block = MoDBlock(c, narrow(k), k, overwrite_input=overwrite).eval()
    selector = 2 * n * 2 * c * r
    taps = k * 2 + 2 * 9 * 2 + 2 * k if narrow is NarrowBottleneck else 2 * k * 9 * k
    expected = selector + 2 * n * h * w * taps
    x = torch.randn(n, c, h, w)
    with torch.no_grad():
        with use_backend("reference"):
            assert counted(lambda: block(x))[0] == expected
        total, ops = counted(lambda: block(x))
        assert total == expected and "mod_kernels_cpu.select_channels" in ops
        total, ops = counted(lambda: accelerate(block)(x))
        assert total == expected
        assert ops == {"mod_kernels_cpu.mod_block" + ("_" if overwrite else "")}


def test_the_triton_engines_ops_count_as_the_cpus():
    """Which has the tail as an op of its own, and counters as one more argument. No kernel runs."""
    ops, k = torch.ops.mod_kernels_triton, 8
    spec = MoDBlock(32, NarrowBottleneck(k), k).eval().spec()
    n_weights = sum(weight.numel() for weight in spec.conv_weights)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, scores, index = torch.empty(3, 32, 5, 7), torch.empty(3, k), torch.empty((3, k), dtype=torch.int64)
        tail, _ = counted(lambda: ops.tail_(x, scores, index, *spec.conv_arguments))
        assert tail == 2 * 3 * 5 * 7 * n_weights
        counters = torch.empty(3, dtype=torch.int32)
        arguments = (x, *spec.selector_arguments, None, k, *spec.conv_arguments, counters)
        for op in (ops.mod_block, ops.mod_block_):
            assert counted(lambda op=op: op(*arguments))[0] == tail + 2 * 3 * 2 * 32 * 2


@pytest.mark.parametrize("narrow", [NarrowBottleneck, NarrowBasicBlock])
@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("selector.fc1.weight",),
        ("selector.fc2.weight",),
        ("conv_block.conv1.weight",),
        ("selector.fc1.weight", "conv_block.conv2.weight", "conv_block.bn1.weight"),
    ],
)
def test_a_block_in_training(narrow, frozen):
    """Forward and backward, whatever wants a gradient."""
    k = 8
    block = MoDBlock(32, narrow(k), k)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)

    def step():
        x = torch.randn(3, 32, 5, 7, requires_grad=True)
        block(x).sum().backward()

    with use_backend("reference"):
        expected, _ = counted(step)
    total, ops = counted(step)
    assert "mod_kernels_cpu.conv_block_backward" in ops and "aten.convolution" not in ops
    assert total == expected


def test_what_multiplies_nothing_counts_nothing():
    x, z = torch.randn(2, 8, 3, 3), torch.randn(2, 2, 3, 3)
    index, scores = torch.tensor([[1, 2], [7, 0]]), torch.ones(2, 2)

    def call():
        functional.gather_channels(x, index)
        functional.fuse_channels(x, z, scores)
        functional.add_relu_pool(x, x)

    assert counted(call) == (0, set())


@pytest.mark.parametrize("name", ["resnet50_mod", "mobilenet_v2_mod", "vgg16_bn_mod", "convnext_tiny_mod"])
def test_a_network_counts_the_same_plain_and_accelerated(name):
    small = {"stem": "cifar"} if name.startswith("vgg") else {}
    model = getattr(models, name)(num_classes=10, **small).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        with use_backend("reference"):
            plain, ops = counted(lambda: model(x))
            assert not [op for op in ops if "mod_kernels" in op]
        accelerate(model)
        assert counted(lambda: model(x))[0] == plain
        assert counted(lambda: model(x), by_module=True)[0] == plain


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "mod_kernels"])
def test_the_order_of_the_imports_does_not_matter(first):
    then = ({"torch.utils.flop_counter", "mod_kernels"} - {first}).pop()
    code = f"""
import importlib, sys
import {first}
import {then}
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from mod_kernels.backends.native import CPU
import torch
assert not [one for one in sys.meta_path if "mod_kernels" in type(one).__module__]
with FlopCounterMode(display=False) as counter:
    CPU.ops["select_channels"](torch.ones(1, 4, 2, 2), torch.ones(2, 4), torch.ones(4, 2), None, None, None, 2)
assert counter.get_total_flops() == 32
"""
    subprocess.run([sys.executable, "-c", code], check=True)

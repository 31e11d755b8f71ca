"""Which conv blocks are trained as one op, and which are left to PyTorch: asserted by the calls of the op."""

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from mod_kernels import use_backend
from mod_kernels.backends.native import CPU
from mod_kernels.nn import NarrowBasicBlock, NarrowBottleneck

from .conv_blocks import make, norms, random

pytestmark = [
    pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems)),
    pytest.mark.usefixtures("one_thread"),
]


class OwnNorm(nn.BatchNorm2d):
    pass


def hooked(block):
    block.conv2.register_forward_hook(lambda *arguments: None)


def biases_alone(block):
    for norm in norms(block):
        norm.weight = None


def replaced(name, make):
    def change(block):
        old = getattr(block, name)
        setattr(block, name, make(old))

    return change


def conv_like(**options):
    return lambda old: nn.Conv2d(
        old.in_channels, old.out_channels, 3, **{"padding": 1, "bias": False, **options}, dtype=torch.float32
    )


LEFT_TO_PYTORCH = {
    "hook": hooked,
    "synchronised norm": replaced("bn2", lambda old: nn.SyncBatchNorm(old.num_features)),
    "own class": replaced("bn2", lambda old: OwnNorm(old.num_features)),
    "bias": replaced("conv2", conv_like(bias=True)),
    "dilation": replaced("conv2", conv_like(dilation=2, padding=2)),
    "groups": replaced("conv2", conv_like(groups=2)),
    "padding mode": replaced("conv2", conv_like(padding_mode="reflect")),
    "one norm frozen": lambda block: block.bn2.eval(),
    "one norm of another eps": replaced("bn2", lambda old: nn.BatchNorm2d(old.num_features, eps=0.1)),
    "group norm": replaced("bn2", lambda old: nn.GroupNorm(1, old.num_features)),
    "group norm first": replaced("bn1", lambda old: nn.GroupNorm(1, old.num_features)),
    "frozen norm first": replaced("bn1", lambda old: FrozenBatchNorm2d(old.num_features)),
    "no norm first": replaced("bn1", lambda old: nn.Identity()),
    "norms of a bias alone": biases_alone,
    "weight norm": replaced("conv2", lambda old: nn.utils.parametrizations.weight_norm(old)),
    "no running mean": lambda block: setattr(block.bn2, "running_mean", None),
    "wide weight": replaced("conv2", lambda old: old.double()),
}


REFUSED = ("no running mean", "wide weight")  # by PyTorch itself


@pytest.mark.parametrize("change", LEFT_TO_PYTORCH)
def test_what_is_left_to_pytorch(change, conv_calls):
    block = make(NarrowBottleneck, 8, torch.float32)
    LEFT_TO_PYTORCH[change](block)
    x = random(3, 8, 7, 7, dtype=torch.float32).requires_grad_()
    with use_backend("cpu"):
        if change in REFUSED:
            with pytest.raises((RuntimeError, ValueError)):
                block(x)
        else:
            assert torch.equal(block(x).isfinite(), torch.ones_like(x, dtype=torch.bool))
    assert not conv_calls


@pytest.mark.parametrize(
    "how", ["no grad", "nothing needs one", "reference", "bfloat16", "autocast", "channels_last"]
)
def test_calls_that_are_left_to_pytorch(how, conv_calls):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    block, x = make(NarrowBasicBlock, 8, dtype), random(3, 8, 7, 7, dtype=dtype)
    block.requires_grad_(how != "nothing needs one")
    if how == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    with (
        use_backend("reference" if how == "reference" else "cpu"),
        torch.set_grad_enabled(how != "no grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
    ):
        z = block(x)
    assert z.shape == x.shape and not conv_calls
    if how == "channels_last":
        assert z.is_contiguous(memory_format=torch.channels_last)


def test_many_channels_of_a_3x3_are_left_to_pytorch(conv_calls):
    for k, is_served in ((16, True), (17, False)):
        conv_calls.clear()
        with use_backend("cpu"):
            make(NarrowBasicBlock, k)(random(2, k, 3, 3))
        assert bool(conv_calls) == is_served


def test_function_transforms_and_forward_mode_are_left_to_pytorch(conv_calls):
    block, x = make(NarrowBottleneck, 4).eval(), random(2, 4, 3, 3)
    with use_backend("cpu"):
        torch.func.grad(lambda x: block(x).sum())(x)
        torch.func.vmap(block)(x[None])
        torch.func.jvp(block, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            block(torch.autograd.forward_ad.make_dual(x, x))
    assert not conv_calls


def test_many_gradients_at_once_are_pytorchs(conv_calls):
    """The forward has run as one op by then; the backward of a batch of gradients is composed."""
    block, x = make(NarrowBottleneck, 4).eval(), random(2, 4, 3, 3)
    with use_backend("cpu"):
        found = torch.autograd.functional.jacobian(block, x, vectorize=True)
    assert conv_calls
    with use_backend("reference"):
        expected = torch.autograd.functional.jacobian(block, x)
    assert expected.abs().max() > 0.01 and torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_compiled_it_is_left_to_pytorch(conv_calls):
    block, x = make(NarrowBottleneck, 4, torch.float32), random(2, 4, 3, 3, dtype=torch.float32)
    with use_backend("cpu"):
        torch.compile(block, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert not conv_calls

"""Conv blocks trained as one op, against the same modules run by PyTorch: values, gradients, statistics."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mod_kernels import use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU
from mod_kernels.nn import NarrowBasicBlock, NarrowBottleneck, _conv_training

from .conv_blocks import KINDS, make, norms, random, step

pytestmark = [
    pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems)),
    pytest.mark.usefixtures("fresh_memory_is_nan", "one_thread"),
]
# (N, H, W): planes of 49, 1 and 35 values, more samples than one group of a weight's gradient has, and pixels
# that are whole vectors, which the 1x1 reads where they lie.
SIZES = ((3, 7, 7), (4, 1, 1), (40, 5, 7), (2, 16, 16), (19, 1, 3), (1, 56, 56))
# Gradients, times VALUES: sums over N, H and W through two or three batch norms, whose own gradients are
# differences of such sums. PyTorch's are as far from float64.
GRADIENTS = 20


def both_ran(conv_calls):
    return [name for name, _ in conv_calls] == ["conv_block_saving", "conv_block_backward"]


def assert_as_pytorch(block, x, dz, conv_calls):
    """Fused on x's dtype, against PyTorch in float64; the buffers of both after it.

    A gradient may be zero but for rounding: a norm takes back what the weight or the shift of a single channel
    before it does. With few channels errors are therefore judged beside the largest of the gradients.
    """
    wide = copy.deepcopy(block).double()
    found = step(block, x, dz)
    assert both_ran(conv_calls)
    expected = step(wide, x.double(), dz.double(), "reference")
    tolerance = VALUES[x.dtype]
    assert relative_norm(found[0], expected[0]) < tolerance
    names = ["x", *(name for name, p in block.named_parameters() if p.requires_grad)]
    norm = torch.linalg.vector_norm
    floor = max(map(norm, expected[1:])) if block.k < 8 else 0.0
    for name, got, wanted in zip(names, found[1:], expected[1:], strict=True):
        assert got.dtype == x.dtype and got.shape == wanted.shape
        assert norm(got.double() - wanted) <= GRADIENTS * tolerance * max(floor, norm(wanted)), name
    for (name, got), wanted in zip(block.named_buffers(), wide.buffers(), strict=True):
        assert relative_norm(got, wanted) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("k", [1, 3, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_pytorchs(kind, k, final_relu, dtype, conv_calls, monkeypatch):
    monkeypatch.setattr(_conv_training, "_MOST_CHANNELS_3X3", 32)  # where PyTorch is quicker the op is right too
    for n, h, w in SIZES:
        conv_calls.clear()
        x, dz = (random(n, k, h, w, dtype=dtype) for _ in range(2))
        assert_as_pytorch(make(kind, k, dtype, final_relu=final_relu), x, dz, conv_calls)


def test_a_mean_far_from_zero_costs_no_precision(conv_calls):
    """The variance is of distances from the mean, never a difference of large sums."""
    x, dz = random(4, 4, 9, 9, dtype=torch.float32) + 300, random(4, 4, 9, 9, dtype=torch.float32)
    block = make(NarrowBottleneck, 4, torch.float32)
    nn.init.uniform_(block.conv1.weight, 0.1, 1.0)
    wide = copy.deepcopy(block).double()
    # x and what the convolutions make of it are rounded at 300 and more: 2^-24 of that is what there is to lose.
    assert relative_norm(step(block, x, dz)[0], step(wide, x.double(), dz.double(), "reference")[0]) < 1e-3
    assert both_ran(conv_calls)
    assert relative_norm(block.bn1.running_var, wide.bn1.running_var) < 1e-3


def set_all(block, **attributes):
    for norm in norms(block):
        for name, value in attributes.items():
            setattr(norm, name, value)


VARIANTS = {
    "cumulative": lambda block: set_all(block, momentum=None),
    "momentum and eps": lambda block: set_all(block, momentum=0.3, eps=0.1),
    "not affine": lambda block: None,
    "not tracked": lambda block: None,
    "tracking switched off": lambda block: set_all(block, track_running_stats=False),
    "frozen": lambda block: [norm.eval() for norm in norms(block)],
    "eval": lambda block: block.eval(),
    "frozen, not tracked": lambda block: [norm.eval() for norm in norms(block)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_every_setting(kind, variant, dtype, conv_calls):
    options = {"affine": variant != "not affine", "track_running_stats": "not tracked" not in variant}
    block = make(kind, 8, dtype, norm_layer=lambda channels: nn.BatchNorm2d(channels, **options))
    for norm in norms(block):
        if norm.track_running_stats:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    VARIANTS[variant](block)
    for _ in range(3):
        conv_calls.clear()
        x, dz = (random(3, 8, 5, 7, dtype=dtype) for _ in range(2))
        assert_as_pytorch(block, x, dz, conv_calls)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_sliced_map(kind, conv_calls):
    x, dz = random(6, 8, 7, 7)[::2], random(6, 8, 7, 7)[::2]
    assert_as_pytorch(make(kind, 8), x, dz, conv_calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 4, 7, 7), (1, 4, 1, 1)])
def test_a_batch_without_statistics_is_pytorchs_affair(kind, shape, conv_calls):
    block, x = make(kind, 4), random(*shape).requires_grad_()
    results = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            try:
                z = copy.deepcopy(block)(x)
                results.append((z.shape, *(g.shape for g in torch.autograd.grad(z.sum(), [x]))))
            except ValueError as error:
                results.append(str(error))
    assert results[0] == results[1] and not conv_calls
    if shape[0]:
        assert results[0].startswith("Expected more than 1 value per channel when training")


@pytest.mark.parametrize(
    ("trained", "needed"),
    [
        ("x", [True] + [False] * 9),
        ("conv3", [False] * 3 + [True] + [False] * 6),
        ("bn3", [False] * 6 + [True] + [False] * 2 + [True]),
        ("conv1", [False, True] + [False] * 8),
        ("bn1", [False] * 4 + [True] + [False] * 2 + [True] + [False] * 2),
    ],
)
def test_what_is_frozen_is_not_computed(trained, needed, conv_calls):
    block, x, dz = make(NarrowBottleneck, 8), random(3, 8, 7, 7).requires_grad_(trained == "x"), random(3, 8, 7, 7)
    block.requires_grad_(False)
    if trained != "x":
        getattr(block, trained).requires_grad_(True)
    wanted = [x] if trained == "x" else list(getattr(block, trained).parameters())
    found = {}
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            found[backend] = torch.autograd.grad(block(x), wanted, dz)
    assert both_ran(conv_calls) and conv_calls[1][1][-1] == needed
    for got, expected in zip(found["cpu"], found["reference"], strict=True):
        assert relative_norm(got, expected) < GRADIENTS * VALUES[torch.float64]
    raw = CPU.ops["conv_block_backward"](*conv_calls[1][1])
    assert [one.numel() > 0 for one in (raw[0], *raw[1])] == needed


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_second_derivatives(kind, frozen, final_relu, conv_calls):
    block = make(kind, 2, final_relu=final_relu)
    for norm in norms(block):
        norm.track_running_stats = False  # nothing that changes from call to call
        norm.train(not frozen)
    names, parameters = zip(*block.named_parameters(), strict=True)
    x = random(2, 2, 3, 2).requires_grad_()

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(run, (x, *parameters))
        assert {name for name, _ in conv_calls} == {"conv_block_saving", "conv_block_backward"}
        assert torch.autograd.gradgradcheck(run, (x, *parameters))


def test_a_second_derivative_with_a_parameter_behind_x():
    """x made of the block's own weight: what reaches the weight through x is counted once."""
    block, dz, results = make(NarrowBottleneck, 4), random(2, 4, 3, 3), []
    wanted = [p for p in block.parameters() if p is not block.bn3.bias]  # on which no first derivative depends
    for backend in ("cpu", "reference"):
        weight = block.conv3.weight
        x = random(2, 4, 3, 3) if not results else results[0][0]
        with use_backend(backend):
            z = block(x * weight.sum())
            (first,) = torch.autograd.grad(z, weight, dz, create_graph=True)
            results.append((x, first, *torch.autograd.grad(first.pow(2).sum(), wanted)))
    for got, expected in zip(*results, strict=True):
        assert relative_norm(got.detach(), expected.detach()) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_any_number_of_threads(kind):
    """Of more samples than there are groups, and in every order the threads may take."""
    block, results = make(kind, 8, torch.float32), []
    x, dz = (random(37, 8, 14, 13, dtype=torch.float32) for _ in range(2))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        own = copy.deepcopy(block)
        results.append([*step(own, x, dz), *own.buffers()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_the_backward(kind):
    """No more than the PyTorch form keeps, and never a normalised map."""
    block, x, kept = make(kind, 16, torch.float32), random(4, 16, 14, 14, dtype=torch.float32), {}
    known = {one.untyped_storage().data_ptr() for one in itertools.chain(block.parameters(), block.buffers())}
    for backend in ("cpu", "reference"):
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z = block(x.requires_grad_())
        assert z.untyped_storage().data_ptr() not in saved
        kept[backend] = sum(size for at, size in saved.items() if at not in known)
    maps = {NarrowBottleneck: 2.5, NarrowBasicBlock: 3}[kind]
    assert kept["cpu"] <= 1.01 * maps * x.nbytes < kept["reference"]


@pytest.mark.parametrize("op", ["conv_block_saving", "conv_block_backward"])
def test_arguments_that_the_kernels_could_not_read_are_refused(op, conv_calls):
    block = make(NarrowBottleneck, 8)
    step(block, random(2, 8, 5, 5), random(2, 8, 5, 5))
    arguments = next(arguments for name, arguments in conv_calls if name == op)
    cut = [
        (i, one.narrow(0, 0, 1).transpose(0, 1) if isinstance(one, torch.Tensor) else one[:-1])
        for i, one in enumerate(arguments)
        if isinstance(one, (torch.Tensor, list))
    ]
    for i, wrong in cut:
        with pytest.raises(RuntimeError, match=r"must|go together|say of"):
            CPU.ops[op](*arguments[:i], wrong, *arguments[i + 1 :])
    for i, one in enumerate(arguments):
        if isinstance(one, torch.Tensor) or (isinstance(one, list) and isinstance(one[0], torch.Tensor)):
            wrong = one.float() if isinstance(one, torch.Tensor) else [t.float() for t in one]
            with pytest.raises(RuntimeError, match="dtype"):
                CPU.ops[op](*arguments[:i], wrong, *arguments[i + 1 :])
    x = random(1, 8, 1, 1)
    if op == "conv_block_saving":
        with pytest.raises(RuntimeError, match="more than 1 value per channel"):
            CPU.ops[op](x, *arguments[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_to_the_statistics_is_known(kind, conv_calls):
    """By the tensors' versions, as after PyTorch's own batch norm: an accelerated block goes by them."""
    block = make(kind, 4)
    statistics = [one for norm in norms(block) for one in (norm.running_mean, norm.running_var)]
    before = [one._version for one in statistics]
    step(block, random(2, 4, 5, 5), random(2, 4, 5, 5))
    assert conv_calls and all(one._version > was for one, was in zip(statistics, before, strict=True))

"""optimize_for_inference: the same numbers, choices by times, nothing silently wrong, the model left as it is."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

from mod_kernels import accelerate, models, optimize, optimize_for_inference
from mod_kernels._compiled import compiled
from mod_kernels._fold_norms import fold_norms
from mod_kernels._tolerances import NETWORKS, relative_norm
from mod_kernels.backends.native import CPU
from mod_kernels.foreign import FusedForeign
from mod_kernels.nn import MoDBlock, NarrowBasicBlock

from .accelerate.plain_blocks import C as FOREIGN_CHANNELS
from .accelerate.plain_blocks import LinearsGatherClone


def network(dtype=torch.float32, build=models.resnet18_mod):
    torch.manual_seed(0)
    net = build(stem="cifar", num_classes=10) if build is models.resnet18_mod else build(num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.to(dtype).eval()


def images(n=2, side=32, dtype=torch.float32):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n)).to(dtype)


def agrees(found, expected):
    return relative_norm(found, expected) <= NETWORKS[expected.dtype]


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(optimize, "ROUNDS", 2)


@pytest.fixture(scope="module")
def optimized():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize, "ROUNDS", 2)
        model = network()
        return model, optimize_for_inference(model, images(), verbose=False)


def test_it_computes_what_the_model_does_on_any_shape(optimized):
    model, net = optimized
    with torch.no_grad():
        for x in (images(), images(1), images(3, 40), images().to(memory_format=torch.channels_last)):
            assert agrees(net(x), model(x))
            assert not net(x).requires_grad


def test_other_inputs_take_the_network_that_is_not_compiled(optimized):
    _, net = optimized
    taken = []
    twin = copy.copy(net)
    twin._chosen = lambda *arguments: taken.append("chosen")
    twin._fallback = lambda *arguments: taken.append("fallback")
    for x in (
        images(),
        images().to(memory_format=torch.channels_last),
        images(1),
        images(2, 40),
        images().double(),
    ):
        twin(x)
    with torch.autocast("cpu", torch.bfloat16):
        twin(images())
    assert taken == ["chosen"] * 2 + ["fallback"] * 4


def test_the_model_is_left_as_it_is(few_rounds):
    model = network()
    classes = [type(module) for module in model.modules()]
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    optimize_for_inference(model, images(), verbose=False)
    assert [type(module) for module in model.modules()] == classes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
    assert all(module._fused is None for module in model.modules() if isinstance(module, MoDBlock))


class WritesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.net(x.sub_(0.5).div_(0.2))


def test_the_example_is_left_as_it_is(few_rounds):
    model, x = WritesItsInput().eval(), images()
    kept = x.clone()
    net = optimize_for_inference(model, x, verbose=False)
    assert torch.equal(x, kept)
    with torch.no_grad():
        assert agrees(net(x.clone()), model(kept))


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_every_block_is_one_op_in_the_compiled_network(optimized):
    _, net = optimized
    x = images()
    net(x)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        net(x)
    counts = {event.key: event.count for event in recorded.key_averages()}
    assert counts["mod_kernels_cpu::mod_block_"] == 4
    assert not {"aten::batch_norm", "aten::native_batch_norm", "aten::topk", "aten::gather"} & counts.keys()


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_the_compiled_network_holds_its_weights_and_turns_no_map():
    """By TorchInductor's code: its only input is the image, and it has no loop beside an op or an ending.

    ``torch.compile(options={"freezing": True})`` froze nothing (torch 2.14.1), and the maps of a network in NCHW
    were copied into another layout before and after its MoD blocks; the numbers are right in both.
    """
    net = accelerate(network()).to(memory_format=torch.channels_last)
    fold_norms(net)
    x = images().contiguous(memory_format=torch.channels_last)
    _, sources = run_and_get_code(lambda: compiled(net, (x,))(x))
    (code,) = (source for source in sources if "def call" in source)
    code = code[code.index("def call") :]
    assert re.search(r"^ +\w+, = args$", code, re.MULTILINE)
    assert code.count("mkldnn._convolution") and "extern_kernels.convolution" not in code
    loops = set(re.findall(r"cpp_fused_\w+(?=\()", code))
    assert loops and not [name for name in loops if "relu" in name or "mod_block" in name]


def test_choices_are_said_with_both_their_times(few_rounds, capsys):
    net = optimize_for_inference(network(), images())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batch norms folded into convolutions: 12"
    assert [choice.what for choice in net.choices] == ["memory format", "compiled", "compile or not"]
    for choice, line in zip(net.choices, lines[-3:], strict=True):
        assert line == str(choice) and len(choice.milliseconds) == 2
        for name, time in choice.milliseconds.items():
            assert time > 0 and f"{name} {time:.3g} ms" in line
        assert line.endswith(f"-> {choice.chosen}")
    assert set(net.choices[1].milliseconds) == {"fused endings", "plain endings"}


@pytest.mark.parametrize(
    "times,run,fallback",
    [
        ((4, 3, 2, 1), "plain endings", "channels_last"),
        ((4, 3, 1, 2), "fused endings", "channels_last"),
        ((3, 4, 7, 8), "contiguous", "contiguous"),
        ((5, 4, 7, 8), "channels_last", "channels_last"),
    ],
)
def test_the_fastest_is_taken(monkeypatch, times, run, fallback):
    """By a clock that says what it is told."""
    times = dict(zip(("contiguous", "channels_last", "fused endings", "plain endings"), times, strict=True))

    def measure(timed, clock, rounds, budget):
        for one in timed:
            one.samples = [times[one.name] / 1e3]

    def form(name):
        return optimize.Form(lambda x: name, torch.contiguous_format)

    monkeypatch.setattr(optimize, "measure", measure)
    monkeypatch.setattr(
        optimize, "_right_forms", lambda model, forms, inputs, say: {name: form(name) for name in times}
    )
    monkeypatch.setattr(optimize, "_compiled_forms", lambda *arguments: {})
    net = optimize_for_inference(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images(), verbose=False)
    assert (net(images()), net(images(1))) == (run, fallback)


def test_a_wrong_compiled_form_is_left_out_and_named(monkeypatch, few_rounds, capsys):
    real = optimize.compiled

    def wrong(net, example, cuda_graph):
        run = real(net, example, cuda_graph)
        return lambda *arguments: run(*arguments) * 1.01

    monkeypatch.setattr(optimize, "compiled", wrong)
    net = optimize_for_inference(network(), images())
    assert [choice.what for choice in net.choices] == ["memory format"]
    said = capsys.readouterr().out
    assert "fused endings: left out: an output is off by 1.0e-02 of its norm, more than 1e-03" in said


def test_a_form_that_does_not_compile_is_named(monkeypatch, few_rounds, capsys):
    def broken(*arguments):
        raise ValueError("no compiler today\nsecond line")

    monkeypatch.setattr(optimize, "compiled", broken)
    model = network()
    net = optimize_for_inference(model, images())
    assert "plain endings: does not compile: ValueError: no compiler today\n" in capsys.readouterr().out
    with torch.no_grad():
        assert agrees(net(images()), model(images()))


def test_a_wrong_fused_network_is_refused(monkeypatch):
    def spoiled(net):
        with torch.no_grad():
            net.fc.weight.mul_(1.01)

    monkeypatch.setattr(optimize, "accelerate", spoiled)
    with pytest.raises(RuntimeError, match="does not compute what model does: an output is off by"):
        optimize_for_inference(network(), images(), verbose=False)


def test_an_error_on_the_random_input_alone_is_seen(monkeypatch):
    """The example is zeros, where a scaled network computes the same."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)).eval()
    monkeypatch.setattr(optimize, "fold_norms", lambda net: (net[0].weight.data.mul_(2), (0, ""))[1])
    monkeypatch.setattr(optimize, "_like", lambda example: tuple(map(torch.randn_like, example)))
    with pytest.raises(RuntimeError, match="off by"):
        optimize_for_inference(model, torch.zeros(1, 3, 8, 8), verbose=False)


def test_bfloat16(few_rounds):
    model, x = network(torch.bfloat16), images(dtype=torch.bfloat16)
    net = optimize_for_inference(model, x, verbose=False)
    with torch.no_grad():
        assert net(x).dtype == torch.bfloat16
        assert agrees(net(x), model(x))


@pytest.mark.parametrize(
    "build", [torchvision.models.resnet18, models.mobilenet_v2_mod], ids=["dense", "mobilenet"]
)
def test_other_networks(few_rounds, build):
    model, x = network(build=build), images(1, 64)
    net = optimize_for_inference(model, x, verbose=False)
    with torch.no_grad():
        assert agrees(net(x), model(x))


def test_foreign_blocks_are_fused_too(few_rounds):
    model = nn.Sequential(
        nn.Conv2d(3, FOREIGN_CHANNELS, 3), nn.BatchNorm2d(FOREIGN_CHANNELS), LinearsGatherClone()
    )
    model, x = model.eval(), images()
    net = optimize_for_inference(model, x, verbose=False)
    assert isinstance(net.network[2], FusedForeign) and type(model[2]) is LinearsGatherClone
    with torch.no_grad():
        assert agrees(net(x), model(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, x, y):
        return {"maps": self.conv(x), "sums": (self.fc(y), y.sum())}


def test_several_inputs_and_outputs(few_rounds):
    model, inputs = TwoInputs().eval(), (images(), torch.randn(2, 5))
    net = optimize_for_inference(model, inputs, verbose=False)
    with torch.no_grad():
        found, expected = net(*inputs), model(*inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "change,example,error,message",
    [
        (lambda m: m.train(), images(), ValueError, "model must be in eval mode, it is in training mode"),
        (lambda m: m.layer1[0].train() and m, images(), ValueError, "eval mode, layer1.0.bn1 is in training mode"),
        (lambda m: torch.jit.script(nn.Conv2d(3, 4, 3).eval()), images(), TypeError, "model must not be scripted"),
        (
            lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}),
            images(),
            ValueError,
            "model must not be quantized",
        ),
        (lambda m: "resnet", images(), TypeError, "model must be an nn.Module, got str"),
        (lambda m: m, [images()], TypeError, "example_input must be a tensor or a tuple of tensors, got list"),
        (lambda m: m, (), TypeError, "example_input must be a tensor or a tuple of tensors, got tuple"),
    ],
)
def test_what_can_not_be_optimized_is_refused(change, example, error, message):
    with pytest.raises(error, match=message):
        optimize_for_inference(change(network()), example)


def test_the_result_is_for_inference_alone(optimized):
    _, net = optimized
    assert net.eval() is net and not net.training
    for attempt in (net.train, net.half, lambda: net.to("cpu"), lambda: net.load_state_dict({})):
        with pytest.raises(RuntimeError, match="an optimized network can't be"):
            attempt()


# ---- the norms


def test_a_convolution_that_others_read_keeps_its_norm():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.again = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
            self.twice = nn.BatchNorm2d(3)

        def forward(self, x):
            z = self.conv(x)
            return self.bn(z) + z + self.twice(self.again(x)) + self.twice(self.again(z))

    assert fold_norms(Shared().eval()) == (0, "")


def test_a_norm_with_a_hook_stays():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    net[1].register_forward_hook(lambda *arguments: None)
    assert fold_norms(net) == (0, "")


def test_a_norm_in_training_mode_stays():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    net[1].train()
    assert fold_norms(net) == (0, "")


def test_a_network_that_can_not_be_traced_is_named():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    folded, problem = fold_norms(Branching())
    assert folded == 0 and problem.startswith("torch.fx can't trace it: TraceError: ")


def test_mod_blocks_keep_their_norms():
    """They fold them by themselves, and would not know identities."""
    block = MoDBlock(8, NarrowBasicBlock(2), 2).eval()
    assert fold_norms(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), block).eval()) == (1, "")
    assert isinstance(block.conv_block.bn1, nn.BatchNorm2d)

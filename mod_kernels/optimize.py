"""A whole network made ready for inference: every choice is measured on an example, and checked."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from . import _autocast, _checks
from ._compiled import compiled, plain_stages
from ._fold_norms import fold_norms
from ._tolerances import NETWORKS, relative_norm
from .accelerate import NoBlocks, accelerate
from .bench.timing import CpuClock, GpuClock, Timed, measure
from .nn import MoDStage

Arguments = tuple[Tensor, ...]
Say = Callable[[object], object]

# Interleaved rounds that the choices are made on, and the seconds after which five are enough.
ROUNDS, BUDGET_S = 30, 20.0
# What no run may find in training mode: it would draw random numbers, or move statistics that are the user's.
_OTHER_IN_TRAINING = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Choice(NamedTuple):
    """What was chosen between, and the median milliseconds that it was chosen by."""

    what: str
    milliseconds: dict[str, float]

    @property
    def chosen(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.__getitem__)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {one:.3g} ms" for name, one in self.milliseconds.items())
        return f"{self.what}: {times} -> {self.chosen}"


def optimize_for_inference(
    model: nn.Module, example_input: Tensor | Arguments, verbose: bool = True
) -> OptimizedNetwork:
    """What ``model`` computes, as fast as it gets on inputs like ``example_input``.

    Batch norms are folded into convolutions and MoD blocks fused (:func:`mod_kernels.accelerate`). Then, side by
    side on the example and with the threads that torch has now, are timed: the network in NCHW and in
    channels_last; compiled whole by TorchInductor with its weights frozen, the endings before MoD blocks pooling
    for them, or left to the compiler, which can put an ending into a convolution; and on a GPU these in a CUDA
    graph as well. Compiling takes some seconds for each.

    Args:
        model: in eval mode; it is left as it is. One without MoD blocks is optimized all the same.
        example_input: a tensor, or a tuple of all arguments, of the shapes, dtypes and device to come. Inputs of
            other shapes run too, through the fused network uncompiled.
        verbose: print each choice with its times; they are also in the result's ``choices``.

    Returns:
        A module for inference alone: it computes no gradients, and can't be trained, moved, cast or loaded into.

    Raises:
        TypeError: model is not a module or is scripted, or example_input is neither a tensor nor a tuple of them.
        ValueError: model is in training mode or quantized.
        RuntimeError: no form computes what model does, on the example and on a random input like it.
    """
    _check(model, example_input)
    example = (example_input,) if isinstance(example_input, Tensor) else example_input
    network = copy.deepcopy(model)
    with contextlib.suppress(NoBlocks):  # a dense network
        accelerate(network)
    return fastest(network, model, example, print if verbose else lambda line: None)


def fastest(network: nn.Module, model: nn.Module, example: Arguments, say: Say) -> OptimizedNetwork:
    """``network``, which computes what ``model`` does, with its norms folded and in its fastest form.

    ``network`` is used up.
    """
    norms, problem = fold_norms(network)
    say(f"batch norms folded into convolutions: {norms}" + (f" ({problem})" if problem else ""))
    example = _copies(example)  # a network may write into its input
    networks = {name: copy.deepcopy(network).to(memory_format=one) for name, one in FORMATS.items()}
    forms = {name: Form(network, FORMATS[name]) for name, network in networks.items()}
    forms |= _compiled_forms(networks["channels_last"], example, say)
    forms = _right_forms(model, forms, (example, _like(example)), say)
    times = _milliseconds(forms, example)

    choices = [Choice("memory format", _among(times, FORMATS))]
    fallback = choices[0].chosen
    compiled_times = _among(times, (name for name in times if name not in FORMATS))
    if len(compiled_times) > 1:
        choices.append(Choice("compiled", compiled_times))
    if compiled_times:
        fastest = min(compiled_times, key=compiled_times.__getitem__)
        choices.append(Choice("compile or not", _among(times, (fallback, fastest))))
    for choice in choices:
        say(choice)
    return OptimizedNetwork(networks[fallback], forms[fallback], forms[choices[-1].chosen], example, choices)


class OptimizedNetwork(nn.Module):
    """What :func:`optimize_for_inference` returns; ``choices`` says how it runs and why."""

    def __init__(
        self, network: nn.Module, fallback: Form, chosen: Form, example: Arguments, choices: list[Choice]
    ) -> None:
        super().__init__()
        super().train(False)
        self.network, self.choices = network, choices
        self._fallback, self._chosen, self._expected = fallback, chosen, _facts(example)

    def forward(self, *arguments: Tensor) -> Any:
        fits = _facts(arguments) == self._expected and not _under_autocast(arguments)
        return (self._chosen if fits else self._fallback)(*arguments)

    def train(self, mode: bool = True) -> OptimizedNetwork:
        if mode:
            raise RuntimeError("an optimized network can't be trained: train the model, and optimize it again")
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> OptimizedNetwork:
        raise RuntimeError("an optimized network can't be moved or cast: optimize the model where it is to run")

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("an optimized network can't be loaded into: load into the model, and optimize it again")

    def extra_repr(self) -> str:
        return "\n".join(map(str, self.choices))


class Form(NamedTuple):
    """A way to run the network: a function, the format of the maps it takes, whether it reuses its output."""

    run: Callable
    memory_format: torch.memory_format
    reuses_output: bool = False

    def __call__(self, *arguments: Tensor) -> Any:
        with torch.no_grad():
            out = self.run(*self.laid_out(arguments))
            return tree_map_only(Tensor, Tensor.clone, out) if self.reuses_output else out

    def laid_out(self, arguments: Arguments) -> Arguments:
        return tuple(
            one.contiguous(memory_format=self.memory_format if one.ndim == 4 else torch.contiguous_format)
            for one in arguments
        )


def _check(model: nn.Module, example_input: Tensor | Arguments) -> None:
    _checks.ordinary_module(model, "optimize")
    if model.training:
        raise ValueError("model must be in eval mode, it is in training mode: call model.eval() first")
    for name, module in model.named_modules():
        if module.training and isinstance(module, _OTHER_IN_TRAINING):
            raise ValueError(f"model must be in eval mode, {name} is in training mode: call model.eval() first")
    tensors = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(tensors, tuple) or not tensors or not all(isinstance(one, Tensor) for one in tensors):
        raise TypeError(
            f"example_input must be a tensor or a tuple of tensors, got {type(example_input).__name__}"
        )


def _compiled_forms(network: nn.Module, example: Arguments, say: Say) -> dict[str, Form]:
    """In channels_last alone: TorchInductor's own convolutions are, and would turn the maps of another network."""
    example = Form(network, torch.channels_last).laid_out(example)
    on_gpu = example[0].is_cuda
    names = {"fused endings": False, "plain endings": True}
    if not any(type(module) is MoDStage for module in network.modules()):
        names = {"frozen": True}
    forms = {}
    for name, plainly in names.items():
        for cuda_graph in (False, True) if on_gpu else (False,):
            label = f"{name} in a CUDA graph" if cuda_graph else name
            start = time.perf_counter()
            try:
                with plain_stages(network) if plainly else contextlib.nullcontext():
                    run = compiled(network, example, cuda_graph)
                    run(*example)  # what is left of compiling
            except Exception as error:  # whatever export, Inductor or a C++ compiler may raise
                say(f"{label}: does not compile: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            say(f"{label}: compiled in {time.perf_counter() - start:.0f} s")
            forms[label] = Form(run, torch.channels_last, reuses_output=cuda_graph)
    return forms


def _right_forms(
    model: nn.Module, forms: dict[str, Form], inputs: tuple[Arguments, ...], say: Say
) -> dict[str, Form]:
    """Those whose outputs are model's on all inputs; the uncompiled ones must be."""
    with torch.no_grad():
        expected = [model(*_copies(one)) for one in inputs]
    right = {}
    for name, form in forms.items():
        reasons = (_difference(form(*_copies(one)), wanted) for one, wanted in zip(inputs, expected, strict=True))
        reason = next(filter(None, reasons), "")
        if not reason:
            right[name] = form
            continue
        if name in FORMATS:
            raise RuntimeError(f"the fused network ({name}) does not compute what model does: {reason}")
        say(f"{name}: left out: {reason}")
    return right


def _difference(found: Any, expected: Any) -> str:
    """Why two outputs are not the same to rounding; ``""`` if they are."""
    leaves, structure = tree_flatten(found)
    wanted_leaves, wanted_structure = tree_flatten(expected)
    if structure != wanted_structure:
        return f"its output is a {structure}, not a {wanted_structure}"
    for one, wanted in zip(leaves, wanted_leaves, strict=True):
        if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
            continue
        if one.shape != wanted.shape or one.dtype != wanted.dtype:
            return f"an output is {tuple(one.shape)} {one.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
        error = relative_norm(one, wanted)
        if not error <= NETWORKS[wanted.dtype]:
            return f"an output is off by {error:.1e} of its norm, more than {NETWORKS[wanted.dtype]:.0e}"
    return ""


def _copies(arguments: Arguments) -> Arguments:
    return tuple(one.clone() for one in arguments)


def _like(example: Arguments) -> Arguments:
    """Normal values of the example's own mean and spread; what is not floating point stays."""
    generator = torch.Generator().manual_seed(0)

    def drawn(one: Tensor) -> Tensor:
        if not one.is_floating_point():
            return one
        wide = one.double()
        normal = torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.device)
        return (normal * wide.std(correction=0) + wide.mean()).to(one.dtype)

    return tuple(map(drawn, example))


def _milliseconds(forms: dict[str, Form], example: Arguments) -> dict[str, float]:
    """Medians, in the same rounds; each form finds its input laid out."""
    timed = []
    for name, form in forms.items():
        arguments = form.laid_out(example)
        timed.append(Timed(name, lambda form=form, arguments=arguments: form(*arguments)))
    measure(timed, GpuClock(cold=False) if example[0].is_cuda else CpuClock(), ROUNDS, BUDGET_S)
    return {one.name: one.quartiles()[1] for one in timed}


def _among(times: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    return {name: times[name] for name in names}


def _facts(arguments: Arguments) -> list[tuple]:
    return [(one.shape, one.dtype, one.device) for one in arguments]


def _under_autocast(arguments: Arguments) -> bool:
    return any(_autocast.is_on(one.device.type) for one in arguments)

"""Running a copy of a module to see what it does: the order of its layers, and what it computes.

The copy is in float64, on the CPU, in eval mode, and has random weights, so that the answer holds for any: a norm
that starts at zero would make every block agree with every other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import reference
from ._attributes import Names, differ, held
from .foreign import original_class
from .spec import MoDSpec

# |block - reference| over |reference - x|, norms, both in float64: rounding alone leaves 1e-14, and the nearest
# other form known, a LayerNorm with an eps of 1e-5 for 1e-6, differs by 1e-6.
AGREEMENT = 1e-10
# Height, width and seed of each comparison; sizes differ so that one made for a size or a mean over the wrong
# axes can't agree.
_TRIALS = ((7, 5, 1), (4, 6, 2), (5, 5, 3))
# Of so many random samples, those are used whose selection is clear; one in two is not with R = 1 and no bias.
_SAMPLES, _LEAST_SAMPLES, _MOST_SAMPLES = 16, 2, 4
# Between the scores of neighbouring ranks: nearer ones could swap by float64's rounding.
_CLEAR = 1e-11
_SELECTING = ("topk", "sort", "argsort", "kthvalue", "select_channels", "select_channels_saving")


class NotRun(Exception):
    """A module that could not be copied or run; says why."""


class Seen(NamedTuple):
    """What one run of a module showed."""

    order: list[str]  # layers with weights: as they ran, then those whose call was not seen
    selects: bool
    unsorted: bool


class Probe:
    """A copy of ``module`` to experiment on.

    Raises:
        NotRun: from here and from every method.
    """

    def __init__(self, module: nn.Module) -> None:
        with _one_thread(), _failing("it can't be copied in float64 on the CPU"):
            twin = copy.deepcopy(module)
            twin.__class__ = original_class(module)
            self._twin = twin.to("cpu", torch.float64).eval().requires_grad_(False)
        for part in self._twin.modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks):
                hooks.clear()
        self._before = held(self._twin)

    def written(self) -> Names:
        """The attributes, and buffers that are not floating-point, that running it has written until now."""
        now = held(self._twin)
        return frozenset(
            key for key, one in now.items() if key not in self._before or differ(one, self._before[key])
        )

    def watch(self, channels: int) -> Seen:
        """Run it once on ``channels`` channels."""
        order: list[str] = []
        layers = {name: part for name, part in self._twin.named_modules() if _has_weights(part)}
        handles = [
            part.register_forward_pre_hook(lambda *_, name=name: order.append(name))
            for name, part in layers.items()
        ]
        height, width, seed = _TRIALS[0]
        generator, spy = _generator(seed), _Spy()
        try:
            with spy, _one_thread():
                self._run(_maps(_means(channels, generator)[:_MOST_SAMPLES], height, width, generator))
        finally:
            for handle in handles:
                handle.remove()
        order += [name for name in layers if name not in order]
        return Seen(order, spy.selects, spy.unsorted)

    def differences(self, forms: list[Callable[[nn.Module], MoDSpec]]) -> list[float]:
        """How far what each form (from the module to a spec) says is from what the module computes, at worst."""
        worst = [0.0] * len(forms)
        for height, width, seed in _TRIALS:
            alive = [i for i, difference in enumerate(worst) if difference <= AGREEMENT]
            if not alive:
                break
            generator = _generator(seed)
            with _one_thread():
                _randomise(self._twin, generator)
                specs = [forms[i](self._twin) for i in alive]
                x = _clear_maps(specs[0], height, width, generator)
                y = self._run(x)
                for i, spec in zip(alive, specs, strict=True):
                    worst[i] = max(worst[i], _difference(y, reference.mod_block(x, spec), x))
        return worst

    def _run(self, x: Tensor) -> Tensor:
        # fork_rng: a module that draws random numbers must not disturb the caller's.
        quiet = torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False)
        with quiet[0], quiet[1], quiet[2], torch.random.fork_rng(devices=()), _failing("its forward did not run"):
            y = self._twin.forward(x.clone())
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise NotRun(f"its forward does not keep shape and dtype: {tuple(x.shape)} of {x.dtype} became {got}")
        return y


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turns any error inside into a NotRun that tells it: foreign code may raise whatever it likes."""
    try:
        yield
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise NotRun(f"{what}: {type(error).__name__}: {text}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """For tensors this small a second thread makes the first one wait: a hundred times as long on a busy CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Spy(TorchFunctionMode):
    """Notes whether something chooses among values, and whether in an order that is not promised."""

    # Not a dispatch mode: that imports all of torch._dynamo, which takes a second or two.

    def __init__(self) -> None:
        super().__init__()
        self.selects = self.unsorted = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").partition(".")[0]
        if name in _SELECTING:
            self.selects = True
        if name == "topk" and not (args[4] if len(args) > 4 else kwargs.get("sorted", True)):
            self.unsorted = True
        return function(*args, **kwargs)


def _has_weights(part: nn.Module) -> bool:
    """A layer: no submodules, and tensors of its own."""
    own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    return not part._modules and bool(own)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _maps(means: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random (N, C, H, W) whose planes have these means (N, C)."""
    noise = torch.randn((*means.shape, height, width), generator=generator, dtype=torch.float64, device="cpu")
    return means[:, :, None, None] + (noise - noise.mean((2, 3), keepdim=True))


def _means(channels: int, generator: torch.Generator) -> Tensor:
    """Of the order of one, so that selections differ: (N, C)."""
    return torch.randn((_SAMPLES, channels), generator=generator, dtype=torch.float64, device="cpu")


def _clear_maps(spec: MoDSpec, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Some random maps on which the scores of all ranks lie apart."""
    means = _means(spec.channels, generator)
    selector = spec.fc1_weight, spec.fc2_weight, spec.fc1_bias, spec.fc2_bias
    scores = torch.sigmoid(reference.selector_logits(means, *selector, pooled=means))
    ranked = torch.topk(scores, min(spec.k + 1, spec.channels), dim=1).values
    clear = (ranked[:, :-1] - ranked[:, 1:] > _CLEAR).all(1)
    if clear.sum() < _LEAST_SAMPLES:
        raise NotRun("on random inputs its selector gives equal scores to several channels")
    return _maps(means[clear][:_MOST_SAMPLES], height, width, generator)


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Give every tensor of ``module`` random values, of a size that brings every activation into play."""
    for part in module.modules():
        norm = not part._modules and (isinstance(part, nn.LayerNorm) or hasattr(part, "running_mean"))
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if not tensor.is_floating_point():
                continue
            if name == "running_var":
                low, high = 0.5, 2.0
            elif norm and name == "weight":
                low, high = 2.0, 6.0  # values beyond 6, where ReLU and ReLU6 part
            else:
                high = (6 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 1.5
                low = -high
            tensor.uniform_(low, high, generator=generator)


def _difference(y: Tensor, expected: Tensor, x: Tensor) -> float:
    branch = torch.linalg.vector_norm(expected - x)
    difference = float(torch.linalg.vector_norm(y - expected) / branch)
    return difference if difference == difference else float("inf")

"""Whole networks: plain, fused, and with their MoD blocks left out, in turn on one input.

On a GPU each as it is and inside a CUDA graph: without one, at small batches, the time is Python's.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import plain
from .._tolerances import NETWORKS as NETWORKS_AGREE
from .._tolerances import relative_norm
from ..accelerate import accelerate
from ..backends import use_backend
from ..nn import MoDBlock
from .cells import OnCell, run_cells
from .providers import graphed, same_arithmetic
from .store import Results, Row
from .timing import CpuClock, GpuClock, Timed, measure, on_round_of

NETWORKS = ("resnet18_mod", "resnet50_mod", "resnet75_mod")
PLAIN_FORMS = ("plain", "plain-inplace", "plain-cat")


@dataclass(frozen=True)
class Cell:
    """A network, a batch, and how it is run."""

    name: str
    batch: int
    threads: int | None
    mode: str = "eager"

    def __str__(self) -> str:
        return f"{self.name} N={self.batch} " + (f"{self.threads} thread(s)" if self.threads else self.mode)


def ways_to_run(threads: tuple[int, ...], device: str) -> list[tuple[int | None, str]]:
    """Threads and mode: on a GPU as it is and inside a CUDA graph."""
    return [(count, "eager") for count in threads] if device == "cpu" else [(None, "eager"), (None, "graph")]


def run(
    names: tuple[str, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    results: Results,
    on_cell: OnCell,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int = 224,
    rounds: int = 70,
) -> None:
    """Measure networks into ``results``, cell by cell.

    Raises:
        ValueError: a name that :func:`mod_kernels.models.list_models` does not have.
    """
    ways = ways_to_run(threads, device)
    planned = [Cell(name, batch, *how) for how in ways for name in names for batch in batches]

    def measured(cell: Cell) -> list[Row]:
        return run_cell(cell.name, cell.batch, cell.threads, cell.mode, device, dtype, size, rounds)

    run_cells(planned, results, on_cell, measured)


def run_cell(
    name: str,
    batch: int,
    threads: int | None,
    mode: str,
    device: str,
    dtype: torch.dtype,
    size: int,
    rounds: int,
    **options: Any,
) -> list[Row]:
    """One network at one batch size: every provider's output against the reference's, then the times.

    ``options`` are the builder's own (``c=8``).
    """
    providers = build(name, device, dtype, **options)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn((batch, 3, size, size), generator=generator).to(device, dtype)
    clock = CpuClock() if device == "cpu" else GpuClock(cold=False)
    checks = {}
    with torch.inference_mode(), same_arithmetic():
        with use_backend("reference"):
            expected = providers["fused"](image)
        for provider, model in providers.items():
            checks[provider] = "none" if provider == "identity" else compare(model(image), expected, dtype)
    with torch.inference_mode(), same_arithmetic():
        timed = [
            Timed(provider, graphed(model, image) if mode == "graph" else partial(model, image))
            for provider, model in providers.items()
            if not checks[provider].startswith("wrong")
        ]
        on_round = on_round_of(device)
        measure(timed, clock, rounds, budget_s=240.0, on_round=on_round)
    by_name = {one.name: one for one in timed}
    rows = []
    for provider, check in checks.items():
        times = times_of(provider, by_name)
        text = str(dtype).removeprefix("torch.")
        rows.append(Row(name, "network", batch, threads, device, text, mode, "warm", provider, check, **times))
    return rows


def times_of(provider: str, timed: dict[str, Timed]) -> dict[str, Any]:
    """What a row says of a provider's time beside those of its cell, the identity's too; {} where it has none."""
    if provider not in timed:
        return {}
    one = timed[provider]
    low, median, high = one.quartiles()
    times = {"median_ms": median, "q1_ms": low, "q3_ms": high}
    times |= {"samples": len(one.samples), "repeats": one.repeats, "warning": one.warning()}
    times["over_identity_ms"] = median_difference_ms(one, timed["identity"])
    if provider == "fused":
        times["share"] = share_of_plain(timed)
    return times


def median_difference_ms(one: Timed, other: Timed) -> float:
    """Round by round, so that what slows a whole round down cancels."""
    pairs = zip(one.samples, other.samples, strict=True)
    return statistics.median(first - second for first, second in pairs) * 1e3


def share_of_plain(
    timed: dict[str, Timed],
    fused: str = "fused",
    plain: Iterable[str] = PLAIN_FORMS,
    identity: str = "identity",
) -> tuple[float, float, float] | None:
    """What the fused blocks cost as a share of the fastest plain form's: :func:`ratio_of_medians` of each round's
    time less its own identity's.

    None where one of the three was not timed, or plain cost no more than the identity.
    """
    samples = {name: torch.tensor(one.samples, dtype=torch.float64) for name, one in timed.items()}
    plain = [name for name in plain if name in samples]
    if not plain or fused not in samples or identity not in samples:
        return None
    ours, *others = (samples[name] - samples[identity] for name in (fused, *plain))
    best = min(others, key=lambda difference: difference.median())
    if best.median() <= 0:
        return None
    return ratio_of_medians(ours, best)


def ratio_of_medians(above: Tensor, below: Tensor, resamples: int = 2000) -> tuple[float, float, float]:
    """Of two providers' values (rounds,); then the ends of its 95% interval, by bootstrap over the rounds."""
    drawn = torch.randint(len(above), (resamples, len(above)), generator=torch.Generator().manual_seed(0))
    ratios = above[drawn].median(1).values / below[drawn].median(1).values
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(above.median() / below.median()), low, high


def compare(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """A provider's ``check``: ``"ok"`` or what is wrong."""
    error = relative_norm(actual, expected)
    return "ok" if error <= NETWORKS_AGREE[dtype] else f"wrong: output off by {error:.1e} from the reference's"


def build(
    name: str, device: str, dtype: torch.dtype, training: bool = False, **options: Any
) -> dict[str, nn.Module]:
    """The same network, same weights, each way; BN of the standard blocks is left as it is in all of them.

    For inference fused is :func:`mod_kernels.accelerate`; in training it is the network as it comes. ``options``
    are the builder's own.
    """
    from .. import models  # torchvision takes a second to import

    if name not in models.list_models():
        raise ValueError(f"network must be one of {', '.join(models.list_models())}, got {name!r}")
    torch.manual_seed(0)
    base = getattr(models, name)(**options).eval()
    randomise_norms(base)
    spread_logits(base)
    base = base.train(training).to(device, dtype).requires_grad_(training)

    def twin() -> nn.Module:
        # On the very same tensors: what is compared is small beside the standard blocks, whose time may depend on
        # where their weights lie.
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        return copy.deepcopy(base, shared)

    # Writing in place can't train: it overwrites what the ReLU before keeps for its backward.
    endings = {"plain": "clone", "plain-cat": "cat"} | ({} if training else {"plain-inplace": "inplace"})
    return {
        **{name: with_blocks(twin(), partial(_make_plain, ending=ending)) for name, ending in endings.items()},
        "identity": with_blocks(twin(), lambda block: nn.Identity()),
        "fused": base if training else accelerate(base),
    }


def with_blocks(model: nn.Module, replace: Callable[[MoDBlock], nn.Module]) -> nn.Module:
    """``model`` with every MoD block replaced by ``replace(block)``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MoDBlock):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, replace(module))
    return model


class PlainBlock(nn.Module):
    """A MoD block's parts run as :func:`mod_kernels.plain.mod_block`, as people write the forward.

    In training the narrowed conv blocks of this package would run on an engine: here they run as PyTorch's own.
    """

    def __init__(self, block: MoDBlock, ending: str) -> None:
        super().__init__()
        self.selector, self.conv_block = block.selector, block.conv_block
        self.k, self.position, self.ending = block.k, block.position, ending

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.selector.fc1, self.selector.fc2
        biases, how = (fc1.bias, fc2.bias), (None, self.position, self.ending)
        with use_backend("reference") if self.training else nullcontext():
            return plain.mod_block(x, fc1.weight, fc2.weight, self.k, self.conv_block, *biases, *how)


def _make_plain(block: MoDBlock, ending: str) -> PlainBlock:
    return PlainBlock(block, ending)


def randomise_norms(model: nn.Module) -> None:
    """Norms as of a trained network, with running statistics other than 0 and 1: a wrong fold then shows.

    The last norm of each standard block is small: activations that double from block to block, as with fresh
    weights, drive the plain form's sigmoids to 1.0, where ``torch.topk`` sees ties and selects by chance.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.constant_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight, 0.2)


@torch.no_grad()
def spread_logits(model: nn.Module) -> None:
    """Selectors as of a trained network: alive, and of logits that lie apart, from -3 to 3.

    Fresh ones without biases may have a hidden layer of zeros, and among 1024 logits of theirs some come so near
    each other that two right ways to run the network rank them differently.
    """

    def spread(block: MoDBlock, arguments: tuple[Tensor]) -> None:
        pooled, selector = arguments[0].mean((0, 2, 3)), block.selector
        # The first hidden unit is near 1 for all with about these means; the rest moves logits less than a gap.
        selector.fc1.weight[0] = pooled / pooled.square().sum()
        selector.fc2.weight *= 1e-3
        selector.fc2.weight[:, 0] = torch.linspace(-3.0, 3.0, block.channels)[torch.randperm(block.channels)]

    blocks = [module for module in model.modules() if isinstance(module, MoDBlock)]
    handles = [block.register_forward_pre_hook(spread) for block in blocks]
    model(torch.randn(2, 3, 64, 64))
    for handle in handles:
        handle.remove()

"""The paper's table on this machine: every MoD network and its dense peer, in turn on one input.

The dense network and the MoD network's plain forms, accelerated and with its MoD blocks left out, run eagerly (on
a GPU also inside a CUDA graph); both networks again through :func:`mod_kernels.optimize_for_inference`.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import use_backend
from . import networks, paper
from .cells import OnCell, run_cells
from .providers import ENGINES, graphed, same_arithmetic
from .store import PAPER, Results, Row
from .timing import CpuClock, GpuClock, Timed, measure, on_round_of

DENSE, DENSE_OPTIMIZED, OPTIMIZED = "dense", "dense-optimized", "optimized"
# The plain MoD network and the one without MoD blocks, with all that optimize_for_inference does but fusing. Of
# the plain forms it is plain-cat, which writes nothing in place: the others don't compile with frozen weights
# (torch 2.14: "FakeTensorUpdater cannot recompute metadata").
PLAIN_OPTIMIZED, IDENTITY_OPTIMIZED = "plain-optimized", "identity-optimized"
_OPTIMIZED = (OPTIMIZED, PLAIN_OPTIMIZED, IDENTITY_OPTIMIZED)
ROUNDS, CELL_S = 100, 240.0
# A right run may be off by this share of what the MoD blocks add to the output: where that is little, as in
# MobileNetV2 (2e-3 of it), a network without one of its blocks would pass for right. Right ones are at 1e-3.
_OF_CONTRIBUTION = 0.05


def run(
    names: tuple[str, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    results: Results,
    on_cell: OnCell,
    device: str = "cpu",
    peers: bool = False,
    rounds: int = ROUNDS,
) -> None:
    """Measure networks of :data:`mod_kernels.bench.paper.MOD`, cell by cell, into ``results``.

    ``peers`` adds other runtimes (CPU only).
    """
    ways = networks.ways_to_run(threads, device)
    planned = [networks.Cell(name, batch, *how) for how in ways for batch in batches for name in names]
    dense = None

    def measured(cell: networks.Cell) -> list[Row]:
        nonlocal dense
        how = (cell.name, cell.batch, cell.threads, cell.mode)
        # Networks that share a dense peer follow each other: it is optimized once for all of them.
        if dense is None or dense.key != _dense_key(*how):
            dense = _dense(*how, device)
        return run_cell(cell.name, dense, device, peers, rounds, results)

    run_cells(planned, results, on_cell, measured)


@dataclass
class Ways:
    """The ways to run a network that were checked, and what the checks said."""

    calls: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)  # what optimize_for_inference printed

    def add(
        self,
        provider: str,
        make: Callable[[], Callable[[], Tensor]],
        judge: Callable[[Tensor], str] = lambda output: "none",
        may_lack: tuple[type[Exception], ...] = (),
    ) -> None:
        """What ``make()`` makes, unless its output is wrong; ``may_lack``: what it raises where it can't run."""
        try:
            call = make()
            with torch.inference_mode():
                self.checks[provider] = judge(call())
        except may_lack as reason:
            # The first line, without the file that an ImportError names: results are for others to read.
            said = str(reason).partition("\n")[0].partition(" (/")[0]
            self.checks[provider] = f"left out: {said}"
            return
        if not self.checks[provider].startswith("wrong"):
            self.calls[provider] = call

    def add_optimized(
        self,
        provider: str,
        network: nn.Module,
        image: Tensor,
        judge: Callable[[Tensor], str] = lambda output: "none",
        fuse: bool = True,
    ) -> None:
        """``network`` through optimize_for_inference; unless ``fuse``, with its MoD blocks as they are."""

        def make() -> Callable[[], Tensor]:
            from ..optimize import fastest, optimize_for_inference

            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if fuse:
                    model = optimize_for_inference(network, image)
                else:
                    model = fastest(copy.deepcopy(network), network, (image,), print)
            self.said[provider] = printed.getvalue().splitlines()
            return partial(model, image)

        self.add(provider, make, judge, (ImportError, RuntimeError))


@dataclass
class Dense:
    """The dense peer's side of a cell, and what the other side runs on too."""

    key: tuple
    batch: int
    threads: int | None
    mode: str
    image: Tensor
    network: nn.Module
    ways: Ways


def _dense_key(name: str, *how: Any) -> tuple:
    from ..models import PEERS

    return PEERS[name][0], paper.data_of(name), *how


def _dense(name: str, batch: int, threads: int | None, mode: str, device: str) -> Dense:
    from .. import models

    data = paper.data_of(name)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn((batch, 3, data.size, data.size), generator=generator).to(device)

    def build() -> nn.Module:
        torch.manual_seed(0)
        network = models.dense_peer(name, **data.options).eval()
        networks.randomise_norms(network)
        return network.to(device).requires_grad_(False)

    network, ways = build(), Ways()
    with same_arithmetic():
        with torch.inference_mode():
            expected = network(image)
        ways.add(DENSE, partial(_call, network, image, mode))
        judge = partial(networks.compare, expected=expected, dtype=image.dtype)
        ways.add_optimized(DENSE_OPTIMIZED, build(), image, judge)
    return Dense(_dense_key(name, batch, threads, mode), batch, threads, mode, image, network, ways)


def run_cell(name: str, dense: Dense, device: str, peers: bool, rounds: int, results: Results) -> list[Row]:
    """One network and its dense peer: every output checked, then the times."""
    image, mode = dense.image, dense.mode
    built = networks.build(name, device, image.dtype, **paper.data_of(name).options)
    _describe(name, built["plain-cat"], dense.network, image[:1], results)
    with same_arithmetic():
        ways = _mod_ways(name, built, image, mode, device, dense.threads if peers else None)
        calls = dense.ways.calls | ways.calls
        timed = {provider: Timed(provider, call) for provider, call in calls.items()}
        clock = CpuClock() if device == "cpu" else GpuClock(cold=False)
        on_round = on_round_of(device)
        measure(list(timed.values()), clock, rounds, CELL_S, on_round)
    cell = f"N={dense.batch} {dense.threads or mode}"
    results.networks[name].setdefault("choices", {})[cell] = dense.ways.said | ways.said
    row = partial(Row, name, PAPER, dense.batch, dense.threads, device, "float32", mode, "warm")
    return [
        row(provider, check, speedup=_speedup(provider, timed), **_times(provider, timed))
        for provider, check in (dense.ways.checks | ways.checks).items()
    ]


def _times(provider: str, timed: dict[str, Timed]) -> dict[str, Any]:
    found = networks.times_of(provider, timed)
    if provider == OPTIMIZED:
        found["share"] = networks.share_of_plain(timed, OPTIMIZED, (PLAIN_OPTIMIZED,), IDENTITY_OPTIMIZED)
    return found


def _mod_ways(
    name: str, built: dict[str, nn.Module], image: Tensor, mode: str, device: str, peer_threads: int | None
) -> Ways:
    with torch.inference_mode():
        with use_backend("reference"):
            expected = built["fused"](image)
        contribution = expected - built["identity"](image)
    judge = partial(_judge, expected=expected, contribution=contribution)
    ways = Ways()
    ways.add("identity", partial(_call, built["identity"], image, mode))
    for form in networks.PLAIN_FORMS:
        ways.add(form, partial(_call, built[form], image, mode), judge)
    with use_backend(ENGINES[device]):  # never another's time for ours
        ways.add("fused", partial(_call, built["fused"], image, mode), judge, (RuntimeError,))
    ways.add_optimized(OPTIMIZED, _unaccelerated(name, built["fused"]), image, judge)
    ways.add_optimized(PLAIN_OPTIMIZED, built["plain-cat"], image, judge, fuse=False)
    ways.add_optimized(IDENTITY_OPTIMIZED, built["identity"], image)
    if peer_threads is not None:
        from .peers import PEERS, to_onnx

        exported: list[bytes] = []

        def peer(make: Callable[..., Callable[[], Tensor]]) -> Callable[[], Tensor]:
            if not exported:
                exported.append(to_onnx(built["plain-cat"], image))
            return make(exported[0], image, peer_threads)

        for runtime, make in PEERS.items():
            ways.add(runtime, partial(peer, make), judge, (ImportError, RuntimeError))
    return ways


def _unaccelerated(name: str, network: nn.Module) -> nn.Module:
    """The same network with the same values in tensors of its own: optimizing one must not change the others."""
    from .. import models

    fresh = getattr(models, name)(**paper.data_of(name).options).eval()
    fresh.load_state_dict(network.state_dict())
    return fresh.to(next(network.parameters()).device).requires_grad_(False)


def _call(network: nn.Module, image: Tensor, mode: str) -> Callable[[], Tensor]:
    if mode == "graph":
        with torch.inference_mode():
            return graphed(network, image)
    return partial(network, image)


def _judge(actual: Tensor, expected: Tensor, contribution: Tensor) -> str:
    said = networks.compare(actual, expected, expected.dtype)
    if said != "ok":
        return said
    off = float((actual - expected).double().norm() / contribution.double().norm())
    return "ok" if off <= _OF_CONTRIBUTION else f"wrong: output off by {off:.0%} of what the MoD blocks add to it"


def _speedup(provider: str, timed: dict[str, Timed]) -> tuple[float, float, float] | None:
    """Over the dense peer run alike; None for itself, for other runtimes, which do not run it, or untimed."""
    ours = (*networks.PLAIN_FORMS, "fused", "identity")
    dense = DENSE if provider in ours else DENSE_OPTIMIZED if provider in _OPTIMIZED else None
    if provider not in timed or dense not in timed:
        return None
    above, below = (torch.tensor(timed[one].samples, dtype=torch.float64) for one in (dense, provider))
    return networks.ratio_of_medians(above, below)


def _describe(name: str, plain: nn.Module, dense: nn.Module, image: Tensor, results: Results) -> None:
    """What ``results.networks`` has of a network and of its dense peer."""
    from ..models import PEERS

    peer, data = PEERS[name][0], paper.data_of(name)
    for one, network, printed in ((name, plain, paper.MOD[name]), (peer, dense, paper.DENSE[peer])):
        if one not in results.networks:
            results.networks[one] = {"data": data.name, "paper": asdict(printed), **counts(network, image)}
    results.networks[name]["dense"] = peer


def counts(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Parameters, and the multiply-adds of matrix products and convolutions for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    parameters = sum(one.numel() for one in network.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}

"""What is measured against what: every way of running the same block on the same x with the same folded weights.

The plain forms run :mod:`mod_kernels.plain` around ``F.conv2d`` with their norms folded, the strongest plain form
there is; the calls are those of :func:`mod_kernels.plain.mod_block`, written out so that a provider
also returns what it selected: that is what it is checked with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cudnn

from .. import backends, functional, plain, reference
from .._library import accumulation_dtype
from ..spec import CONV_KINDS, LAYER_NORM_EPS, MoDSpec

PLAIN = ("plain-clone", "plain-cat", "plain-inplace")
COMPILE, MAX_AUTOTUNE = "compile", "compile-max-autotune"
# torch.compile's modes. "max-autotune" itself would run in CUDA graphs of its own, which copy x at each call and
# can't be captured in another graph; so the tuned kernels are timed bare and in our graphs, like all others.
COMPILED = {COMPILE: "default", MAX_AUTOTUNE: "max-autotune-no-cudagraphs"}
# The engine of ours that is measured on a device, what is added to its name, and engines of ours that a block is
# measured on beside it.
ENGINES = {"cpu": "cpu", "cuda": "triton"}
BESIDE = {"cpu": (), "cuda": ("cuda",)}
IN_PLACE, FED = "-inplace", "-inplace-fed"


class Unavailable(Exception):
    """A provider can't run here; the message says why."""


@dataclass
class Provider:
    """A way to run the block. ``run(x)`` is timed; ``checked(x)`` returns (y, scores, index), of the same code."""

    name: str
    run: Callable[[Tensor], object]
    checked: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    in_place: bool = False
    compile_s: float | None = None  # of the first call, where that compiles
    backend: str | None = None  # what run must be called under


def conv_block(x: Tensor, spec: MoDSpec) -> Tensor:
    """The narrowed conv block as plain calls in x's dtype: cuDNN's and oneDNN's own convolutions."""
    following = (*CONV_KINDS[spec.kind].between, "relu" if spec.final_relu else "nothing")
    for weight, bias, then in zip(spec.conv_weights, spec.conv_biases, following, strict=True):
        groups = x.shape[1] // weight.shape[1]
        x = _FOLLOWING[then](F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups))
    return x


def _layer_norm(x: Tensor) -> Tensor:
    """Over the channels where they lie: permuted for ``F.layer_norm`` and linear layers, as a whole ConvNeXt is
    written, a block of few channels takes up to twice as long."""
    centred = x - x.mean(1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + LAYER_NORM_EPS)


_FOLLOWING = {"relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "layer_norm": _layer_norm, "nothing": lambda x: x}


def plain_provider(ending: str, spec: MoDSpec) -> Provider:
    """``ending``: "clone", "cat" or "inplace"."""

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, index = plain.select_channels(
            x, spec.fc1_weight, spec.fc2_weight, spec.k, spec.fc1_bias, spec.fc2_bias
        )
        z = conv_block(plain.gather_channels(x, index), spec)
        return plain.fuse_channels(x, z, scores, index, spec.position, ending), scores, index

    return Provider(f"plain-{ending}", run, run, ending == "inplace")


def compiled_provider(best: Provider, threads: int, name: str = COMPILE) -> Provider:
    """torch.compile of a plain form; ``name`` is a key of COMPILED.

    Inductor's C++ is made for a number of threads: one build for each.
    """
    from torch._inductor import list_mode_options

    options = list_mode_options(COMPILED[name])  # a mode and options at once are refused
    if threads:
        options = options | {"cpp.threads": threads}
    run = torch.compile(best.run, fullgraph=True, dynamic=False, options=options)
    return Provider(name, run, run)


@functools.cache
def start_compiler(device: str) -> None:
    """Have torch.compile load and start what it needs once in a process: not a block's to answer for."""
    torch.compile(lambda x: x + 1)(torch.zeros(64, device=device))


def engine_provider(backend: str, spec: MoDSpec, in_place: bool, x: Tensor, fed: bool = False) -> Provider:
    """One of ours, called through the public op, Python and checks included; time it under ``use_backend``.

    ``fed``: given the means of x, worked out here, as ``add_relu_pool`` leaves them before it.

    Raises:
        Unavailable: the backend does not serve this block; never falls back to another.
    """
    op = functional.mod_block_ if in_place else functional.mod_block
    pooled = x.mean((2, 3), dtype=accumulation_dtype(x.dtype)) if fed else None
    with backends.use_backend(backend):
        explanation = functional.explain(op, x, spec, pooled)
    if explanation.backend != backend:
        raise Unavailable(explanation.reasons.get(backend, "not served"))

    def run(x: Tensor) -> Tensor:
        return op(x, spec, pooled)

    def checked(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The public op's own output; the selection is that of the logits of the raw op behind it, run on a copy,
        # where it must give the same bits.
        with backends.use_backend(backend):
            engine = backends.choose(functional._CALLS[op.__name__](x, spec, pooled))
            arguments = (*spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)
            again = x.clone()
            outputs = engine.ops[op.__name__](again, *arguments)
            again, logits = (again, outputs) if in_place else outputs
            y = op(x, spec, pooled)
        if not torch.equal(y, again):
            raise RuntimeError("two runs on the same input differ")
        index = reference.rank_channels(logits, spec.k)
        return y, torch.sigmoid(logits.gather(1, index)), index

    name = backend + (FED if fed else IN_PLACE if in_place else "")
    return Provider(name, run, checked, in_place, backend=backend)


def same_arithmetic() -> AbstractContextManager:
    """On a GPU, plain float32 convolutions in float32 like ours (tf32 is cuDNN's default), each at its best."""
    return cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)


def floor(spec: MoDSpec) -> Callable[[Tensor], Tensor]:
    """What reading x once and the selector's two layers cost, as calls of PyTorch's."""

    def run(x: Tensor) -> Tensor:
        return F.linear(F.linear(x.mean((2, 3)), spec.fc1_weight), spec.fc2_weight)

    return run


def graphed(run: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    """``run(x)`` as a CUDA graph; replaying reads and writes x's memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run(x)

    def replay() -> object:
        graph.replay()
        return kept

    return replay

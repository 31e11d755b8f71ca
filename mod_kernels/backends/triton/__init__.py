"""The Triton engine: the ops of ``mod_kernels_triton`` and what this engine can serve.

Importing it imports no Triton and touches no GPU; the kernels are loaded when the first op runs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from ... import _layout, _library
from .._engine import Call, Engine, Support
from .._workspace import with_counters
from . import in_force

NAMESPACE = "mod_kernels_triton"
_BACKWARD = ("fuse_channels_backward", "select_channels_backward", "input_gradient")
_OPS = (
    "select_channels",
    "select_channels_saving",
    "gather_channels",
    "fuse_channels",
    "fuse_channels_",
    "add_relu_pool",
    "add_relu_pool_",
    "tail_",
    "mod_block",
    "mod_block_",
    "add_relu_mod_block_",
    *_BACKWARD,
)

# Of these the last program of a sample to arrive goes on, which takes a counter of each sample.
_COUNTING = ("mod_block", "mod_block_", "add_relu_mod_block_")
_RANKING = ("select_channels", "select_channels_saving", *_COUNTING)

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Ops that move values and add them once: these serve float64 and channels_last too.
_PLANE_OPS = (
    "gather_channels",
    "fuse_channels",
    "fuse_channels_",
    "add_relu_pool",
    "add_relu_pool_",
    "fuse_channels_backward",
    "input_gradient",
)
# One program ranks a sample's channels: 4096 int64 keys are 64 registers a thread at 256 threads.
MAX_CHANNELS = 4096
# Those whose convolutions tail.py has.
KINDS = ("bottleneck", "basic", "inverted_residual", "conv", "convnext")
# A program of the tail holds all k channels of at least 16 pixels: 256 x 16 float32 values are a full tile.
MAX_TAIL_CHANNELS = 256

_library_object = _library.define(NAMESPACE, list(_OPS), _COUNTING)


@functools.cache
def _launcher(name: str) -> Callable:
    """The op's host function; the first call imports Triton."""
    from . import launch, launch_backward

    return getattr(launch_backward if name in _BACKWARD else launch, name)


def _register(name: str) -> None:
    def implementation(*arguments):
        return _launcher(name)(*arguments)

    for device in ("CPU", "CUDA"):
        _library_object.impl(name, implementation, device)


for _name in _OPS:
    _register(_name)


def _callables() -> dict[str, Callable]:
    ops = {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in _OPS}
    return ops | {name: with_counters(ops[name]) for name in _COUNTING}


@functools.cache
def _triton_problem() -> str:
    """Why Triton can't be used at all, or ""."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"Triton {triton.__version__} is installed, 3.6 or newer is needed"
    return ""


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def compiler_problem() -> str:
    """Why kernels can't be compiled ahead of time, or "". No GPU is needed for it."""
    if _interpreting():
        return "TRITON_INTERPRET=1 is set: kernels are Python functions then, and nothing is compiled"
    return _triton_problem()


def gpu_problem() -> str:
    """Why kernels can't be timed here, or ""."""
    problem = compiler_problem()
    if problem:
        return problem
    return _device_problem("cuda") if torch.cuda.is_available() else "no CUDA device is available here"


def _device_problem(device: str) -> str:
    if device == "cpu":
        return "" if _interpreting() else "Triton runs on CPU tensors only under TRITON_INTERPRET=1"
    if device != "cuda":
        return f"the Triton kernels run on cuda, not on {device}"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs; this torch is built for ROCm"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return f"a GPU of compute capability 8.0 or newer is needed, this one has {'.'.join(map(str, capability))}"
    return ""


def _call_problem(call: Call) -> str:
    if call.op not in _OPS:
        return f"{call.op} has no Triton kernel in this version"
    planes = call.op in _PLANE_OPS
    if call.dtype not in DTYPES and not (planes and call.dtype == torch.float64):
        served = "float64, float32" if planes else "float32"
        dtype = str(call.dtype).removeprefix("torch.")
        return f"{call.op} takes {served}, float16 and bfloat16 in Triton, not {dtype}"
    if call.weight_dtype is not None and call.weight_dtype not in DTYPES:
        name = str(call.weight_dtype).removeprefix("torch.")
        return f"the Triton kernels take float32, float16 and bfloat16 weights, not {name}"
    if call.layout not in (_layout.NCHW, _layout.CHANNELS_LAST):
        return f"the Triton kernels read NCHW and channels_last, not {call.layout}"
    if call.op in _RANKING and call.channels > MAX_CHANNELS:
        return f"the selector kernel ranks up to {MAX_CHANNELS} channels, got C={call.channels}"
    if call.kind is not None and call.kind not in KINDS:
        return f"there is no Triton kernel for conv blocks of kind {call.kind!r}"
    if call.op in ("tail_", *_COUNTING) and call.k > MAX_TAIL_CHANNELS:
        return f"the tail kernel convolves up to {MAX_TAIL_CHANNELS} channels, got k={call.k}"
    return ""


class TritonEngine(Engine):
    """Kernels in Triton, for NVIDIA GPUs; on CPU tensors under ``TRITON_INTERPRET=1``, for tests."""

    name = "triton"

    def __init__(self) -> None:
        self.ops = _callables()

    def supports(self, call: Call) -> Support:
        reason = _triton_problem() or _call_problem(call) or _device_problem(call.device)
        return Support(not reason, reason)

    def describe(self) -> dict[str, str]:
        problem = _triton_problem()
        if problem:
            return {"status": problem}
        import triton

        described = {"status": "ok", "triton": triton.__version__}
        if _interpreting():
            described["interpreter"] = "on: kernels run as Python"
        elif not torch.cuda.is_available():
            described["status"] = "no CUDA device is available"
        else:
            described["status"] = problem = _device_problem("cuda") or "ok"
            if problem == "ok":
                _, described["tuning"], described["tuning file"] = in_force.of_device(torch.cuda.current_device())
        return described


TRITON = TritonEngine()

"""The CUDA C++ engine: one compiled library for torch's CUDA version, and the words of whatever stopped it.

Importing it loads the library, which asks nothing of a GPU: the driver is first called when an op is.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from .. import _library
from .._layout import CHANNELS_LAST, NCHW
from ._compiled_library import NATIVE, load, why_not_built
from ._engine import Call, Engine, Support
from ._workspace import with_counters

NAMESPACE = "mod_kernels_cuda"
# The selector's and conv block's gradients have no kernels here: they are PyTorch ops, as the reference's are.
OPS = (
    "select_channels",
    "select_channels_saving",
    "gather_channels",
    "fuse_channels",
    "fuse_channels_",
    "add_relu_pool",
    "add_relu_pool_",
    "mod_block",
    "mod_block_",
    "input_gradient",
)
# Without clusters the last block of a sample to arrive goes on, which takes a counter of each sample.
COUNTING = ("select_channels", "select_channels_saving", "mod_block", "mod_block_")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("bottleneck", "basic", "inverted_residual", "conv", "convnext")
MAX_CHANNELS, MAX_K = 4096, 256  # kMaxChannels and kMaxK of csrc/cuda/parameters.h


def library_of(cuda: str | None) -> tuple[Path | None, str]:
    """The library to load for torch's CUDA version, or None and why there is none."""
    if cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    path = NATIVE / f"libmod_kernels_cuda_{cuda.partition('.')[0]}.so"
    if path.exists():
        return path, ""
    others = [one.name for one in sorted(NATIVE.glob("libmod_kernels_cuda_*.so"))]
    said = [f"{path.name} is not there"]
    if others:
        said.append(f"{', '.join(others)} can't serve torch's CUDA {cuda}")
    return None, "; ".join(said + why_not_built("mod_kernels_cuda"))


def architectures_of(path: Path) -> tuple[str, ...]:
    """What a library was compiled for: ``"90a"``, and ``"100+PTX"`` for what the driver compiles further."""
    ask = ctypes.CDLL(str(path)).mod_kernels_cuda_architectures
    ask.restype = ctypes.c_char_p
    return tuple(ask().decode().split())


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a GPU runs one of them: binaries of its own generation, no newer than it is; PTX of any older one.

    Those with an ``a`` run on their own capability alone.
    """

    def fits(one: str) -> bool:
        digits = one.removesuffix("+PTX").removesuffix("a")
        built = (int(digits[:-1]), int(digits[-1]))
        if one.endswith("+PTX"):
            return built <= capability
        return built == capability if one.endswith("a") else built[0] == capability[0] and built <= capability

    return any(map(fits, architectures))


def _named(architecture: str) -> str:
    digits = architecture.removesuffix("+PTX").removesuffix("a")
    return f"{digits[:-1]}.{digits[-1]}" + (" and newer" if architecture.endswith("+PTX") else "")


class CudaEngine(Engine):
    """C++ kernels for NVIDIA GPUs; a block as one cluster launch where the GPU has clusters."""

    name = "cuda"

    def __init__(self) -> None:
        self._schemas = _library.define(NAMESPACE, list(OPS), COUNTING)
        self.ops = {}
        self.architectures: tuple[str, ...] = ()
        self.library, self.problem = library_of(torch.version.cuda)
        if self.library is None:
            return
        self.problem = load(self.library, NAMESPACE, OPS, "CUDA")
        if self.problem:
            return
        self.architectures = architectures_of(self.library)
        namespace = getattr(torch.ops, NAMESPACE)
        self.ops = {name: getattr(namespace, name).default for name in OPS}
        self.ops |= {name: with_counters(self.ops[name]) for name in COUNTING}

    def supports(self, call: Call) -> Support:
        reason = self._problem_of(call)
        return Support(not reason, reason)

    def _problem_of(self, call: Call) -> str:
        if call.device != "cuda":
            return f"the CUDA kernels run on cuda, not on {call.device}"
        if self.problem:
            return f"the compiled library is not available: {self.problem}"
        if call.op not in OPS:
            return f"{call.op} has no CUDA kernel in this version"
        for what, dtype in (("feature maps", call.dtype), ("weights", call.weight_dtype)):
            if dtype is not None and dtype not in DTYPES:
                name = str(dtype).removeprefix("torch.")
                return f"the CUDA kernels take float32, float16 and bfloat16 {what}, not {name}"
        if call.layout not in (NCHW, CHANNELS_LAST):
            return f"the CUDA kernels read NCHW and channels_last, not {call.layout}"
        if call.op in COUNTING and call.channels > MAX_CHANNELS:
            return f"the selector kernel ranks up to {MAX_CHANNELS} channels, got C={call.channels}"
        if call.op in COUNTING and call.k > MAX_K:
            return f"the selector kernel chooses up to {MAX_K} channels, got k={call.k}"
        if call.kind is not None and call.kind not in KINDS:
            return f"there is no CUDA kernel for conv blocks of kind {call.kind!r}"
        return self._device_problem()

    def _device_problem(self) -> str:
        capability = torch.cuda.get_device_capability()
        if runs_on(capability, self.architectures):
            return ""
        built, this = ", ".join(map(_named, self.architectures)), ".".join(map(str, capability))
        return f"the library is built for {built}; this GPU has compute capability {this}"

    def describe(self) -> dict[str, str]:
        if self.problem:
            return {"status": self.problem}
        available = torch.cuda.is_available()
        status = (self._device_problem() or "ok") if available else "no CUDA device is available"
        return {
            "status": status,
            "library": self.library.name,
            "built for": " ".join(map(_named, self.architectures)),
        }


CUDA = CudaEngine()

"""The CPU engine: the compiled library of this machine's ISA level, and the words of whatever stopped it.

There is one per ISA level, because the code is vectorised by hand for the level's register width. The level is the
one PyTorch itself uses (``torch.backends.cpu.get_cpu_capability()``, which ``ATEN_CPU_CAPABILITY`` lowers).
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from .. import _library
from .._layout import CHANNELS_LAST, NCHW
from ..spec import DTYPES
from ._compiled_library import NATIVE, is_served, load, why_not_built
from ._engine import Call, Engine, Support

NAMESPACE = "mod_kernels_cpu"
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
    "fuse_channels_backward",
    "select_channels_backward",
    "input_gradient",
    "conv_block_saving",
    "conv_block_backward",
)
KINDS = ("bottleneck", "basic", "inverted_residual", "conv", "convnext")


def isa_levels() -> list[str]:
    """The levels this CPU can run, the fastest first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["base"]
    levels = ["v4", "v3", "v2"]
    start = {"AVX512": 0, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 2)
    return levels[start:]


class CpuEngine(Engine):
    """C++ kernels on torch's own threads; every dtype the ops take, NCHW and channels_last."""

    name = "cpu"

    def __init__(self) -> None:
        self._schemas = _library.define(NAMESPACE, list(OPS))
        self.library: Path | None = None
        self.problems: list[str] = []
        self.ops = {}
        self._load()

    def _load(self) -> None:
        """Load the fastest library there is, keeping the reason for each that there is not."""
        for level in isa_levels():
            path = NATIVE / f"libmod_kernels_cpu_{level}.so"
            problem = load(path, NAMESPACE, OPS, "CPU")
            if not problem:
                self.library = path
                namespace = getattr(torch.ops, NAMESPACE)
                self.ops = {name: getattr(namespace, name).default for name in OPS}
                return
            self.problems.append(problem)
            if any(is_served(NAMESPACE, name, "CPU") for name in OPS):
                return  # of other sources: the next level can't take its place, some ops are served now
        self.problems += why_not_built("mod_kernels_cpu")

    def supports(self, call: Call) -> Support:
        if self.library is None:
            return Support(False, "the compiled library is not available: " + "; ".join(self.problems))
        if call.op not in self.ops:
            return Support(False, f"{call.op} is not served")
        if call.device != "cpu":
            return Support(False, f"device {call.device} is not served (cpu is)")
        if call.dtype not in DTYPES:
            return Support(False, f"dtype {call.dtype} is not served")
        if call.layout not in (NCHW, CHANNELS_LAST):
            return Support(False, f"layout {call.layout} is not served (nchw and channels_last are)")
        if call.op == "conv_block_saving" and (call.dtype.itemsize < 4 or call.layout != NCHW):
            return Support(False, f"{call.op} is served in float32 and float64, NCHW")
        if call.kind is not None and call.kind not in KINDS:
            return Support(False, f"conv block {call.kind} is not served ({', '.join(KINDS)} are)")
        return Support(True)

    def describe(self) -> dict[str, str]:
        described = {"capability": torch.backends.cpu.get_cpu_capability()}
        if self.library is None:
            return {"status": "; ".join(self.problems), **described}
        described = {"status": "ok", "library": self.library.name, **described}
        if self.problems:
            described["passed over"] = "; ".join(self.problems)
        return described


CPU = CpuEngine()

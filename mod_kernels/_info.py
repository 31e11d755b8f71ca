"""What is here: versions, engines, and why an engine is not available."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import backends


def info() -> dict[str, Any]:
    """Versions, the processor, and what each engine says of itself; the text of a bug report.

    Returns:
        ``mod_kernels``, ``python``, ``torch``, ``triton``, ``numpy``: versions, None where not installed;
        ``cpu``: model, cores and the instruction set torch detects; ``gpu``: its name or why there is none;
        ``MOD_KERNELS_BACKEND``: the variable's value, None if unset;
        ``backends``: name -> what the engine says (``status`` is ``"ok"`` or the reason it is not).
    """
    from . import __version__  # not there yet while the package is being imported

    return {
        "mod_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numpy": version_of("numpy"),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "isa": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": gpu_name() or "no CUDA device is available",
        "MOD_KERNELS_BACKEND": os.environ.get("MOD_KERNELS_BACKEND"),
        "backends": backends.engines(),
    }


def version_of(package: str) -> str | None:
    """The installed version of ``package``, or None; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """The first CUDA device's name, or None."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None

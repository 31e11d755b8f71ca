"""What a result was measured on, and of what commit: without it a time means nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .._info import cpu_model, gpu_name, version_of
from ..backends.triton import TRITON
from .allocator import in_force


def describe() -> dict[str, Any]:
    """Processor, caches, ISA level, GPU, driver, clocks as found, versions, the Triton engine's tuning on a GPU,
    commit, date."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "clock_mhz": _clock_mhz(),
        "gpu": gpu_name(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "gpu_clocks": _said(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"
        ),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "tuning": TRITON.describe().get("tuning"),
        "allocator": in_force(),
        **_commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def signature(machine: dict[str, Any]) -> str:
    """What a picture and a table are signed with: the machine, the commit, whether it was changed, the date."""
    changed = " with changes" if machine.get("dirty") else ""
    return f"{short_name(machine)}; commit {machine['commit']}{changed}, {machine['date']}"


def folder_name(machine: dict[str, Any]) -> str:
    """Where results of this machine lie under ``benchmarks/results``: the GPU's name, or what a CPU differs by.

    A virtual machine's processor often has no number: the ISA level and the size of its first cache stand for it.
    """
    if machine["gpu"]:
        return _slug(machine["gpu"])
    level1 = machine["caches"].get("L1 Data")
    isa = "".join(part for part in ("avx512", "avx2") if part in machine["isa"].lower().replace("_", ""))
    parts = [_slug(machine["cpu"]), f"{machine['cores']}c", isa or _slug(machine["isa"])]
    return "-".join(parts + ([f"l1d{level1.lower()}"] if level1 else []))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def short_name(machine: dict[str, Any]) -> str:
    """What a plot or a table is labelled with."""
    if machine["gpu"]:
        return f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}"
    level1 = machine.get("caches", {}).get("L1 Data")
    isa = machine["isa"] + (f", L1 {level1}" if level1 else "")
    return f"{machine['cpu']}, {machine['cores']} cores, {isa}, torch {machine['torch']}"


def _caches() -> dict[str, str]:
    """Sizes by level as Linux gives them for the first core; empty elsewhere."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def last_level_cache_bytes() -> int:
    """Of the first core's largest cache; 0 where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [int(size[:-1]) * units[size[-1]] for size in _caches().values() if size[-1:] in units]
    return max(sizes, default=0)


def _commit() -> dict[str, Any]:
    """The checkout's commit, and whether tracked files differ from it; None outside a checkout.

    Result files do not count: a run that adds to one is of the same code.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    git = ("git", "-C", str(root))
    commit = _said(*git, "rev-parse", "--short=12", "HEAD")
    changed = _said(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(changed)}


def _clock_mhz() -> float | None:
    """The first core's clock as Linux says it is now, MHz."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("cpu MHz"):
                return float(line.partition(":")[2])
    return None


def _gpu_says(query: str) -> str | None:
    return _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _said(*command: str) -> str | None:
    """The command's output, or None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

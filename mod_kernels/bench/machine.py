"""What a result was measured on, and of what commit: without it a time means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .._info import cpu_model, gpu_name, version_of
from ..backends.triton import TRITON


def describe() -> dict[str, Any]:
    """Processor, caches, ISA level, GPU, driver, versions, the Triton engine's tuning on a GPU, commit, date."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu_name(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "tuning": TRITON.describe().get("tuning"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def short_name(machine: dict[str, Any]) -> str:
    """What a plot or a table is labelled with."""
    if machine["gpu"]:
        return f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}"
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, torch {machine['torch']}"


def _caches() -> dict[str, str]:
    """Sizes by level as Linux gives them for the first core; empty elsewhere."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def _commit() -> str | None:
    """The checkout's commit, with "+dirty" where tracked files differ; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit = _said("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    dirty = _said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+dirty" if commit and dirty else commit


def _said(*command: str) -> str | None:
    """The command's output, or None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

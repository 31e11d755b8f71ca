"""Loading a compiled library of raw ops, and keeping the words of whatever stops it.

The libraries hold only implementations; the schemas come from :mod:`mod_kernels._library`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

NATIVE = Path(__file__).parents[1] / "_native"
REASON_FILE = NATIVE / "build_failure.txt"  # written by setup.py, a line for each library that is not there
_NAMED = "mod_kernels._native."  # what such a line begins with, where it is of one library


def load(path: Path, namespace: str, ops: Iterable[str], key: str) -> str:
    """Load the library at ``path``; why it can't serve ``ops`` under the dispatch key, or ""."""
    if not path.exists():
        return f"{path.name} is not there"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # torch names the path and keeps the loader's own words as the cause.
        return f"{path.name} could not be loaded: {error.__cause__ or error}"
    missing = [name for name in ops if not is_served(namespace, name, key)]
    if missing:
        return f"{path.name} was compiled from other sources: it has no {', '.join(missing)}; build again"
    return ""


def is_served(namespace: str, name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


def why_not_built(library: str) -> list[str]:
    """What the build said of libraries whose names begin so, and of all of them."""
    lines = REASON_FILE.read_text().splitlines() if REASON_FILE.exists() else []
    return [line for line in lines if line.startswith(_NAMED + library) or not line.startswith(_NAMED)]

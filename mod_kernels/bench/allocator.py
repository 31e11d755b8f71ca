"""Freed memory that stays with the process, for as long as it measures."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
KEPT, SYSTEM = "glibc, freed memory kept", "the system's own"
_in_force = SYSTEM


def in_force() -> str:
    """KEPT after :func:`keep_freed_memory`, else SYSTEM; for a run's record of its machine."""
    return _in_force


def keep_freed_memory() -> None:
    """Have glibc give no freed memory back to the system until this process ends.

    As it comes, a large tensor's pages go back when it is freed, or do not, by what lies above them, and the next
    call has them zeroed and mapped once more: a call then takes several times as long in one process as in the
    next. Caching allocators (jemalloc, tcmalloc, PyTorch's own on a GPU) keep them; with one of
    those preloaded, or without glibc, this changes nothing that a tensor sees.
    """
    global _in_force
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # No mapping of their own for large tensors, and no limit to what is kept at the heap's end.
    if all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)]):
        _in_force = KEPT

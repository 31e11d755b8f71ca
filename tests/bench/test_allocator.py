"""What is freed while measuring is not faulted in again."""

import mmap
import platform
import subprocess
import sys

import pytest

from mod_kernels.bench import allocator
from mod_kernels.bench.allocator import keep_freed_memory  # itself: the tests' process is kept as it is

# Faults of ten allocations of 64 MB, written in whole and freed, after ten more: by then what small objects of the
# first calls took of a freed one is made up for.
# Without huge pages, which have fewer.
PROGRAM = """
import ctypes
import resource
import torch
from mod_kernels.bench import allocator

if {kept}:
    allocator.keep_freed_memory()
    assert allocator.in_force() == allocator.KEPT

PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

def write():
    torch.empty(16 << 20).fill_(1.0)

for _ in range(10):
    write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_kept_is_faulted_in_once():
    faults = {}
    for kept in (True, False):
        command = [sys.executable, "-c", PROGRAM.format(kept=kept)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        faults[kept] = int(done.stdout)
    assert faults[True] < 100
    assert faults[False] >= 10 * (64 << 20) // mmap.PAGESIZE


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator, "_in_force", allocator.SYSTEM)
    keep_freed_memory()
    assert allocator.in_force() == allocator.SYSTEM

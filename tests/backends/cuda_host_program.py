"""Builds the programs of tests/cuda_host: the CUDA kernels' sources on a machine of fibers, under sanitizers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from .test_native_program import POISON, SANITIZERS, need_compiler, run

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests/cuda_host"
KERNELS = ROOT / "csrc/cuda"
COMPILER = "g++"
FAMILIES = ("maps", "block")
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DMOD_KERNELS_CUDA_HOST"]
# -O1 takes twice as long to compile, for kernels that run a quarter faster.
KERNEL_FLAGS = ["-Og", f"-I{HOST}", *SANITIZERS, *POISON]
# The machine runs between any two steps of any thread: fast, and its own memory unchecked. It tells
# AddressSanitizer of its stacks.
MACHINE_FLAGS = ["-O2", "-DCUDA_HOST_ASAN", f"-I{ROOT / 'csrc'}"]
# Leaks are not looked for: that fails where something else traces the process.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def need_sanitizers():
    need_compiler(COMPILER, *SANITIZERS, *POISON, "-std=c++20")


def compiled(source, target, *flags):
    """Compiles ``source`` to ``target``, and fails with what the compiler says."""
    done = run(COMPILER, *FLAGS, *flags, "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def machine(factory):
    """Objects of the machine, and what reads cases: the same for all kernels."""
    names = ("machine", "cuda_host", "fiber", "run_cases")

    def build(folder):
        for name in names:
            compiled(HOST / f"{name}.cpp", folder / f"{name}.o", *MACHINE_FLAGS)

    folder = once(factory, "cuda_machine", build)
    return {name: folder / f"{name}.o" for name in names}


def cases(factory, folder, families, sources=ROOT / "csrc", *flags):
    """The program that runs cases of these families of ops, their kernels as ``sources`` has them."""
    objects = list(machine(factory).values())
    for family in families:
        source, target = HOST / f"cases_{family}.cpp", folder / f"cases_{family}.o"
        objects.append(compiled(source, target, f"-I{sources}", *KERNEL_FLAGS, *flags))
    return linked(folder / "cases", objects)


def all_cases(factory):
    """That of all ops, of the kernels as they are."""
    return once(factory, "cuda_cases", lambda folder: cases(factory, folder, FAMILIES)) / "cases"


def linked(target, objects):
    done = run(COMPILER, *SANITIZERS, *objects, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def once(tmp_path_factory, name, build):
    """``build(folder)``, by the first of pytest's worker processes to come here; the others get what it made."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            build(folder)
            (folder / "done").touch()
    return folder

"""Builds the CPU engine: one shared library per ISA level, torch's stable ABI, loaded by torch.ops.load_library.

``MOD_KERNELS_BUILD`` in the environment says what a failure means:

* ``auto`` (default): the package is installed without the library that could not be built, and the reason is
  written where ``mod-kernels info`` finds it;
* ``require``: the build fails;
* ``off``: nothing is built.
"""

import os
import platform
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from setuptools import setup
from setuptools.errors import BaseError, CCompilerError, CompileError
from torch.utils.cpp_extension import BuildExtension, CppExtension

NATIVE = Path("mod_kernels", "_native")
REASON_FILE = "build_failure.txt"  # read by mod_kernels/backends/native.py
X86_LEVELS = {level: [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")}
LEVELS = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"base": []}
# What setuptools, ninja (through torch) and a compiler that can't be run raise.
BUILD_ERRORS = (BaseError, CCompilerError, RuntimeError, OSError, subprocess.SubprocessError)
# fp-contract: a*b + c as one instruction. No -ffast-math: what the package promises of NaN and inf needs IEEE.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-g0",  # torch's default flags ask for debug information, ten times the size
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
]


@contextmanager
def printed():
    """What is written to standard output inside, as lines from the call that is yielded; printed all the same.

    ninja runs the compiler with our standard output: its words are in no exception, and pip hides them.
    """
    sys.stdout.flush()
    before = os.dup(1)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        lines = []
        try:
            yield lambda: lines
        finally:
            sys.stdout.flush()
            os.dup2(before, 1)
            os.close(before)
            log.seek(0)
            text = log.read().decode(errors="replace")
            lines += text.splitlines()
            print(text, end="", flush=True)


class NativeExtension(BuildExtension):
    """Builds each level apart and decides what a failure means."""

    def run(self):
        mode = os.environ.get("MOD_KERNELS_BUILD", "auto")
        if mode not in ("auto", "require", "off"):
            raise CompileError(f"MOD_KERNELS_BUILD must be auto, require or off, got {mode!r}")
        self.required = mode == "require"
        self.reasons = []
        targets = [Path(self.build_lib) / NATIVE] + ([NATIVE] if self.inplace else [])
        for target in targets:
            target.mkdir(parents=True, exist_ok=True)
        if mode == "off":
            self.reasons.append("not built: MOD_KERNELS_BUILD=off")
            self.extensions = []
        else:
            super().run()
        # What an earlier build left behind must not outlive a failure: it may be of other sources.
        built = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for target in targets:
            for old in target.glob("libmod_kernels_*"):
                if old.name not in built:
                    old.unlink()
            (target / REASON_FILE).unlink(missing_ok=True)
            if self.reasons:
                (target / REASON_FILE).write_text("\n".join(self.reasons) + "\n")

    def build_extensions(self):
        self.all_temp = self.build_temp
        self.failed = []
        try:
            super().build_extensions()
        except BUILD_ERRORS as error:  # before any extension: torch asks the compiler for its version
            self.give_up(self.extensions, error)
        self.extensions = [extension for extension in self.extensions if extension not in self.failed]

    def build_extension(self, extension):
        # Object files of the levels have the same names: a folder each.
        self.build_temp = os.path.join(self.all_temp, extension.name.rpartition("_")[2])
        with printed() as output:
            try:
                super().build_extension(extension)
            except BUILD_ERRORS as error:
                failure = error
            else:
                failure = None
        if failure is not None:
            told = [line.strip() for line in output() if "error" in line.lower()] or output()[-3:]
            self.give_up([extension], "; ".join([str(failure), *told[:3]]))

    def give_up(self, extensions, error):
        """Note what could not be built and why, or fail the build where it is required."""
        if self.required:
            raise CompileError(f"{extensions[0].name}: {error}")
        self.failed += extensions
        self.reasons += [f"{extension.name} was not built: {error}" for extension in extensions]

    def get_ext_filename(self, name):
        """Not Python modules: a plain shared library's name, without Python's version in it."""
        *package, stem = name.split(".")
        return os.path.join(*package, f"lib{stem}.so")


setup(
    ext_modules=[
        CppExtension(
            f"mod_kernels._native.mod_kernels_cpu_{level}",
            sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            extra_compile_args={"cxx": [*FLAGS, *march]},
            py_limited_api=True,
        )
        for level, march in LEVELS.items()
    ],
    cmdclass={"build_ext": NativeExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

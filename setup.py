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
from pathlib import Path

from setuptools import setup
from setuptools.errors import BaseError, CompileError
from torch.utils.cpp_extension import BuildExtension, CppExtension

NATIVE = Path("mod_kernels", "_native")
REASON_FILE = "build_failure.txt"  # read by mod_kernels/backends/native.py
X86_LEVELS = {level: [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")}
LEVELS = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"base": []}
# fp-contract: a*b + c as one instruction. No -ffast-math: what the package promises of NaN and inf needs IEEE.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-g0",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
]


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
        super().build_extensions()
        self.extensions = [extension for extension in self.extensions if extension not in self.failed]

    def build_extension(self, extension):
        # Object files of the levels have the same names: a folder each.
        self.build_temp = os.path.join(self.all_temp, extension.name.rpartition("_")[2])
        try:
            super().build_extension(extension)
        except (BaseError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            if self.required:
                raise CompileError(f"{extension.name}: {error}") from error
            self.failed.append(extension)
            self.reasons.append(f"{extension.name} was not built: {error}")

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

"""Builds the compiled engines: shared libraries for torch's stable ABI, loaded by torch.ops.load_library.

For CPUs there is one per ISA level. For GPUs there is one, of the CUDA major version that torch and nvcc have in
common, for every architecture below. Whether nvcc is there decides, never whether a GPU is: what builds a package
is often not what runs it.

``MOD_KERNELS_BUILD`` in the environment says what a failure means:

* ``auto`` (default): the package is installed without the library that could not be built, and the reason is
  written where ``mod-kernels info`` finds it;
* ``require``: the build fails;
* ``off``: nothing is built.

Without nvcc, or with one that does not fit torch, there is nothing to fail: the GPU's library is left out with its
reason under ``require`` too. Most machines have no nvcc, and what they install is whole without it.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError, CompileError
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

NATIVE = Path("mod_kernels", "_native")
REASON_FILE = "build_failure.txt"  # read by mod_kernels/backends/_compiled_library.py
CUDA_NAME = "mod_kernels._native.mod_kernels_cuda"
X86_LEVELS = {level: [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")}
LEVELS = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"base": []}
# What setuptools, ninja (through torch) and a compiler that can't be run raise.
BUILD_ERRORS = (BaseError, CCompilerError, RuntimeError, OSError, subprocess.SubprocessError)
# A100, A10, L4 and RTX 4090, H100, B200, RTX 5090; and PTX, which the driver compiles for whatever comes later.
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
CUDA_PTX = "100"  # the oldest of the newest generations: 11.0 and 12.1 can take it too
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
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
    STABLE_ABI,
]


def sources(folder, ending):
    return sorted(str(path) for path in Path("csrc", folder).glob(f"*.{ending}"))


HEADERS = sorted(str(path) for ending in ("h", "cuh") for path in Path("csrc").rglob(f"*.{ending}"))


def cuda_toolkit():
    """Where nvcc's toolkit is, its CUDA major version, and the architectures of ours that it knows.

    Raises:
        LookupError: there is none that fits torch; says what is missing.
    """
    if torch.version.cuda is None:
        raise LookupError(f"torch {torch.__version__} is built without CUDA")
    home = cpp_extension.CUDA_HOME
    if not home:
        raise LookupError("no CUDA toolkit was found: nvcc is not on the path, and CUDA_HOME is not set")
    nvcc = os.path.join(home, "bin", "nvcc")
    try:
        version, codes, steps = (
            subprocess.run([nvcc, *asked], check=True, capture_output=True, text=True)
            for asked in (["--version"], ["--list-gpu-code"], ["--dryrun", "-x", "cu", os.devnull])
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LookupError(f"nvcc can't be run: {error}") from error
    release = re.search(r"release (\d+)\.\d+", version.stdout)
    ours = torch.version.cuda.partition(".")[0]
    if release is None or release.group(1) != ours:
        said = f"is of {release.group(0)}" if release else "does not say its version"
        raise LookupError(f"nvcc {said}, torch {torch.__version__} of CUDA {torch.version.cuda}")
    known = codes.stdout.split()
    architectures = [one for one in CUDA_ARCHITECTURES if f"sm_{one.removesuffix('a')}" in known]
    # It may be a script that calls another: only nvcc itself knows where its libraries are.
    top = re.search(r"TOP=(.*)", steps.stderr + steps.stdout)
    return os.path.realpath(top.group(1) if top else home), ours, architectures


def cuda_extension():
    """The GPU's library.

    Raises:
        LookupError: see :func:`cuda_toolkit`.
    """
    home, major, architectures = cuda_toolkit()
    cpp_extension.CUDA_HOME = home
    built = [(one, f"sm_{one}") for one in architectures]
    if CUDA_PTX in architectures:
        built.append((CUDA_PTX, f"compute_{CUDA_PTX}"))
    named = " ".join(code.partition("_")[2] + ("" if code.startswith("sm") else "+PTX") for _, code in built)
    nvcc_flags = ["-std=c++20", "-O3", "-Xcompiler", "-fvisibility=hidden"]
    nvcc_flags += [f"-gencode=arch=compute_{one},code={code}" for one, code in built]
    return CUDAExtension(
        f"{CUDA_NAME}_{major}",
        sources("cuda", "cpp") + sources("cuda", "cu"),
        depends=HEADERS,
        extra_compile_args={
            "cxx": [*FLAGS, "-DUSE_CUDA", f'-DMOD_KERNELS_CUDA_ARCHITECTURES="{named}"'],
            "nvcc": nvcc_flags,
        },
        py_limited_api=True,
    )


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
    """Builds each library apart and decides what a failure means."""

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
            if NO_CUDA:
                self.note(CUDA_NAME, NO_CUDA)
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
        every, self.all_temp, self.failed = self.extensions, self.build_temp, []
        self.build(every)
        self.extensions = [extension for extension in every if extension not in self.failed]

    def build(self, extensions):
        self.extensions = extensions
        try:
            super().build_extensions()
        except BUILD_ERRORS as error:  # before any extension: torch asks the compilers for their versions
            # A compiler too new for nvcc stops nvcc alone.
            others = [extension for extension in extensions if not extension.name.startswith(CUDA_NAME)]
            self.give_up([extension for extension in extensions if extension not in others] or others, error)
            if len(others) < len(extensions):
                self.build(others)

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
        for extension in extensions:
            self.note(extension.name, error)

    def note(self, name, error):
        """Why a library is not there, in one line: an engine reads those that name its own."""
        self.reasons.append(" ".join(f"{name} was not built: {error}".split()))

    def get_ext_filename(self, name):
        """Not Python modules: a plain shared library's name, without Python's version in it."""
        *package, stem = name.split(".")
        return os.path.join(*package, f"lib{stem}.so")


extensions = [
    CppExtension(
        f"mod_kernels._native.mod_kernels_cpu_{level}",
        sources("cpu", "cpp"),
        depends=HEADERS,
        extra_compile_args={"cxx": [*FLAGS, *march]},
        py_limited_api=True,
    )
    for level, march in LEVELS.items()
]
try:
    extensions.append(cuda_extension())
except LookupError as missing:
    NO_CUDA = missing
else:
    NO_CUDA = None

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NativeExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

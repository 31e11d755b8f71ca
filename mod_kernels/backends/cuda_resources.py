"""What every kernel of the CUDA engine takes on every architecture it is built for: no GPU is needed.

nvcc compiles the sources of a checkout, ptxas says registers and spills, the disassembly how wide loads and stores
are. A spill of any size is a problem, so is any other use of local memory, and a pass over a map that loads no 16
bytes at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from .triton import sass
from .triton.compile import Resources, resources_in
from .triton.configs import WIDEST_LOAD

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"  # of a checkout: an installed package has none
# Compute capability -> what nvcc calls it; those of setup.py.
ARCHITECTURES = {80: "80", 86: "86", 89: "89", 90: "90a", 100: "100", 120: "120"}
# As setup.py and torch's build call nvcc.
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_TEXT = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
_LOCAL = ("LDL", "STL")
# Kernels that read a map from one end to the other, 16 bytes a thread where alignment allows. The others gather
# single values (gather_pixels) or read what a kernel before them made (tail_step).
_PASSES = re.compile("(add_relu_pool|fuse|gather_planes|input_gradient|mod_block)[a-z_]*_kernel")


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. Pairs of widths are the narrowest and the widest, in bytes a thread.

    ``error``: why its source did not compile; ``kernel`` is then the source's name.
    """

    kernel: str
    capability: int
    error: str | None = None
    problems: list[str] = field(default_factory=list)
    registers: int | None = None
    spill_bytes: int | None = None
    stack_bytes: int | None = None
    instructions: int | None = None
    load_widths: tuple[int, int] | None = None
    store_widths: tuple[int, int] | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and not self.problems

    @property
    def name(self) -> str:
        return f"{self.kernel} sm_{self.capability}"


def problem() -> str:
    """Why the kernels can't be compiled here, or ""."""
    if not sources():
        return "the CUDA kernels' sources are not here: they come with a checkout, not with an installed package"
    if _nvcc() is None:
        return "no nvcc was found: it is not on the path, and CUDA_HOME is not set"
    return ""


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def measure(capabilities: Iterable[int], on_row: Callable[[int, int], None]) -> list[Row]:
    """A row for every kernel on every capability; a thread a core waits for nvcc.

    ``on_row``: called with the number of sources that are compiled and of all.
    """
    jobs = [(source, capability) for capability in capabilities for source in sources()]
    rows: list[Row] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        pending = [pool.submit(rows_of, *job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                rows += future.result()
                on_row(done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(rows, key=lambda row: (row.kernel, row.capability))


def rows_of(source: Path, capability: int) -> list[Row]:
    """The kernels of one source on one architecture; a failure becomes one row's ``error``."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        wanted = f"-arch=sm_{ARCHITECTURES[capability]}"
        command = [_nvcc() or "nvcc", *FLAGS, wanted, str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return [Row(source.name, capability, done.stderr.strip() or f"nvcc ended with {done.returncode}")]
        taken = resources_of_each(done.stdout + done.stderr)
        listing = sass.listing(cubin.read_bytes())
    found = []
    for name, instructions in instructions_of_each(listing).items():
        # Empty for this architecture: another kernel has its work there.
        if name in taken and any(one.loads or one.stores for one in instructions):
            found.append(row_of(name, capability, taken[name], instructions))
    return found


def resources_of_each(log: str) -> dict[str, Resources]:
    """ptxas' account of each kernel, by its mangled name. Shared memory is what the launch asks for, not in it."""
    parts = _ENTRY.split(log)[1:]
    return {name: resources_in(said, shared=0) for name, said in zip(parts[::2], parts[1::2], strict=True)}


def instructions_of_each(listing: str) -> dict[str, list[sass.Instruction]]:
    parts = _TEXT.split(listing)[1:]
    return {name: sass.read(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def row_of(name: str, capability: int, taken: Resources, instructions: list[sass.Instruction]) -> Row:
    spilled = taken.spill_stores + taken.spill_loads
    local = sum(one.name.split(".")[0] in _LOCAL for one in instructions)
    problems = [f"spills {spilled} bytes"] if spilled else []
    if (local or taken.stack) and not spilled:
        problems.append(f"keeps {taken.stack} bytes in local memory ({local} loads and stores)")
    load_widths = sass.widths(one for one in instructions if one.loads)
    if _PASSES.search(name) and (load_widths is None or load_widths[1] < WIDEST_LOAD):
        problems.append(f"loads no {WIDEST_LOAD} bytes at a time")
    return Row(
        demangled(name),
        capability,
        None,
        problems,
        taken.registers,
        spilled,
        taken.stack,
        len(instructions),
        load_widths,
        sass.widths(one for one in instructions if one.stores),
    )


def demangled(name: str) -> str:
    """``gather_planes_kernel<Half, 8, true>`` where c++filt is installed, else as it is."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    said = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return said.partition("(")[0].removeprefix("void ").replace("mod_kernels::", "")

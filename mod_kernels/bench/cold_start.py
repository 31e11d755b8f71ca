"""What a fresh process waits for: imports, the first call of a block, and what compilers take beside it.

Every start is a process of its own on one thread, its files in the page cache: one start before is not counted.
torch has worked before a block's first call: x and the weights are made with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..backends import triton
from .cells import OnCell, run_cells
from .ops import times
from .store import Results, Row
from .timing import Timed

KIND, PROVIDER = "start", "process"
REPEATS = 5
TIMEOUT_S = 600

# Each prints the seconds of its steps as its last line. What a call gives is held to the reference in the end.
_PROCESS = """
import json, time
now = time.perf_counter
begin = now(); import torch; torch_in = now() - begin
begin = now(); import mod_kernels; ours_in = now() - begin
torch.set_num_threads(1)
from mod_kernels.bench.shapes import BOTTLENECK, make_spec, make_x
spec = make_spec(BOTTLENECK[2], torch.float32, "cpu")
x = make_x(BOTTLENECK[2], 1, spec)
with torch.inference_mode():
    begin = now(); mod_kernels.functional.mod_block(x, spec); first = now() - begin
    begin = now(); y = mod_kernels.functional.mod_block(x, spec); second = now() - begin
    torch.testing.assert_close(y, mod_kernels.reference.mod_block(x, spec), rtol=1e-4, atol=1e-5)
print(json.dumps([torch_in, ours_in, first, second]))
"""
_COMPILE = """
import json, time, torch, mod_kernels
torch.set_num_threads(1)
from mod_kernels.bench.providers import compiled_provider, plain_provider
from mod_kernels.bench.shapes import BOTTLENECK, make_spec, make_x
spec = make_spec(BOTTLENECK[2], torch.float32, "cpu")
x = make_x(BOTTLENECK[2], 1, spec)
with torch.inference_mode():
    begin = time.perf_counter()
    y = compiled_provider(plain_provider("cat", spec), 1).run(x)[0]
    took = time.perf_counter() - begin
    torch.testing.assert_close(y, mod_kernels.reference.mod_block(x, spec), rtol=1e-4, atol=1e-5)
print(json.dumps([took]))
"""
_TRITON = """
import json, time, triton
from mod_kernels.backends.triton import compile as ahead, enumeration
variants = enumeration.variants(enumeration.paper_shape("bottleneck", 1024, 14), "float16")
variant = next(one for one in variants if one.kernel == "block_fwd_kernel")
begin = time.perf_counter()
ahead.compile_variant(variant, 90)
print(json.dumps([time.perf_counter() - begin]))
"""


@dataclass(frozen=True)
class Cell:
    """A kind of start: its steps (a row each, and what its check says once it is through) and its repeats."""

    name: str
    script: str
    steps: tuple[tuple[str, str], ...]
    repeats: int | None  # None: REPEATS
    dtype: str = "float32"
    threads: int | None = 1

    def __str__(self) -> str:
        return self.name


CELLS = (
    Cell(
        "start",
        _PROCESS,
        (("import torch", "none"), ("import mod_kernels", "none"), ("first call", "ok"), ("second call", "ok")),
        None,
    ),
    Cell("torch.compile", _COMPILE, (("torch.compile: first call", "ok"),), 1),
    # Only compiled: there is no output without a GPU.
    Cell("triton", _TRITON, (("Triton: compile a block for 9.0", "none"),), 1, "float16"),
)


def run(results: Results, on_cell: OnCell) -> None:
    """Measure every kind of start into ``results``."""
    run_cells(CELLS, results, on_cell, run_cell)


def run_cell(cell: Cell) -> list[Row]:
    """Start as often as the cell says; a row for each step."""
    problem, samples = "", []
    if cell.name == "triton" and (reason := triton.compiler_problem()):
        problem = f"left out: {reason}"
    else:
        try:
            if cell.repeats is None:
                seconds_of(cell.script)  # not counted: brings the files into memory
            samples = [seconds_of(cell.script) for _ in range(cell.repeats or REPEATS)]
        except RuntimeError as error:
            problem = f"wrong: {error}"
    rows = []
    for number, (step, said) in enumerate(cell.steps):
        timed = Timed(step, lambda: None, samples=[sample[number] for sample in samples])
        more = {} if problem else times(timed)
        where = (1, cell.threads, "cpu", cell.dtype, "eager", "warm")
        rows.append(Row(step, KIND, *where, PROVIDER, problem or said, **more))
    return rows


def seconds_of(script: str) -> list[float]:
    """What a fresh process that runs ``script`` says of its steps; compilers find nothing that they made before.

    Raises:
        RuntimeError: it failed or took too long; with the last line that it wrote.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **caches}
        command = [sys.executable, "-c", script]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"took more than {TIMEOUT_S} s") from None
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip() or "nothing was said").splitlines()[-1]
            raise RuntimeError(f"exit status {error.returncode}: {said}") from None
    return json.loads(done.stdout.splitlines()[-1])

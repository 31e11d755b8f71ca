"""``make gpu``: all that is done on a GPU, in one command and under nine minutes, with what is installed there.

    python3 benchmarks/gpu.py [--out FOLDER]

Builds the C++ in place and compiles the kernels, runs the GPU tests, the numerics check and compute-sanitizer on a
short list, then the benchmark (L2 flushed and warm, inside a CUDA graph and not; last, for a part of the cells,
torch.compile with max-autotune). What is not timed runs side by side. Results go to FOLDER or
benchmarks/results/<gpu-name>/; every step's outcome is in gpu.json there. A failed step makes the exit status 1;
the later ones still run.

Without a GPU it rehearses: each step in the small form that a CPU can run, and for what it can't, why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 520.0  # of the nine minutes, with room for starting and for writing
# The interpreter takes minutes where a GPU takes milliseconds: a rehearsal is stopped where it hangs, not where a
# machine is slow.
REHEARSAL_BUDGET_S, REHEARSAL_LIMIT_S = 1500.0, 600.0
TAIL_LINES = 30
STOP_S = 10.0
TRITON_TESTS = "tests/backends/triton"
GPU_TESTS = "tests/backends/test_gpu.py"
# What both GPU engines say; a failure where one has all that it needs (the CUDA engine nvcc) and is not there.
ENGINES = """
import shutil, sys
from mod_kernels import backends
found = {name: said["status"] for name, said in backends.engines().items() if name in ("triton", "cuda")}
print(found)
sys.exit(found["triton"] != "ok" or (found["cuda"] != "ok" and shutil.which("nvcc") is not None))
"""


@dataclass(frozen=True)
class Step:
    """A command, the environment it adds, and the seconds it may take; or, with ``skip``, why it is not run.

    Neighbours of one ``group`` run side by side; a step without a group runs alone.
    """

    name: str
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    limit_s: float = 120.0
    skip: str = ""
    group: str = ""


@dataclass(frozen=True)
class Outcome:
    """``outcome``: ``"ok"``, ``"failed"``, ``"timed out"`` or ``"skipped"`` (``note`` says why)."""

    name: str
    outcome: str
    seconds: float = 0.0
    command: str = ""
    note: str = ""
    output_tail: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test, verify, measure and sanitize on a GPU.")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<gpu-name>")
    out = parser.parse_args().out
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    if out is None:
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else None
        out = ROOT / "benchmarks" / "results" / name if name else ROOT / "build" / "gpu-rehearsal"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{gpu or 'no GPU: a rehearsal of each step in the form that a CPU can run'}; results in {out}", flush=True
    )
    with tempfile.TemporaryDirectory() as empty:
        steps = steps_on_gpu(out, shutil.which("compute-sanitizer"), empty) if gpu else steps_in_rehearsal(out)
        budget_s = BUDGET_S if gpu else REHEARSAL_BUDGET_S
        outcomes = run_all(steps, budget_s, lambda outcomes: write(out, gpu, outcomes))
    return 1 if any(outcome.outcome in ("failed", "timed out") for outcome in outcomes) else 0


def steps_on_gpu(out: Path, sanitizer: str | None, empty: str) -> list[Step]:
    """What a GPU runs, in order; ``empty`` is a folder that torch.compile may keep its cache in."""
    python, module = sys.executable, [sys.executable, "-m", "mod_kernels"]
    named = ["--backend", "reference", "--backend", "triton", "--backend", "cuda"]
    compiled = ("test_ahead_of_time.py", "test_resources.py")  # no GPU is needed for these
    tests = [GPU_TESTS, TRITON_TESTS, *(f"--ignore={TRITON_TESTS}/{name}" for name in compiled)]
    verify = ["verify", "--device", "cuda", *named, "--json", str(out / "verify.json")]
    # Cached blocks hide what runs past an allocation.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Else a second run on the machine would find there what it says it compiled.
    compiling = {"TORCHINDUCTOR_CACHE_DIR": empty}
    why_not = "" if sanitizer else "compute-sanitizer is not on the path"
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], limit_s=150, group="build"),
        Step("compile", [python, "benchmarks/compile_kernels.py"], limit_s=150, group="build"),
        Step("engines", [python, "-c", ENGINES]),
        Step("tests", [python, "-m", "pytest", "-q", "-n", "6", *tests], limit_s=150, group="check"),
        *(
            Step(
                f"compute-sanitizer {tool}",
                [sanitizer or "", "--tool", tool, "--error-exitcode", "9", python, "benchmarks/sanitize.py"],
                uncached,
                limit_s=150,
                skip=why_not,
                group="check",
            )
            for tool in ("memcheck", "racecheck")
        ),
        # By itself: beside the others it took three times as long.
        Step("verify", [*module, *verify], limit_s=120),
        Step("bench float16", _bench(module, "float16", out), compiling, limit_s=190),
        Step("bench float32", _bench(module, "float32", out), compiling, limit_s=190),
        Step("bench networks", _bench_networks(module, out), limit_s=90),
        # Of a batch size of its own: nothing of it was compiled before. Last: it takes what time there is.
        Step("bench max-autotune", _bench_max_autotune(module, out), compiling, limit_s=150),
    ]


def _bench(module: list[str], dtype: str, out: Path) -> list[str]:
    batches = [word for batch in (1, 8, 32, 256) for word in ("--batch", str(batch))]
    options = ["--quick", "--device", "cuda", "--dtype", dtype, *batches]
    return [*module, "bench", *options, "--json", str(out / "block.jsonl")]


def _bench_max_autotune(module: list[str], out: Path) -> list[str]:
    options = ["--quick", "--max-autotune", "--dtype", "float16", "--batch", "16"]
    return [*module, "bench", *options, "--device", "cuda", "--json", str(out / "block.jsonl")]


def _bench_networks(module: list[str], out: Path) -> list[str]:
    # In float16 the plain form's selectors flip between near-equal channels: nothing to hold an output to.
    options = ["--networks", "--network", "resnet75_mod", "--batch", "1", "--batch", "32", "--dtype", "float32"]
    return [*module, "bench", *options, "--device", "cuda", "--json", str(out / "network.jsonl")]


def steps_in_rehearsal(out: Path) -> list[Step]:
    """The same steps as a machine without a GPU can run them."""
    from mod_kernels import backends

    python, module = sys.executable, [sys.executable, "-m", "mod_kernels"]
    interpreted = {"TRITON_INTERPRET": "1"}
    built = backends.engines()["cpu"]["status"] == "ok"
    why_not = "no GPU; the script it watches is run by itself, interpreted"
    verify = ["verify", "--quick", "--backend", "triton", "--dtype", "float32", "--json", str(out / "verify.json")]
    bench = ["bench", "--quick", "--batch", "1", "--threads", "1", "--json", str(out / "block.jsonl")]
    steps = [
        Step(
            "build", [python, "setup.py", "build_ext", "--inplace"], skip="the library is built" if built else ""
        ),
        Step(
            "tests (interpreted)",
            [python, "-m", "pytest", "-q", f"{TRITON_TESTS}/test_gather_fuse.py"],
            interpreted,
        ),
        Step("verify (interpreted)", [*module, *verify], interpreted),
        Step("compute-sanitizer memcheck", skip=why_not),
        Step("compute-sanitizer racecheck", skip=why_not),
        Step("sanitize.py (interpreted)", [python, "benchmarks/sanitize.py"], interpreted),
        Step("bench with a flushed L2", skip="no GPU"),
        Step("bench inside CUDA graphs", skip="no GPU"),
        Step("bench (cpu)", [*module, *bench]),
        Step("bench max-autotune", skip="no GPU"),
    ]
    return [replace(step, limit_s=REHEARSAL_LIMIT_S) for step in steps]


def run_all(steps: list[Step], budget_s: float, on_outcome: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Run each step whatever became of the ones before; ``on_outcome`` gets all outcomes after each."""
    started, outcomes = time.monotonic(), []
    for _, group in itertools.groupby(enumerate(steps), key=lambda pair: pair[1].group or pair[0]):
        together = [step for _, step in group]
        left = budget_s - (time.monotonic() - started)
        with ThreadPoolExecutor(len(together)) as pool:
            for outcome in pool.map(lambda step: _outcome(step, left, budget_s), together):  # noqa: B023 (ends here)
                outcomes.append(outcome)
                took = f" {outcome.seconds:.0f} s" if outcome.seconds else ""
                print(f"{outcome.outcome:<9}{took:>6}  {outcome.name}  {outcome.note}".rstrip(), flush=True)
                if outcome.outcome in ("failed", "timed out"):
                    print("\n".join(f"    {line}" for line in outcome.output_tail), flush=True)
                on_outcome(outcomes)
    return outcomes


def _outcome(step: Step, left: float, budget_s: float) -> Outcome:
    if step.skip:
        return Outcome(step.name, "skipped", note=step.skip)
    if left < 5:
        return Outcome(step.name, "timed out", note=f"the {budget_s:.0f} s of the whole are used up")
    return run(step, min(step.limit_s, left))


def run(step: Step, limit_s: float) -> Outcome:
    """One step, of its output the last line or, where it went wrong, the last lines."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **step.environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(step.command, cwd=ROOT, env=environment, **pipes)
    except OSError as error:
        return Outcome(step.name, "failed", note=str(error))
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome = "ok" if process.returncode == 0 else "failed"
        note = "" if outcome == "ok" else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        output = _stop(process)
        outcome, note = "timed out", f"stopped after {limit_s:.0f} s"
    command = " ".join(step.command).replace(sys.executable, "python3")
    seconds = time.monotonic() - start
    kept = 1 if outcome == "ok" else TAIL_LINES  # a summary, or what went wrong
    return Outcome(step.name, outcome, round(seconds, 1), command, note, output.splitlines()[-kept:])


def _stop(process: subprocess.Popen) -> str:
    """Ctrl-C first: the benchmark then writes what it has measured."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=STOP_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def write(out: Path, gpu: str | None, outcomes: list[Outcome]) -> None:
    """gpu.json, after every step: a run cut off leaves what it did. It names no folder of the machine."""
    from mod_kernels.bench import machine

    content = {"machine": machine.describe(), "rehearsal": gpu is None, "steps": [asdict(one) for one in outcomes]}
    text = json.dumps(content, indent=1)
    for folder in (out, ROOT, sys.prefix):
        text = text.replace(f"{folder}{os.sep}", "")
    (out / "gpu.json").write_text(text + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # run as a script, from a checkout in which nothing is installed
    sys.exit(main())

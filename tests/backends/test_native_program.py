"""The CPU kernels without torch (tests/native), in memory whose ends are guarded: for each ISA level this machine
runs, the highest of them with sanitizers; and for aarch64, under an emulator."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mod_kernels.backends.native import isa_levels

ROOT = Path(__file__).parents[2]
# Of setup.py's flags, those that decide the numbers: fused multiply-adds, and what the optimizer may assume.
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What the stack holds before it is written: no number that a kernel could take for its own.
POISON = ["-ftrivial-auto-var-init=pattern"]


def kernels():
    """The sources that need of torch no more than runtime.h asks for."""
    return [path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if "<torch/" not in path.read_text()]


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def need_compiler(compiler, *flags):
    """Skip where an empty program can't be built: no compiler, or one without these flags or their libraries."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    tried = run(compiler, *flags, "-x", "c++", "-", "-o", os.devnull, input="int main() {}")
    if tried.returncode != 0:
        pytest.skip(f"{compiler} can't build with {' '.join(flags)}: {tried.stderr.strip().splitlines()[-1]}")


def build(folder, compiler, flags, sanitizers=()):
    """The kernels alone under sanitizers: the cases are not what is looked at, and quicker so. The kernels are
    linked first, because of an inline function that both have the linker takes the first."""
    objects = []
    groups = [
        (kernels(), [*sanitizers, *POISON]),
        (sorted((ROOT / "tests/native").glob("*.cpp")), []),
    ]
    for sources, extra in groups:
        for source in sources:
            objects.append(folder / f"{source.parent.name}_{source.stem}.o")
            compiled = run(compiler, *FLAGS, *flags, *extra, "-c", source, "-o", objects[-1])
            assert compiled.returncode == 0, compiled.stderr
    program = folder / "program"
    linked = run(compiler, *FLAGS, *flags, *sanitizers, *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr
    return program


def check(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases passed" in done.stdout


def flags_of(level):
    return ["-O1", *([] if level == "base" else [f"-march=x86-64-{level}"])]


def test_under_sanitizers(tmp_path):
    flags = flags_of(isa_levels()[0])  # -O2 takes four times as long to compile under sanitizers
    need_compiler("c++", *flags, *SANITIZERS, *POISON)
    # Leaks are not looked for: that fails where something else traces the process.
    check(build(tmp_path, "c++", flags, SANITIZERS), env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})


@pytest.mark.parametrize("level", isa_levels()[1:])
def test_lower_levels(level, tmp_path):
    """Without sanitizers, which take several times as long to compile: the guards are there."""
    flags = flags_of(level)
    need_compiler("c++", *flags, *POISON)
    check(build(tmp_path, "c++", flags))


def test_on_aarch64(tmp_path):
    compiler, flags = "aarch64-linux-gnu-g++", ["-O2", "-static"]
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64")
    need_compiler(compiler, *flags, *POISON)
    check("qemu-aarch64", build(tmp_path, compiler, flags), "few")

"""The build's promises: the stable ABI, the MOD_KERNELS_BUILD switch, and a loader that keeps its words."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mod_kernels.backends.native import NATIVE, isa_levels

ROOT = Path(__file__).parents[1]
LIBRARIES = sorted(NATIVE.glob("libmod_kernels_cpu_*.so"))


@pytest.mark.skipif(not LIBRARIES or shutil.which("nm") is None, reason="no library built, or no nm")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_libraries_use_the_stable_abi_alone(library):
    """Of torch they need plain C functions only: a mangled c10:: or at:: name would tie them to one version."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    needed = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert [
        name for name in needed if "c10" in name or "2at" in name or "5torch" in name or name.startswith("Py")
    ] == []


@pytest.fixture
def source_tree(tmp_path):
    """What setup.py needs, copied: a build must not touch the package under test."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    # One empty file in the place of the kernels: what matters is how the build ends.
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/empty.cpp").write_text("")
    return tmp_path


# What the broken compiler still does: nothing; say its version; compile, but not link.
ABILITIES = {
    "nothing": "nothing",
    "version": '*" -v "*|*-dump*|*--version*',
    "compile": '*" -v "*|*-dump*|*--version*|*" -c "*',
}


@pytest.fixture(params=ABILITIES)
def broken_compiler(tmp_path, request):
    broken = tmp_path / "broken-c++"
    able = f'case " $* " in {ABILITIES[request.param]}) exec c++ -O0 "$@";; esac'
    broken.write_text(f"#!/bin/sh\n{able}\necho 'fatal error: no such luck'\nexit 1\n")
    broken.chmod(0o755)
    return request.param, {"CC": str(broken), "CXX": str(broken)}


def run_build(tree, mode, **environment):
    native = tree / "lib" / "mod_kernels" / "_native"
    native.mkdir(parents=True)
    (native / "libmod_kernels_cpu_old.so").write_text("of an earlier build")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib=lib"],
        cwd=tree,
        env={**os.environ, "MOD_KERNELS_BUILD": mode, **environment},
        capture_output=True,
        text=True,
    )
    reason = native / "build_failure.txt"
    return done, reason.read_text() if reason.exists() else "", sorted(path.name for path in native.glob("*.so"))


def test_build_off(source_tree):
    done, reason, libraries = run_build(source_tree, "off")
    assert done.returncode == 0, done.stderr
    assert reason == "not built: MOD_KERNELS_BUILD=off\n"
    assert libraries == []


def test_build_auto_when_it_fails(source_tree, broken_compiler):
    able, environment = broken_compiler
    done, reason, libraries = run_build(source_tree, "auto", **environment)
    assert done.returncode == 0, done.stderr
    assert reason.count("was not built") == (1 if isa_levels() == ["base"] else 3)
    if able != "nothing":
        assert "no such luck" in reason  # the compiler's own words, which pip hides
    assert libraries == []


def test_build_require_when_it_fails(source_tree, broken_compiler):
    done, _, _ = run_build(source_tree, "require", **broken_compiler[1])
    assert done.returncode != 0
    assert "mod_kernels_cpu" in done.stderr


def test_build_unknown_mode(source_tree):
    done, _, _ = run_build(source_tree, "maybe")
    assert done.returncode != 0
    assert "MOD_KERNELS_BUILD must be auto, require or off, got 'maybe'" in done.stderr


@pytest.fixture
def native(tmp_path):
    """The empty folder of compiled libraries of a copy of the package."""
    package = tmp_path / "mod_kernels"
    shutil.copytree(ROOT / "mod_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "_native"))
    (package / "_native").mkdir()
    return package / "_native"


def describe(native):
    """What the CPU engine of that copy says of itself."""
    root = native.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", "import mod_kernels.backends.native as n; print(n.CPU.describe())"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is installed")
def test_library_of_other_sources_is_named(native):
    """One that loads but lacks ops, as a build left behind by an update does."""
    library = native / f"libmod_kernels_cpu_{isa_levels()[0]}.so"
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", library], check=True)
    said = describe(native)
    assert f"{library.name} was compiled from other sources: it has no select_channels, " in said
    assert "build again" in said


def test_corrupt_library_keeps_the_loaders_words(native):
    """Loading must not raise; the next lower level, where there is one, serves instead."""
    best = isa_levels()[0]
    (native / f"libmod_kernels_cpu_{best}.so").write_text("not a library")
    (native / "build_failure.txt").write_text("the compiler's words\n")
    said = describe(native)
    assert "could not be loaded" in said
    assert "too short" in said or "invalid" in said
    assert "the compiler's words" in said
    lower = isa_levels()[1:]
    if lower and (NATIVE / f"libmod_kernels_cpu_{lower[0]}.so").exists():
        shutil.copy(NATIVE / f"libmod_kernels_cpu_{lower[0]}.so", native)
        said = describe(native)
        assert "'status': 'ok'" in said
        assert f"libmod_kernels_cpu_{lower[0]}.so" in said
        assert "could not be loaded" in said

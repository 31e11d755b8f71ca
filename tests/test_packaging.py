"""The build's promises: the stable ABI, the MOD_KERNELS_BUILD switch, and a loader that keeps its words."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mod_kernels.backends.native import NATIVE, isa_levels

ROOT = Path(__file__).parents[1]
LIBRARIES = sorted(NATIVE.glob("libmod_kernels_*.so"))
# What setup.py asks of torch: without a major version of CUDA of its own it wants no nvcc.
CUDA = torch.version.cuda
MAJOR = CUDA and CUDA.partition(".")[0]


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
    for name in ("cpu/empty.cpp", "cuda/empty.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True)
        (tmp_path / "csrc" / name).write_text("")
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


def run_build(tree, mode, cuda=None, **environment):
    """``cuda``: what torch says it is built for; with None nvcc is not asked."""
    native = tree / "lib" / "mod_kernels" / "_native"
    native.mkdir(parents=True)
    for old in ("libmod_kernels_cpu_old.so", "libmod_kernels_cuda_1.so"):
        (native / old).write_text("of an earlier build")
    build = f"import runpy, torch; torch.version.cuda = {cuda!r}; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", build, "-q", "build_ext", "--build-lib=lib"],
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
    named = [line for line in reason.splitlines() if line.startswith("mod_kernels._native.mod_kernels_cpu_")]
    assert len(named) == len(cpu_libraries())
    assert f"mod_kernels_cuda was not built: torch {torch.__version__} is built without CUDA\n" in reason
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


# ---- the GPU's library


@pytest.fixture
def fake_nvcc(tmp_path):
    """Makes an nvcc of some version, which compiles nothing; gives the environment that has it."""

    def make(release, version_of="echo 'Cuda compilation tools, release {}, V1'"):
        home = tmp_path / "toolkit"
        (home / "bin").mkdir(parents=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(
            "#!/bin/sh\n"
            f"case $1 in --version) {version_of.format(release)}; exit;;\n"
            "--list-gpu-code) echo sm_80; exit;;\n"
            f"--dryrun) echo '#$ TOP={home}/bin/..' >&2; exit;; esac\n"
            "echo 'fatal error: nothing is compiled here'; exit 1\n"
        )
        nvcc.chmod(0o755)
        return {"CUDA_HOME": str(home)}

    return make


def cpu_libraries():
    return [
        f"libmod_kernels_cpu_{level}.so"
        for level in (["base"] if isa_levels() == ["base"] else ("v2", "v3", "v4"))
    ]


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_without_nvcc_the_rest_is_built(source_tree, mode, tmp_path):
    """No failure under ``require`` either: there is nothing to fail."""
    done, reason, libraries = run_build(source_tree, mode, "13.0", CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode == 0, done.stderr
    assert libraries == cpu_libraries()
    assert reason.startswith("mod_kernels._native.mod_kernels_cuda was not built: nvcc can't be run: ")
    assert reason.count("\n") == 1


@pytest.mark.parametrize(
    "cuda,said",
    [
        ("12.8", "nvcc is of release 11.4, torch {} of CUDA 12.8"),
        (None, "torch {} is built without CUDA"),
    ],
)
def test_an_nvcc_that_does_not_fit_torch_is_left_alone(source_tree, fake_nvcc, cuda, said):
    done, reason, libraries = run_build(source_tree, "require", cuda, **fake_nvcc("11.4"))
    assert done.returncode == 0, done.stderr
    assert libraries == cpu_libraries()
    assert reason == f"mod_kernels._native.mod_kernels_cuda was not built: {said.format(torch.__version__)}\n"


@pytest.mark.skipif(CUDA is None, reason="this torch has no CUDA libraries to link with")
def test_an_nvcc_that_fails_fails_by_the_same_rule(source_tree, fake_nvcc):
    toolkit = fake_nvcc(CUDA)
    done, reason, libraries = run_build(source_tree, "auto", CUDA, **toolkit)
    assert done.returncode == 0, done.stderr
    assert libraries == cpu_libraries()
    assert f"mod_kernels_cuda_{MAJOR} was not built: " in reason and "nothing is compiled here" in reason
    shutil.rmtree(source_tree / "lib")
    done, *_ = run_build(source_tree, "require", CUDA, **toolkit)
    assert done.returncode != 0
    assert f"mod_kernels_cuda_{MAJOR}" in done.stderr


@pytest.mark.skipif(CUDA is None or shutil.which("nvcc") is None, reason="needs nvcc and a torch built for CUDA")
def test_one_library_for_the_cuda_version_that_torch_has(source_tree):
    done, reason, libraries = run_build(source_tree, "require", CUDA)
    if reason:
        pytest.skip(reason)  # of another major version
    assert done.returncode == 0, done.stderr
    assert libraries == [*cpu_libraries(), f"libmod_kernels_cuda_{MAJOR}.so"]


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

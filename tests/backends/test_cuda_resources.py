"""``mod-kernels resources --engine cuda``: what kernels take, and that what must not be is seen. No GPU needed."""

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from mod_kernels import cli
from mod_kernels.backends import cuda_resources

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")  # whose nvdisasm reads the binaries
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc is installed")

COPY = """
template <class T>
__global__ void copy_kernel(const T* from, T* to) { to[threadIdx.x] = from[threadIdx.x]; }
template __global__ void copy_kernel(const float4*, float4*);
template __global__ void copy_kernel(const short*, short*);
"""
# 64 sums a thread, all of them needed to the end, in 32 registers.
SPILLING = """
__global__ void __launch_bounds__(1024, 2) sums_kernel(const float* from, float* to, int count) {
  float sums[64] = {};
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < 64; ++j) sums[j] += from[i] * from[i + j];
  }
#pragma unroll
  for (int j = 0; j < 64; ++j) to[64 * threadIdx.x + j] = sums[j];
}
"""
LOCAL = """
__global__ void pick_kernel(const float* from, const int* which, float* to) {
  float values[64];
  for (int j = 0; j < 64; ++j) values[j] = from[j] * from[j + 1];
  for (int j = 0; j < 64; ++j) to[j] = values[which[j]];
}
"""
# As of two kernels: one for devices with clusters, one for those without.
EMPTY = """
__global__ void only_on_9_0_kernel(int* to) {
#if __CUDA_ARCH__ >= 900
  *to = 1;
#endif
}
"""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Run the command on sources of the test; returns result and the kernels of its JSON by name."""

    def run(*texts, capability="90"):
        for number, text in enumerate(texts):
            (tmp_path / f"source{number}.cu").write_text(text)
        monkeypatch.setattr(cuda_resources, "SOURCES", tmp_path)
        path = tmp_path / "resources.json"
        options = ["--engine", "cuda", "--capability", capability, "--json", str(path)]
        result = CliRunner().invoke(cli.app, ["resources", *options])
        lines = path.read_text().splitlines() if path.exists() else []
        found = [record for record in map(json.loads, lines) if record["record"] == "cuda"]
        return result, {row["kernel"]: row for row in found}

    return run


@needs_nvcc
def test_what_kernels_take(compiled):
    result, rows = compiled(COPY)
    assert result.exit_code == 0, result.output
    assert "ok: 2 kernels" in result.stdout
    widths = sorted(row["load_widths"] for row in rows.values())
    assert widths == [[2, 2], [16, 16]] == sorted(row["store_widths"] for row in rows.values())
    for row in rows.values():
        assert row["capability"] == 90 and 0 < row["registers"] < 32
        assert row["spill_bytes"] == row["stack_bytes"] == 0 and row["instructions"] > 4


@needs_nvcc
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt is installed")
def test_kernels_are_named_as_they_are_written(compiled):
    assert set(compiled(COPY)[1]) == {"copy_kernel<float4>", "copy_kernel<short>"}


@needs_nvcc
@pytest.mark.parametrize("source,said", [(SPILLING, "spills "), (LOCAL, "bytes in local memory")])
def test_local_memory_is_an_error(source, said, compiled):
    result, rows = compiled(COPY, source)
    assert result.exit_code == 1
    assert "FAILED: 1 of 3 kernels" in result.stdout and said in result.stdout
    assert sum(bool(row["problems"]) for row in rows.values()) == 1


@needs_nvcc
def test_a_pass_over_a_map_in_narrow_loads_is_an_error(compiled):
    result, rows = compiled(COPY.replace("copy_kernel", "fuse_planes_kernel"))
    assert result.exit_code == 1 and "loads no 16 bytes at a time" in result.stdout
    narrow, wide = sorted(rows.values(), key=lambda row: row["load_widths"])
    assert narrow["problems"] and not wide["problems"]


@needs_nvcc
def test_a_source_that_does_not_compile_is_an_error(compiled):
    result, rows = compiled(COPY, "no such thing;")
    assert result.exit_code == 1
    assert "source1.cu sm_90: does not compile: " in result.stdout and len(rows) == 3


@needs_nvcc
@pytest.mark.parametrize("capability,kernels", [("80", 0), ("90", 1)])
def test_a_kernel_that_is_empty_on_an_architecture_is_left_out(capability, kernels, compiled):
    result, rows = compiled(EMPTY, capability=capability)
    assert result.exit_code == 0 and len(rows) == kernels


def test_an_installed_package_says_that_it_has_no_sources(compiled):
    result, _ = compiled()
    assert result.exit_code == 2
    assert "the CUDA kernels' sources are not here: they come with a checkout" in result.stderr


def test_without_nvcc_it_says_so(compiled, monkeypatch):
    monkeypatch.setattr(cuda_resources, "_nvcc", lambda: None)
    result, _ = compiled(COPY)
    assert result.exit_code == 2
    assert "no nvcc was found" in result.stderr


def test_the_engine_must_be_one_of_two():
    result = CliRunner().invoke(cli.app, ["resources", "--engine", "cpu"])
    assert result.exit_code == 2 and "engine must be one of triton, cuda, got 'cpu'" in result.stderr


def test_architectures_are_those_of_the_build():
    setup = (cuda_resources.SOURCES.parents[1] / "setup.py").read_text()
    named = ", ".join(f'"{one}"' for one in cuda_resources.ARCHITECTURES.values())
    assert f"CUDA_ARCHITECTURES = ({named})" in setup

"""The command line: exit statuses, one-line errors, and what an interrupt leaves."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mod_kernels import cli, tune, verify
from mod_kernels.backends import triton
from mod_kernels.backends.cuda import CUDA
from mod_kernels.bench import blocks, store
from mod_kernels.bench.shapes import Shape
from mod_kernels.tune.search import Verdict

runner = CliRunner()
_HAS_TRITON = importlib.util.find_spec("triton") is not None
SMALL = Shape("bottleneck", 64, 7, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--backend", "nope"], "backend must be one of reference, cpu, triton, cuda, got 'nope'"),
        (["verify", "--dtype", "int8"], "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        (["verify", "--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["bench", "--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["bench", "--dtype", "int8"], "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        (["bench", "--networks", "--dtype", "float16"], "dtype must be one of float32, got 'float16'"),
        (
            ["bench", "--kind", "inverted"],
            "kind must be one of bottleneck, basic, inverted_residual, conv, convnext, got 'inverted'",
        ),
        (["bench", "--layout", "nhwc"], "layout must be one of nchw, channels_last, got 'nhwc'"),
        (["bench", "--layout", "nchw", "--networks"], "--layout does not go with suite network"),
        (["bench", "--threads", "0"], "threads must be at least 1, got 0"),
        (["bench", "--batch", "0"], "batch must be at least 1, got 0"),
        (["bench", "--quick", "--networks"], "--quick does not go with suite network"),
        (["bench", "--network", "resnet75_mod"], "--network does not go with suite block"),
        (["tune", "--dtype", "float64"], "dtype must be one of float16, bfloat16, float32, got 'float64'"),
        (["tune", "--batch", "0"], "batch must be at least 1, got 0"),
        (["tune", "--budget", "0"], "budget must be more than 0 seconds, got 0"),
    ],
)
def test_a_wrong_argument_is_one_line_on_stderr(arguments, message):
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"mod-kernels: {message}\n"


def test_an_unknown_network_is_one_line_that_names_the_choices():
    result = runner.invoke(cli.app, ["bench", "--networks", "--network", "resnet1"])
    assert result.exit_code == 2
    assert result.stderr.startswith("mod-kernels: network must be one of resnet18_mod, ")
    assert result.stderr.endswith("got 'resnet1'\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_cuda_without_a_gpu_is_one_line(command):
    result = runner.invoke(cli.app, [command, "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stderr == "mod-kernels: device 'cuda': no CUDA device is available here\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_is_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = runner.invoke(cli.app, ["tune"])
    assert (result.exit_code, result.stdout) == (2, "")
    said = "mod-kernels: tune times kernels on a GPU: "
    assert result.stderr.startswith(
        said + ("no CUDA device is available here\n" if _HAS_TRITON else "triton cannot")
    )
    assert result.stderr.count("\n") == 1


@pytest.fixture
def fake_tune(monkeypatch, tmp_path):
    """`mod-kernels tune` as on a GPU, with a search of the test's."""
    monkeypatch.setenv("MOD_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(triton, "gpu_problem", lambda: "")
    return lambda search: monkeypatch.setattr(tune, "tune", search)


def test_tune_passes_its_options_on_and_says_what_it_found(fake_tune):
    seen = []

    def search(shapes, batches, dtypes, budget_s, on_verdict):
        seen.append((shapes, batches, dtypes, budget_s))
        on_verdict(Verdict("tile", 2048, True, "3.0% faster over 4 cells"))
        return tune.Tuned(Path("somewhere"), len(seen) < 2, "tile=2048" if len(seen) < 2 else "")

    fake_tune(search)
    result = runner.invoke(cli.app, ["tune"])
    assert result.stdout.splitlines() == [
        "kept tile 2048: 3.0% faster over 4 cells",
        "in force from the next process on: tile=2048",
        "written to somewhere",
    ]
    options = ["--shape", "512x7x7", "--batch", "3", "--dtype", "float32", "--dtype", "bfloat16", "--budget", "9"]
    result = runner.invoke(cli.app, ["tune", *options])
    assert result.exit_code == 0
    assert "the 9 seconds were over before every candidate was tried" in result.stdout
    assert "in force from the next process on: the numbers that are built in" in result.stdout
    assert seen == [
        ([*tune.SHAPES.values()], (1, 8, 32, 128), [torch.float16], 900.0),
        ([Shape("basic", 512, 7, 7)], [3], [torch.float32, torch.bfloat16], 9.0),
    ]


def test_tune_interrupted_exits_with_130(fake_tune):
    def search(*_):
        raise KeyboardInterrupt

    fake_tune(search)
    assert runner.invoke(cli.app, ["tune"]).exit_code == cli.INTERRUPTED


def test_tune_does_not_begin_where_nothing_can_be_kept(fake_tune, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOD_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    fake_tune(lambda *_: pytest.fail("it began"))
    result = runner.invoke(cli.app, ["tune"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("mod-kernels: what is found can't be kept: ")


def test_the_module_runs_and_shows_no_traceback():
    command = [sys.executable, "-m", "mod_kernels", "verify", "--backend", "nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_info_says_what_works_and_why_the_rest_does_not(monkeypatch):
    monkeypatch.setenv("MOD_KERNELS_BACKEND", "reference")
    result = runner.invoke(cli.app, ["info"])
    assert result.exit_code == 0
    lines = {line[:20].strip(): line[21:] for line in result.stdout.splitlines()}
    assert lines["torch"] == torch.__version__
    assert lines["MOD_KERNELS_BACKEND"] == "reference"
    assert torch.backends.cpu.get_cpu_capability() in lines["cpu"]
    if CUDA.problem:
        assert lines["backend cuda"] == CUDA.problem
    else:
        assert f"library {CUDA.library.name}, built for 8.0 " in lines["backend cuda"]
    assert "backend cpu" in lines
    assert "backend triton" in lines


def _row(ok, served=True):
    return verify.Row(
        "cpu", "mod_block basic", "float32", "nchw", "1x2x3x4", "values", 1.0, 2.0, ok, served, "because"
    )


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ([_row(True), _row(True, served=False)], 0, "ok: 1 comparisons"),
        ([_row(True), _row(False)], 1, "FAILED: 1 of 2 comparisons"),
        ([_row(True, served=False)], 1, "NOTHING was checked"),
    ],
)
def test_verify_exit_status(monkeypatch, tmp_path, rows, status, said):
    monkeypatch.setattr(cli, "verify", lambda *args, **kwargs: verify.Report("cpu", 1, rows))
    path = tmp_path / "new" / "verify.json"
    result = runner.invoke(cli.app, ["verify", "--json", str(path)])
    assert result.exit_code == status
    assert said in result.stdout
    assert ("because" in result.stdout) == (len(rows) == 1 or status == 0 or not rows[1].ok)
    assert json.loads(path.read_text())["ok"] == (status == 0)


def test_verify_passes_its_options_on(monkeypatch):
    seen = {}

    def fake(device, dtypes, backends, quick, on_row):
        seen.update(device=device, dtypes=dtypes, backends=backends, quick=quick)
        return verify.Report("cpu", 1, [_row(True)])

    monkeypatch.setattr(cli, "verify", fake)
    arguments = ["verify", "--quick", "--dtype", "float16", "--backend", "cpu", "--backend", "reference"]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert seen == {"device": "cpu", "dtypes": (torch.float16,), "backends": ("cpu", "reference"), "quick": True}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ([], ["bottleneck"] * 4 + ["basic"] * 4),
        (["--kind", "basic"], ["basic"] * 4),
        (["--quick"], ["bottleneck"] * 4),
        (["--quick", "--kind", "basic"], ["basic"] * 4),
        (["--kind", "inverted_residual"], ["inverted_residual"] * 5),
        (["--kind", "conv"], ["conv"] * 5),
        (["--kind", "convnext"], ["convnext"] * 4),
    ],
)
def test_bench_passes_its_options_on(monkeypatch, options, kinds):
    seen = []
    monkeypatch.setattr(blocks, "run", lambda plan, *_: seen.append(plan))
    chosen = ["--dtype", "bfloat16", "--layout", "channels_last", "--batch", "3", "--threads", "2"]
    assert runner.invoke(cli.app, ["bench", *options, *chosen]).exit_code == 0
    (plan,) = seen
    assert [shape.kind for shape in plan.shapes] == kinds
    assert (plan.batches, plan.threads, plan.device) == ((3,), (2,), "cpu")
    assert (plan.dtype, plan.layout) == (torch.bfloat16, "channels_last")
    assert (plan.cell_s < blocks.Plan.cell_s) == ("--quick" in options)


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path):
    real, cells_done = blocks.run_cell, []

    def interrupted_in_the_second_cell(*arguments, **more):
        if cells_done:
            raise KeyboardInterrupt
        cells_done.append(arguments[0])
        return real(*arguments, **more)

    monkeypatch.setattr(blocks, "run_cell", interrupted_in_the_second_cell)
    monkeypatch.setattr(blocks, "BOTTLENECK", (SMALL,))
    monkeypatch.setattr(blocks, "quick", _tiny)
    path, threads = tmp_path / "block.jsonl", torch.get_num_threads()
    result = runner.invoke(cli.app, ["bench", "--quick", "--threads", "1", "--json", str(path)])
    assert result.exit_code == cli.INTERRUPTED, result.output
    assert "interrupted" in result.stdout
    assert "64x7x7" in result.stdout
    saved = store.load(path)
    assert saved.interrupted
    assert {row.batch for row in saved.rows} == {cells_done[0].batch}
    assert {"plain-clone", "floor"} <= {row.provider for row in saved.rows}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("form", [["--json", "{}"], ["--json={}"]])
def test_a_result_file_does_not_say_where_it_was_written(monkeypatch, tmp_path, form):
    monkeypatch.setattr(blocks, "quick", _tiny)
    path = tmp_path / "block.jsonl"
    arguments = ["bench", "--quick", "--threads", "1", *(word.format(path) for word in form)]
    monkeypatch.setattr("sys.argv", ["mod-kernels", *arguments])
    assert runner.invoke(cli.app, arguments).exit_code == 0
    said = " ".join(form).format("block.jsonl")
    assert store.load(path).command == f"mod-kernels bench --quick --threads 1 {said}"
    assert str(tmp_path) not in path.read_text()


def test_a_wrong_provider_is_shown_and_fails_the_command(monkeypatch):
    monkeypatch.setattr(blocks, "quick", _tiny)
    monkeypatch.setattr(blocks, "check", lambda provider, *_, **__: "no" if "clone" in provider.name else "")
    result = runner.invoke(cli.app, ["bench", "--quick", "--threads", "1", "--batch", "2"])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "64x7x7 N=2 plain-clone: wrong: no" in result.stdout


@pytest.mark.parametrize("columns", ["80", "200"])
def test_a_narrow_terminal_does_not_cut_numbers_off(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(blocks, "quick", _tiny)
    monkeypatch.setattr(blocks, "check", lambda *_, **__: "")  # this is about the table
    result = runner.invoke(cli.app, ["bench", "--quick", "--threads", "1", "--batch", "2"])
    assert result.exit_code == 0, result.output
    assert "plain/" in result.stdout
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout


def test_max_autotune_is_a_matter_of_blocks(monkeypatch):
    plans = []
    monkeypatch.setattr(blocks, "quick", lambda plan: plans.append(plan) or _tiny(plan))
    for options in ([], ["--max-autotune"]):
        arguments = ["bench", "--quick", "--threads", "1", "--batch", "2", *options]
        assert runner.invoke(cli.app, arguments).exit_code == 0
    assert [plan.max_autotune for plan in plans] == [False, True]
    refused = runner.invoke(cli.app, ["bench", "--networks", "--max-autotune"])
    assert refused.exit_code == 2 and "--max-autotune does not go with suite network" in refused.output


def _tiny(plan):
    return blocks.Plan(shapes=(SMALL,), batches=plan.batches, threads=plan.threads, rounds=2, compile_batches=())

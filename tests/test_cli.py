"""The command line: exit statuses, one-line errors, and what an interrupt leaves."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from mod_kernels import cli, verify
from mod_kernels.bench import blocks, store
from mod_kernels.bench.shapes import Shape

runner = CliRunner()
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
        (["bench", "--kind", "inverted"], "kind must be one of bottleneck, basic, got 'inverted'"),
        (["bench", "--layout", "nhwc"], "layout must be one of nchw, channels_last, got 'nhwc'"),
        (["bench", "--layout", "nchw", "--networks"], "--layout is blocks only: leave out --networks or --layout"),
        (["bench", "--threads", "0"], "threads must be at least 1, got 0"),
        (["bench", "--batch", "0"], "batch must be at least 1, got 0"),
        (["bench", "--quick", "--networks"], "--quick is blocks only: leave out --networks or --quick"),
        (["bench", "--network", "resnet75_mod"], "--network goes with --networks"),
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
    assert lines["backend cuda"] == "the CUDA C++ engine is not part of this version"
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
    assert (plan.rounds < blocks.Plan.rounds) == ("--quick" in options)


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path):
    real, cells_done = blocks.run_cell, []

    def interrupted_in_the_second_cell(*arguments):
        if cells_done:
            raise KeyboardInterrupt
        cells_done.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(blocks, "run_cell", interrupted_in_the_second_cell)
    monkeypatch.setattr(blocks, "BOTTLENECK", (SMALL,))
    monkeypatch.setattr(blocks, "quick", _tiny)
    path, threads = tmp_path / "blocks.json", torch.get_num_threads()
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
    path = tmp_path / "blocks.json"
    arguments = ["bench", "--quick", "--threads", "1", *(word.format(path) for word in form)]
    monkeypatch.setattr("sys.argv", ["mod-kernels", *arguments])
    assert runner.invoke(cli.app, arguments).exit_code == 0
    said = " ".join(form).format("blocks.json")
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
    assert refused.exit_code == 2 and "--max-autotune is blocks only" in refused.output


def _tiny(plan):
    return blocks.Plan(shapes=(SMALL,), batches=plan.batches, threads=plan.threads, rounds=2, compile_batches=())

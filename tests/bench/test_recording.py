"""Where results go, and how an interrupted run goes on."""

import dataclasses

import pytest
from typer.testing import CliRunner

from mod_kernels import cli
from mod_kernels.bench import blocks, machine, recording, store
from mod_kernels.bench.shapes import Shape

HERE = machine.describe()
SMALL = Shape("bottleneck", 64, 7, 7)
runner = CliRunner()


def test_a_folder_gets_a_file_for_each_machine_and_suite(tmp_path):
    name = machine.folder_name(HERE)
    assert recording.file_of(tmp_path, "ops", HERE) == tmp_path / name / "ops.jsonl"
    assert recording.file_of(tmp_path / "new", "ops", HERE) == tmp_path / "new" / name / "ops.jsonl"
    assert recording.file_of(tmp_path / "it.jsonl", "ops", HERE) == tmp_path / "it.jsonl"


def test_folder_names():
    cpu = {"gpu": None, "cpu": "AMD EPYC", "cores": 2, "isa": "AVX512", "caches": {"L1 Data": "48K"}}
    assert machine.folder_name(cpu) == "amd-epyc-2c-avx512-l1d48k"
    assert machine.folder_name(cpu | {"caches": {}}) == "amd-epyc-2c-avx512"
    assert machine.folder_name({"gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(blocks, "quick", lambda plan: dataclasses.replace(plan, shapes=(SMALL,), rounds=2, **FAST))


FAST = {"batches": (1, 2, 3), "caches": ("warm",), "compile_batches": (), "cell_s": 0.2}


def bench(path, *more):
    return runner.invoke(cli.app, ["bench", "block", "--quick", "--threads", "1", "--json", str(path), *more])


def interrupt_in_cell(monkeypatch, number):
    real, done = blocks.run_cell, []

    def run_cell(cell, *others, **more):
        done.append(cell.batch)
        if len(done) == number:
            raise KeyboardInterrupt
        return real(cell, *others, **more)

    monkeypatch.setattr(blocks, "run_cell", run_cell)
    return done


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, tmp_path, small):
    path = tmp_path / "block.jsonl"
    interrupt_in_cell(monkeypatch, 2)
    assert bench(path).exit_code == cli.INTERRUPTED
    assert {row.batch for row in store.load(path).rows} == {1}
    done = interrupt_in_cell(monkeypatch, 0)
    result = bench(path, "--resume")
    assert result.exit_code == 0, result.output
    assert done == [2, 3]
    (run,) = store.read(path).runs
    assert not run.interrupted and [row.batch for row in run.rows if row.provider == "floor"] == [1, 2, 3]
    again = bench(path, "--resume")
    assert again.exit_code == 2 and "is complete: nothing to resume" in again.stderr


def test_a_killed_run_goes_on_too(monkeypatch, tmp_path, small):
    """No end was written, the last line is cut."""
    path = tmp_path / "block.jsonl"
    assert bench(path).exit_code == 0
    lines = path.read_text().splitlines(keepends=True)
    cut = next(number for number, line in enumerate(lines) if '"record": "cell"' in line) + 3
    path.write_text("".join(lines[:cut])[:-40])
    result = bench(path, "--resume")
    assert result.exit_code == 0, result.output
    (run,) = store.read(path).runs
    assert [row.batch for row in run.rows if row.provider == "floor"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"commit": "0123"}, "is of commit 0123"),
        ({"torch": "1.0"}, "is of torch 1.0"),
        ({"cores": 999}, "is of another machine"),
    ],
)
def test_what_a_run_does_not_go_on_from(tmp_path, change, said):
    path = tmp_path / "block.jsonl"
    store.save(store.Results(HERE | change, "mod-kernels bench", interrupted=True), path)
    with pytest.raises(ValueError, match=said):
        recording.interrupted_run(path, "block", "mod-kernels bench", HERE)


def test_nothing_to_resume(tmp_path):
    path = tmp_path / "block.jsonl"
    with pytest.raises(ValueError, match="is not there"):
        recording.interrupted_run(path, "block", "", HERE)
    store.save(store.Results(HERE, "one", interrupted=True), path)
    with pytest.raises(ValueError, match="holds no run of ops"):
        recording.interrupted_run(path, "ops", "one", HERE)
    with pytest.raises(ValueError, match="is of another command: one"):
        recording.interrupted_run(path, "block", "two", HERE)
    result = runner.invoke(cli.app, ["bench", "--resume"])
    assert result.exit_code == 2 and "--resume goes with --json" in result.stderr


def test_a_file_that_can_t_be_written_is_said_before_anything_is_measured(monkeypatch, tmp_path, small):
    monkeypatch.setattr(blocks, "run", lambda *_: pytest.fail("it began"))
    (tmp_path / "file").touch()
    result = bench(tmp_path / "file" / "block.jsonl")
    assert result.exit_code == 2 and "can't write" in result.stderr

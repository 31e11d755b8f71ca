"""Result files read together: the newest run of a group, and a sentence for all that can't be read."""

import json

from mod_kernels.bench import store
from mod_kernels.report.collect import collect

from . import made


def plain_of(group):
    return next(row.median_ms for row in group.rows if row.provider == "plain-inplace")


def test_the_newest_run_wins_for_each_group_it_has(tmp_path):
    both = made.cell(9.0, 1.0) + made.cell(8.0, 1.0, dtype="bfloat16")
    store.save(made.results("block", made.cell(2.0, 1.0), started="2026-03"), tmp_path / "b.jsonl")
    store.save(made.results("block", both, started="2026-02"), tmp_path / "a.jsonl")
    (machine,) = collect([tmp_path]).machines
    groups = machine.suites["block"]
    assert [(group.first.dtype, plain_of(group)) for group in groups] == [("bfloat16", 8.0), ("float32", 2.0)]
    assert [group.run.started for group in groups] == ["2026-02", "2026-03"]


def test_batch_sizes_of_the_papers_table_may_come_of_several_runs(tmp_path):
    def run(started, *batches):
        rows = [made.row("fused", name="resnet50_mod", kind="paper", batch=batch) for batch in batches]
        store.save(made.results("table", rows, started=started), tmp_path / "table.jsonl")

    run("2026-02", 1, 32)
    run("2026-03", 8, 1)
    (machine,) = collect([tmp_path]).machines
    found = [(group.first.batch, group.run.started) for group in machine.suites["table"]]
    assert found == [(1, "2026-03"), (8, "2026-03"), (32, "2026-02")]


def test_machines_are_kept_apart_also_in_one_file(tmp_path):
    path = tmp_path / "block.jsonl"
    for machine in (made.MACHINE, made.OTHER_MACHINE):
        store.save(made.results("block", made.cell(2.0, 1.0), machine["cpu"], machine), path)
    found = collect([path])
    assert [machine.folder for machine in found.machines] == ["another-2c-avx2-l1d32k", "made-up-2c-avx2-l1d32k"]
    (problem,) = found.problems
    assert "mixes 2 machines" in problem


def test_of_a_file_cut_in_the_middle_the_rows_before_it_are_there(tmp_path):
    path = tmp_path / "block.jsonl"
    store.save(made.results("block", made.cell(2.0, 1.0)), path)
    text = path.read_text()
    path.write_text(text[: text.index('"provider": "cpu"') + 5])
    found = collect([path])
    assert [row.provider for row in found.machines[0].groups[0].rows] == [
        "plain-clone",
        "plain-cat",
        "plain-inplace",
    ]
    assert "line 5 is cut off" in found.problems[0]


def test_another_schema_is_said_and_the_rest_is_read(tmp_path):
    store.save(made.results("block", made.cell(2.0, 1.0)), tmp_path / "block.jsonl")
    (tmp_path / "old.jsonl").write_text(json.dumps({"schema": 1, "rows": []}) + "\n")
    found = collect([tmp_path])
    assert len(found.machines) == 1
    assert "1 lines of schema 1 left out" in found.problems[0]


def test_what_is_not_there_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    found = collect([tmp_path / "none.jsonl", tmp_path / "empty"])
    assert found.problems == [
        f"{tmp_path}/empty holds no *.jsonl",
        f"{tmp_path}/none.jsonl: No such file or directory",
    ]


def test_impossible_rows_and_runs_without_a_machine_are_left_out(tmp_path):
    rows = [made.row("plain-cat", 1.0), made.row("cpu", -1.0), made.row("cpu", "fast"), made.row("cpu", batch="8")]
    store.save(made.results("block", rows), tmp_path / "block.jsonl")
    unsigned = {key: value for key, value in made.MACHINE.items() if key != "commit"}
    store.save(made.results("ops", rows, machine=unsigned | {"caches": None}), tmp_path / "ops.jsonl")
    found = collect([tmp_path])
    assert [row.provider for row in found.machines[0].groups[0].rows] == ["plain-cat"]
    assert [problem.partition(": ")[2] for problem in found.problems] == [
        "the run of 2026-01-01T00:00:00 says nothing of caches, commit: left out",
        "3 rows with impossible values left out",
    ]

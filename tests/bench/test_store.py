"""Result files: what is written is read, history stays, what was cut off or is foreign takes nothing with it."""

import dataclasses
import json
import os

import pytest

from mod_kernels.bench import machine, store
from mod_kernels.bench.store import Journal, Results, Row

STARTED = "2026-01-02T03:04:05.678901+00:00"
MACHINE = machine.describe()


def row(provider, median=1.0, check="ok", **fields):
    return Row(
        "256x56x56", "bottleneck", 1, 1, "cpu", "float32", "eager", "warm", provider, check, median, **fields
    )


def run(started=STARTED, rows=None, **fields):
    rows = [row("plain-clone", 4.0, q1_ms=3.9, q3_ms=4.1), row("cpu")] if rows is None else rows
    return Results(fields.pop("machine", MACHINE), "mod-kernels bench", rows, started=started, **fields)


def full_run():
    """Something in every field of a run and of a row."""
    filled = row(
        "fused", 2.0, q1_ms=1.5, q3_ms=2.5, samples=40, repeats=3, over_identity_ms=0.25, layout="channels_last"
    )
    filled = dataclasses.replace(
        filled, share=(0.2, 0.1, 0.3), peak_mib=7.5, compile_s=6.0, speedup=(2.0, 1.9, 2.1)
    )
    filled = dataclasses.replace(filled, c=8, k=4, bytes=1000, bandwidth_gbs=12.0, warning="20% are outliers")
    rows = [filled, row("plain-cat", None, "wrong: off"), dataclasses.replace(row("cpu"), threads=None)]
    return run(
        rows=rows,
        bandwidth_gbs={"1": 12.5},
        notes=["a note\nof two lines, \u2028 and more"],
        memory={"net N=1 plain": [(0.0, 1.0), (0.5, 2.0)]},
        networks={"net": {"parameters": 12, "paper": None}},
        interrupted=True,
        suite="network-train",
        finished=["a cell", "another"],
    )


def test_a_run_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "block.jsonl"
    store.save(full_run(), path)
    assert store.load(path) == full_run()
    defaults = {one.name: one.default for one in dataclasses.fields(Row)}
    assert all(getattr(full_run().rows[0], name) != default for name, default in defaults.items())


def test_what_a_row_does_not_say_is_not_written(tmp_path):
    store.save(run(rows=[row("cpu")]), tmp_path / "a.jsonl")
    (line,) = (line for line in records(tmp_path / "a.jsonl") if line["record"] == "row")
    required = [one.name for one in dataclasses.fields(Row) if one.default is dataclasses.MISSING]
    assert set(line) == {"schema", "run", "record", "median_ms", *required}


def test_a_field_of_a_later_version_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    path.write_text(path.read_text().replace('"median_ms"', '"later": 1, "median_ms"'))
    assert store.load(path) == run()


def test_a_file_keeps_its_history(tmp_path):
    path = tmp_path / "a.jsonl"
    older, newer = run(), run("2026-02-02T00:00:00+00:00", [row("cpu", 0.5)])
    store.save(older, path)
    before = path.read_bytes()
    store.save(newer, path)
    assert path.read_bytes().startswith(before)
    assert store.read(path) == store.Contents([older, newer], [])
    assert store.load(path) == newer


def test_a_file_cut_anywhere_in_its_last_two_lines_keeps_what_is_before(tmp_path):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["record"] for line in lines] == ["run", "row", "row", "end"]
    ends = [len(b"".join(lines[:count])) - 1 for count in range(1, 5)]  # of each line, before its newline
    for size in range(ends[1] + 1, len(whole)):
        path.write_bytes(whole[:size])
        contents = store.read(path)
        complete = sum(size >= end for end in ends)
        (read,) = contents.runs
        assert read.rows == run().rows[: complete - 1]
        assert read.interrupted == (complete < 4)
        # Between two lines there is no broken line to name: that the run's end is missing says it.
        inside = size not in ends and size - 1 not in ends
        expected = [f"{path} line {complete + 1} is cut off or no record: left out"] if inside else []
        assert contents.problems == expected


@pytest.mark.parametrize("end", [0, 1, 50])
def test_a_file_cut_in_its_first_line_holds_no_run(tmp_path, end):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    first, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(first[:end] + b"\n" + rest)
    contents = store.read(path)
    assert contents.runs == []
    assert contents.problems[-1] == f"{path}: 3 lines belong to no run in it: left out"
    with pytest.raises(ValueError, match="3 lines belong to no run"):
        store.load(path)


def test_an_empty_file_holds_no_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.touch()
    assert store.read(path) == store.Contents()
    with pytest.raises(ValueError, match="holds no run"):
        store.load(path)


def test_lines_of_another_schema_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    path.write_text(path.read_text() + path.read_text().replace('"schema": 2', '"schema": 3'))
    contents = store.read(path)
    assert contents.runs == [run()]
    assert contents.problems == [
        f"{path}: 4 lines of schema 3 left out, this version reads 2 (benchmarks/SCHEMA.md)"
    ]


@pytest.mark.parametrize("line", ["[1, 2]", "7", '"schema"', "null", "{}", "not JSON", "\x00\xff"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    path.write_text(path.read_text() + line + "\n", encoding="latin-1")
    assert store.read(path) == store.Contents([run()], [f"{path} line 5 is cut off or no record: left out"])


def test_a_file_of_no_records_is_one_problem(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"rows": [1, 2, 3]}, indent=1))
    (problem,) = store.read(path).problems
    assert problem == f"{path}: 7 lines are cut off or no records, the first is line 1: left out"


@pytest.mark.parametrize(
    "changed",
    [
        {"record": "rwo"},
        {"record": None},
        {"record": "row", "name": "x"},
        {"run": []},
        {"record": "memory", "points": 1},
    ],
)
def test_a_record_that_is_none_of_ours_is_named(tmp_path, changed):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    line = {"schema": 2, "run": STARTED, "record": "note", "key": "it"} | changed
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    contents = store.read(path)
    assert contents.runs == [run()]
    (problem,) = contents.problems
    assert problem.startswith(f"{path} line 5 is no record of schema 2 (")


def test_a_machine_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    store.save(run(machine="mine"), path)
    assert "machine must be an object, got 'mine'" in store.read(path).problems[0]


def test_two_machines_in_a_file_are_named_and_not_loaded(tmp_path):
    path = tmp_path / "a.jsonl"
    here = MACHINE | {"caches": {"L1 Data": "48K"}}
    store.save(run(machine=here | {"gpu": None, "cpu": "one", "cores": 2, "isa": "X"}), path)
    store.save(run("later", machine=here | {"gpu": "G", "cpu": "other", "cores": 8, "isa": "Y"}), path)
    contents = store.read(path)
    assert contents.machines == [(None, "one", 2, "X", "48K"), ("G", "other", 8, "Y", "48K")]
    assert contents.problems == [f"{path} mixes 2 machines: one 2 X 48K; G other 8 Y 48K"]
    with pytest.raises(ValueError, match="mixes 2 machines"):
        store.load(path)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_journal_writes_what_is_new_and_only_that(tmp_path):
    path, results = tmp_path / "a.jsonl", run(rows=[row("plain-clone")])
    journal = Journal(path, results)
    assert [line["record"] for line in records(path)] == ["run", "row"]  # before it is closed
    results.rows.append(row("cpu"))
    results.finished.append("a cell")
    results.networks["net"] = {"parameters": 1}
    journal.write()
    journal.write()
    assert [line["record"] for line in records(path)[2:]] == ["row", "network", "cell"]
    results.networks["net"]["choices"] = ["more"]
    journal.close()
    assert [line["record"] for line in records(path)[5:]] == ["network", "end"]
    assert store.load(path) == results


def test_a_run_whose_end_is_missing_reads_as_interrupted(tmp_path):
    path, results = tmp_path / "a.jsonl", run()
    journal = Journal(path, results)
    assert store.load(path).interrupted
    journal.close()
    assert not store.load(path).interrupted
    resumed = Journal(path, results, resumed=True)
    assert store.load(path).interrupted
    resumed.close()
    assert store.load(path) == results


def test_a_resumed_run_writes_nothing_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    store.save(full_run(), path)
    resumed = store.load(path)
    resumed.interrupted = False
    journal = Journal(path, resumed, resumed=True)
    resumed.rows.append(row("identity", 1.0, "none"))
    journal.close()
    assert [line["record"] for line in records(path)][-4:] == ["end", "resumed", "row", "end"]
    expected = full_run()
    expected.rows.append(row("identity", 1.0, "none"))
    expected.interrupted = False
    assert store.read(path) == store.Contents([expected], [])


def test_a_journal_after_a_cut_line_begins_a_line_of_its_own(tmp_path):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    path.write_bytes(path.read_bytes()[:-5])
    newer = run("2026-02-02T00:00:00+00:00")
    Journal(path, newer).close()
    contents = store.read(path)
    assert [one.started for one in contents.runs] == [STARTED, newer.started]
    assert contents.runs[0].rows == run().rows and contents.runs[1] == newer
    assert contents.problems == [f"{path} line 4 is cut off or no record: left out"]


def test_a_place_that_cant_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "a.jsonl"):
        with pytest.raises(OSError):
            Journal(path, run())
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_without_permission_is_refused_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    store.save(run(), path)
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(PermissionError):
        Journal(path, run("later"))
    assert path.read_bytes() == before

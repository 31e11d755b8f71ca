"""Comparing result files: what counts as a change, what as a regression, and the exit statuses."""

import dataclasses

import pytest
from typer.testing import CliRunner

from mod_kernels import cli
from mod_kernels.bench import store
from mod_kernels.bench.compare import OURS, compare
from mod_kernels.bench.store import Results, Row

HERE, ELSEWHERE = ({"gpu": None, "cpu": name, "cores": 2, "isa": "AVX2"} for name in ("this", "other"))


def row(provider, median=None, check="ok", spread=0.02, name="256x56x56", **fields):
    times = {}
    if median is not None:
        times = {"median_ms": median, "q1_ms": median * (1 - spread), "q3_ms": median * (1 + spread)}
    cell = (name, "bottleneck", 1, 1, "cpu", "float32", "eager", "warm")
    return Row(*cell, provider, check, **times, **fields)


def run(ours, *more, plain=4.0, machine=HERE, suite="block", started="1", **fields):
    rows = [row("plain-clone", plain, **fields), row("cpu-inplace", ours, **fields), *more]
    return Results(machine, "mod-kernels bench", rows, suite=suite, started=started)


def verdicts(*runs, threshold=0.1):
    found = compare(*runs, threshold)
    return [found.verdict(change) for change in found.changes]


def test_what_is_compared_is_the_ratio_to_plain_and_not_the_time():
    """The second machine's day is half as fast for all alike."""
    (change,) = compare([run(1.0)], [run(2.0, plain=8.0)], 0.1).changes
    assert (change.ratio, change.times, change.significant) == (1.0, 2.0, False)


@pytest.mark.parametrize(
    ("ours", "verdict"), [(1.0, ""), (1.03, ""), (1.09, "slower"), (1.2, "regression"), (0.8, "faster")]
)
def test_a_change_is_judged_by_its_quartiles_and_the_threshold(ours, verdict):
    assert verdicts([run(1.0)], [run(ours)]) == [verdict]


def test_quartiles_that_overlap_are_no_regression_however_large_the_change():
    assert verdicts([run(1.0, spread=0.2)], [run(1.5, spread=0.2)]) == [""]
    assert verdicts([run(1.0, spread=0.02)], [run(1.5, spread=0.02)]) == ["regression"]


def test_the_interval_is_of_the_quartiles_furthest_apart():
    (change,) = compare([run(1.0, spread=0.1)], [run(1.0, spread=0.1)], 0.1).changes
    assert dataclasses.astuple(change.before) == pytest.approx((4.0, 3.6 / 1.1, 4.4 / 0.9))


def test_the_threshold_is_the_callers():
    assert verdicts([run(1.0)], [run(1.2)], threshold=0.3) == ["slower"]
    assert verdicts([run(1.0)], [run(1.09)], threshold=0.05) == ["regression"]


def test_plain_is_the_fastest_right_form_of_the_same_run():
    wrong, slow = row("plain-cat", None, "wrong: off"), row("plain-inplace", 5.0)
    older = run(1.0, row("plain-inplace", 2.0), started="0")
    (change,) = compare([older, run(1.0, wrong, slow)], [run(1.0, row("plain-inplace", 2.0))], 0.1).changes
    assert (change.before.value, change.after.value) == (4.0, 2.0)


def test_of_each_provider_the_newest_counts_though_it_be_of_an_older_run():
    first = [run(9.0, row("cpu", 3.0)), run(1.0, started="2")]
    found = compare(first, [run(1.0, row("cpu", 3.0))], 0.1)
    assert {change.row.provider: change.before.value for change in found.changes} == {
        "cpu": pytest.approx(4 / 3),
        "cpu-inplace": 4.0,
    }
    assert found.regressions == []


@pytest.mark.parametrize("check", ["wrong: off", "left out: not served"])
def test_what_was_right_and_is_not_is_lost(check):
    found = compare([run(1.0, row("cpu", 2.0))], [run(1.0, row("cpu", None, check))], 0.1)
    assert [(one.row.provider, one.lost) for one in found.regressions] == [("cpu", check)]
    assert len(found.changes) == 1


def test_what_a_cell_no_longer_has_is_lost_and_a_cell_that_is_not_there_is_not():
    other = [row("plain-clone", 4.0, name="512x28x28"), row("cpu", 1.0, name="512x28x28")]
    found = compare([run(1.0, row("cpu", 2.0), *other)], [run(1.0)], 0.1)
    assert [(one.row.name, one.row.provider, one.lost) for one in found.regressions] == [
        ("256x56x56", "cpu", "missing")
    ]
    assert found.notes == ["cells of the first file that the second does not have: 1"]


def test_what_was_wrong_before_is_not_lost():
    assert compare([run(1.0, row("cpu", None, "wrong: off"))], [run(1.0)], 0.1).regressions == []


def test_plain_forms_and_the_compiler_are_not_judged():
    found = compare([run(1.0, row("compile", 1.0))], [run(1.0, row("compile", 9.0), plain=4.0)], 0.1)
    assert [change.row.provider for change in found.changes] == ["cpu-inplace"]
    assert {"cpu", "cpu-inplace", "cpu-inplace-fed", "triton", "fused", "optimized"} <= OURS


def test_cells_of_different_suites_are_not_compared():
    found = compare([run(1.0)], [run(9.0, suite="scaling")], 0.1)
    assert (found.changes, found.lost) == ([], [])


def test_different_machines_compare_ratios_only():
    found = compare([run(1.0)], [run(2.0, machine=ELSEWHERE)], 0.1)
    (change,) = found.changes
    assert (change.times, change.ratio) == (None, 0.5)
    assert found.notes == ["the two files are of different machines: only the ratios to plain are compared"]


def test_of_a_file_that_mixes_machines_the_newest_runs_is_taken():
    found = compare([run(9.0, machine=ELSEWHERE), run(1.0)], [run(1.0)], 0.1)
    assert found.changes[0].ratio == 1.0
    assert found.notes == ["of the first file only the runs on this 2 AVX2; runs on others left out: 1"]


def test_a_time_without_plain_or_quartiles_is_not_judged():
    bare = dataclasses.replace(row("cpu", 1.0), q1_ms=None)
    found = compare([run(1.0, bare)], [run(1.0, bare)], 0.1)
    assert len(found.changes) == 1
    assert found.notes == ["times without a plain form's or without quartiles, not compared: 1"]


def test_the_summary_counts():
    first = run(1.0, row("cpu", 2.0), row("cpu-inplace-fed", 1.0))
    second = run(1.5, row("cpu", 2.0), row("cpu-inplace-fed", None, "wrong: off"))
    assert compare([first], [second], 0.1).summary() == (
        "cells compared: 1, ratios: 2 (median 0.833, 50% agree within 10%); significant changes: 1, regressions: 2"
    )


@pytest.fixture
def compared(tmp_path):
    """`mod-kernels compare` of two files with these runs."""

    def invoke(first, second, *options):
        for name, runs in (("a", first), ("b", second)):
            for one in runs:
                store.save(one, tmp_path / f"{name}.jsonl")
        return CliRunner().invoke(
            cli.app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *options]
        )

    return invoke


def test_a_regression_is_exit_status_1_and_named(compared):
    result = compared([run(1.0, row("cpu", 1.0))], [run(2.0, row("cpu", None, "wrong: off"))])
    assert result.exit_code == 1
    where = "regression: bottleneck 256x56x56 N=1, cpu, 1 thread, float32, nchw, eager, warm"
    assert result.stdout.splitlines()[-3:-1] == [
        f"{where}, cpu-inplace: speed-up 4.00, now 2.00",
        f"{where}, cpu: wrong: off",
    ]
    assert "4.00 (3.84 to 4.16)" in result.stdout and "REGRESSION" in result.stdout and "LOST" in result.stdout


def test_no_regression_is_exit_status_0(compared):
    result = compared([run(1.0)], [run(1.05)])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].endswith("significant changes: 0, regressions: 0")
    assert compared([run(1.0)], [run(1.2)], "--threshold", "0.5").exit_code == 0


def test_a_suite_can_be_chosen(compared):
    first, second = [run(1.0), run(1.0, suite="ops", started="2")], [run(9.0), run(1.0, suite="ops", started="2")]
    assert compared(first, second).exit_code == 1
    assert compared(first, second, "--suite", "ops").exit_code == 0
    result = compared(first, second, "--suite", "opps")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("mod-kernels: suite must be one of block, ops for ")


@pytest.mark.parametrize("threshold", ["0", "1", "-0.1", "nan"])
def test_a_threshold_that_is_no_share_is_refused(compared, threshold):
    result = compared([run(1.0)], [run(1.0)], "--threshold", threshold)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"mod-kernels: threshold must be between 0 and 1, got {float(threshold):g}\n"


def test_files_with_nothing_to_compare_are_refused_in_one_line(compared, tmp_path):
    result = compared([run(1.0)], [run(1.0, suite="ops")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "b.jsonl have nothing to compare; " in result.stderr
    absent = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "absent")])
    assert (absent.exit_code, absent.stdout) == (2, "")
    assert absent.stderr == f"mod-kernels: {tmp_path / 'absent'}: No such file or directory\n"
    (tmp_path / "b.jsonl").write_text('{"rows":\n []}')
    old = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert old.exit_code == 2 and old.stderr.count("\n") == 1


def test_what_cant_be_read_of_a_file_is_said(compared, tmp_path):
    (tmp_path / "a.jsonl").write_text("cut off\n")
    result = compared([run(1.0)], [run(1.0)])
    assert result.exit_code == 0
    assert "a.jsonl line 1 is cut off or no record: left out" in result.stdout

"""The suite of fresh processes: what each step leaves in a row, and what a start that fails does."""

import dataclasses

import pytest

from mod_kernels.backends import triton
from mod_kernels.bench import cold_start
from mod_kernels.bench.store import Results

FIRST, COMPILE, TRITON = cold_start.CELLS


def saying(cell, script, **fields):
    return dataclasses.replace(cell, script=script, **fields)


def test_a_start_is_measured_in_a_process_of_its_own():
    first = saying(FIRST, FIRST.script, repeats=1)
    rows = {row.name: row for row in cold_start.run_cell(first)}
    assert [row.check for row in rows.values()] == ["none", "none", "ok", "ok"]
    assert rows["import torch"].median_ms > rows["second call"].median_ms > 0
    assert {(row.kind, row.provider, row.threads) for row in rows.values()} == {("start", "process", 1)}


def test_a_wrong_output_gets_no_time():
    needle = "y = mod_kernels.functional.mod_block(x, spec)"
    assert needle in FIRST.script
    wrong = saying(FIRST, FIRST.script.replace(needle, needle + " + 1"), repeats=1)
    for row in cold_start.run_cell(wrong):
        assert row.check.startswith("wrong: exit status 1: ") and row.median_ms is None


def test_repeats_are_the_samples_of_a_row_and_one_start_is_not_counted(monkeypatch):
    told = iter([[9.0], [0.002], [0.001], [0.003]])
    monkeypatch.setattr(cold_start, "REPEATS", 3)
    monkeypatch.setattr(cold_start, "seconds_of", lambda script: next(told))
    (row,) = cold_start.run_cell(dataclasses.replace(COMPILE, repeats=None))
    assert (row.median_ms, row.samples, row.check) == (pytest.approx(2.0), 3, "ok")


def test_compilers_find_nothing_and_run_on_one_thread():
    script = """
import json, os
empty = [os.listdir(os.environ[name]) == [] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
print(json.dumps([*empty, os.environ["OMP_NUM_THREADS"]]))
"""
    assert cold_start.seconds_of(script) == [True, True, "1"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise ValueError('no')", "exit status 1: ValueError: no"),
        ("import sys; sys.exit(3)", "exit status 3: nothing was said"),
        ("while True: pass", "took more than 0.5 s"),
    ],
)
def test_a_start_that_fails_says_why(monkeypatch, script, said):
    monkeypatch.setattr(cold_start, "TIMEOUT_S", 0.5 if "while" in script else 60)
    (row,) = cold_start.run_cell(saying(COMPILE, script))
    assert row.check == f"wrong: {said}" and row.median_ms is None


def test_without_a_compiler_its_step_is_left_out(monkeypatch):
    monkeypatch.setattr(triton, "compiler_problem", lambda: "no Triton here")
    (row,) = cold_start.run_cell(TRITON)
    assert row.check == "left out: no Triton here" and row.median_ms is None


def test_a_finished_cell_is_skipped(monkeypatch):
    monkeypatch.setattr(cold_start, "seconds_of", lambda script: [0.001] * 4)
    monkeypatch.setattr(triton, "compiler_problem", lambda: "")
    results, labels = Results({}, ""), []
    for _ in range(2):
        cold_start.run(results, lambda label, *_: labels.append(label))
    assert labels == results.finished == ["start", "torch.compile", "triton"] and len(results.rows) == 6

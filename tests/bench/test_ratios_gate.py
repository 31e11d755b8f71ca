"""The regression gate on ratios (benchmarks/test_ratios.py), fed times that are made up."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mod_kernels import backends
from mod_kernels.backends.native import CPU
from mod_kernels.bench import store
from mod_kernels.bench.shapes import Shape
from mod_kernels.bench.store import Results, Row

needs_engine = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))


@pytest.fixture
def gate_file(monkeypatch, tmp_path):
    """benchmarks/test_ratios.py on a machine that has the engine and nothing committed."""
    path = Path(__file__).parents[2] / "benchmarks" / "test_ratios.py"
    spec = importlib.util.spec_from_file_location("benchmarks_test_ratios", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "this_folder", lambda: tmp_path)
    monkeypatch.setattr(backends, "engines", lambda: {module.ENGINE: {"status": "ok"}})
    return module


def row(provider, median, check="ok"):
    return Row("512x28x28", "bottleneck", 8, 1, "cpu", "float32", "eager", "warm", provider, check, median)


def rows(ours=1.0, clone=4.0, inplace=2.0):
    return [row("plain-clone", clone), row("plain-inplace", inplace), row("cpu", ours), row("cpu-inplace", ours)]


def commit(folder, ours, started="1"):
    store.save(Results({}, "", rows(ours), started=started), folder / "block.jsonl")


def passes(gate_file, *attempts, number=0):
    """Whether the gate opens for the rows of each attempt; and how many it took."""
    asked = []

    def measured(suite, shape, batch, attempt):
        asked.append(attempt)
        return attempts[attempt][0].cell, {one.provider: one for one in attempts[attempt]}

    gate_file.measured = measured
    try:
        gate_file.test_ratio(gate_file.GATES[number])
    except pytest.fail.Exception as failed:
        return False, str(failed)
    return True, len(asked)


def test_without_committed_results_ours_may_not_be_slower_than_plain(gate_file):
    assert passes(gate_file, rows(1.99)) == (True, 1)
    slow = rows(2.5)
    assert passes(gate_file, slow, slow) == (
        False,
        "; again: ".join(
            ["0.80 times as fast as plain, must be at least 1.00: nothing is committed for this kind of machine"]
            * 2
        ),
    )


def test_a_share_of_the_committed_ratio_must_be_kept(gate_file, tmp_path):
    commit(tmp_path, ours=0.5)
    assert passes(gate_file, rows(0.7)) == (True, 1)
    slow = rows(0.72)  # faster than plain, and not as much faster as it was
    opened, said = passes(gate_file, slow, slow)
    assert not opened
    assert said.startswith(
        "2.78 times as fast as plain, must be at least 2.80: 0.7 of the committed 4.00; again: "
    )


def test_times_themselves_are_in_no_gate(gate_file, tmp_path):
    commit(tmp_path, ours=0.5)
    assert passes(gate_file, rows(50.0, clone=400.0, inplace=200.0)) == (True, 1)


def test_the_newest_committed_run_counts(gate_file, tmp_path):
    commit(tmp_path, ours=0.1, started="1")
    commit(tmp_path, ours=1.0, started="2")
    assert passes(gate_file, rows(1.4)) == (True, 1)


def test_what_falls_short_is_measured_once_more(gate_file):
    assert passes(gate_file, rows(3.0), rows(1.0)) == (True, 2)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (row("cpu-inplace", None, "wrong: off"), "cpu-inplace: wrong: off"),
        (row("cpu-inplace", None, "left out: not served"), "cpu-inplace: left out: not served"),
        (row("floor", 1.0, "none"), "cpu-inplace: not measured"),
    ],
)
def test_no_time_of_ours_shuts_the_gate(gate_file, ours, said):
    found = [row("plain-clone", 4.0), ours]
    assert passes(gate_file, found, found) == (False, f"{said}; again: {said}")


def test_no_plain_time_shuts_the_gate(gate_file):
    found = [row("cpu-inplace", 1.0)]
    opened, said = passes(gate_file, found, found)
    assert not opened and said.startswith("none of plain-clone, plain-cat, plain-inplace has a time; again: ")


def test_what_keeps_x_is_held_to_the_plain_forms_that_keep_it(gate_file):
    assert gate_file.GATES[1].ours == "cpu"
    assert passes(gate_file, rows(3.0), number=1) == (True, 1)
    assert not passes(gate_file, rows(5.0), rows(5.0), number=1)[0]


def test_the_gates_are_in_place_out_of_place_and_in_training(gate_file):
    assert {(gate.suite, gate.ours) for gate in gate_file.GATES} == {
        ("block", "cpu-inplace"),
        ("block", "cpu"),
        ("block-train", "cpu"),
    }
    assert len(set(map(str, gate_file.GATES))) == len(gate_file.GATES)


@needs_engine
@pytest.mark.parametrize("suite", ["block", "block-train"])
def test_the_suites_measure_what_the_gates_ask_for(gate_file, suite):
    shape = Shape("bottleneck", 64, 7, 7)
    cell, found = gate_file.measured(suite, shape, 1 if suite == "block" else 3, 0)
    assert "compile" not in found or found["compile"].check == "left out: time"
    for gate in (gate for gate in gate_file.GATES if gate.suite == suite):
        assert found[gate.ours].cell == cell and found[gate.ours].check == "ok"
        assert any(found[name].timed for name in gate.plain)

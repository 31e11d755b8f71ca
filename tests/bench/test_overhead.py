"""The suite of what a call costs: every op in both modes, checked; what is not right gets no time."""

import pytest
import torch

from mod_kernels import functional
from mod_kernels.backends.native import CPU
from mod_kernels.bench import overhead
from mod_kernels.bench.store import Results

pytestmark = [
    pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems)),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(overhead, "SAMPLES", 2)
    real = overhead.minima
    monkeypatch.setattr(overhead, "minima", lambda calls: real(calls, runs=2, count=3))


def test_every_op_is_timed_beside_the_one_it_calls_and_a_yardstick():
    results, labels = Results({}, ""), []
    for _ in range(2):  # the second time there is nothing to do
        overhead.run(results, lambda label, *_: labels.append(label))
    assert len(labels) == len(set(labels)) == len(results.finished)
    found = {(row.name, row.mode, row.provider): row for row in results.rows}
    ops = [name for name in functional.__all__ if name not in ("MoDSpec", "explain")]
    expected = {(op, "eager", provider) for op in ops for provider in ("public", "op", "torch.add")}
    expected |= {
        (op, "train", provider) for op in ops if "block" not in op for provider in ("public", "torch.add")
    }
    assert set(found) == expected and len(results.rows) == len(expected)
    assert all(row.median_ms > 0 and (row.kind, row.threads) == ("op", 1) for row in results.rows)
    assert {row.check for row in results.rows} == {"ok", "none"}


@pytest.mark.parametrize("op", [op for op in functional._CALLS if "block" not in op])
def test_a_call_in_training_leaves_a_history_and_one_without_gradients_none(op):
    for mode, expected in (("train", True), ("eager", False)):
        with torch.inference_mode(mode == "eager"):
            found, problems = overhead._providers(overhead.Cell(op, mode, 1), "cpu")
            repeated = found["public"]
            out = repeated.call(repeated.x.detach() if repeated.aliases else repeated.x)
        first = out[0] if isinstance(out, tuple) else out
        assert first.requires_grad == expected and not problems


def test_writing_again_and_again_leaves_x_without_a_history():
    found, _ = overhead._providers(overhead.Cell("fuse_channels_", "train", 1), "cpu")
    found["public"].seconds(3)
    assert not found["public"].x.requires_grad


@pytest.mark.parametrize("op", ["gather_channels", "mod_block_"])
def test_a_wrong_op_gets_no_time(monkeypatch, op):
    real = getattr(functional, op)

    def changed(x, *arguments):
        return real(x, *arguments).add_(1)

    changed.__name__ = op
    monkeypatch.setattr(functional, op, changed)
    rows = {row.provider: row for row in overhead.run_cell(overhead.Cell(op, "eager", 1), "cpu")}
    assert rows["public"].check.startswith("wrong") and rows["public"].median_ms is None
    assert rows["torch.add"].median_ms > 0


def test_a_raw_op_that_differs_gets_no_time(monkeypatch):
    real = overhead._raw
    monkeypatch.setattr(overhead, "_raw", lambda case: lambda x: real(case)(x) + 1)
    rows = {row.provider: row for row in overhead.run_cell(overhead.Cell("gather_channels", "eager", 1), "cpu")}
    assert rows["op"].check == "wrong: another output than the public op's" and rows["op"].median_ms is None
    assert rows["public"].median_ms > 0


def test_an_op_that_is_not_served_is_left_out(monkeypatch):
    monkeypatch.setattr(overhead, "ENGINES", {"cpu": "cuda"})
    rows = {row.provider: row for row in overhead.run_cell(overhead.Cell("mod_block", "eager", 1), "cpu")}
    assert rows["public"].check == rows["op"].check == "left out: the CUDA kernels run on cuda, not on cpu"


def test_the_least_of_the_runs_is_what_counts():
    clock = iter([3.0, 1.0, 2.0, 5.0])  # a, b, a, b

    class Counted(overhead.Repeated):
        def seconds(self, count):
            return next(clock)

    calls = {name: Counted(None, None) for name in "ab"}
    assert overhead.minima(calls) == {"a": 2.0, "b": 1.0}

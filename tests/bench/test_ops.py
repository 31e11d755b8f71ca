"""The suite of the ops: each is checked before it is timed, and a cell that is done is not measured again."""

import dataclasses

import pytest
import torch

from mod_kernels import backends, functional
from mod_kernels.backends.native import CPU
from mod_kernels.bench import blocks, ops
from mod_kernels.bench.shapes import Shape
from mod_kernels.bench.store import Results

SHAPE = Shape("bottleneck", 128, 5, 3)
WITHOUT_LIBRARY = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(ops, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(blocks, "bandwidth_gbs", lambda device: 10.0)


def measured(results=None, dtype=torch.float32, on_cell=lambda *_: None):
    results = results or Results({}, "")
    ops.run((2,), (1,), results, on_cell, dtype=dtype, quick=True, shapes=(SHAPE,))
    return {row.provider: row for row in results.rows}


def test_every_op_is_a_case():
    names = {case.op for case in ops.cases(SHAPE, 2, "cpu", torch.float32)}
    assert names == {name for name in functional.__all__ if name not in ("MoDSpec", "explain")} - {
        "mod_block",
        "mod_block_",
    }


@WITHOUT_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_provider_is_right_in_every_dtype(dtype):
    rows = measured(dtype=dtype)
    assert {row.check for row in rows.values()} == {"ok"}
    for name in ("select_channels", "select_channels-fed", "gather_channels", "fuse_channels", "fuse_channels_"):
        assert rows[f"{name}:plain"].median_ms > 0 and rows[f"{name}:cpu"].median_ms > 0
    row = rows["add_relu_pool_:cpu"]
    assert (row.kind, row.name, row.batch, row.threads) == ("op", "128x5x3", 2, 1)
    assert row.limit_ms == pytest.approx(row.bytes / 10e6)


def test_bytes_are_what_cannot_be_avoided():
    plane, k, found = 5 * 3 * 4, 2, {case.name: case.bytes for case in ops.cases(SHAPE, 1, "cpu", torch.float32)}
    weights, selection = 2 * 128 * 8 * 4, k * (4 + 8)
    assert found["select_channels"] == 128 * plane + weights + selection
    assert found["select_channels-fed"] == 128 * 4 + weights + selection
    assert found["gather_channels"] == 2 * k * plane + k * 8
    assert found["fuse_channels"] == (2 * 128 + k) * plane + k * 4
    assert found["fuse_channels_"] == 3 * k * plane + k * 4
    assert found["add_relu_pool"] == found["add_relu_pool_"] == 3 * 128 * plane + 128 * 4


def change(op, out):
    """Something wrong with an output, of another kind for each op."""
    if op == "select_channels":
        return out[0] * 0.9, out[1]
    if op.startswith("add_relu_pool"):
        return out[0], out[1] * 1.0001
    return out.mul_(1.0001)


@pytest.mark.parametrize("case", ops.cases(SHAPE, 2, "cpu", torch.float32), ids=lambda case: case.name)
def test_a_wrong_output_is_found(case):
    for run in case.plain.values():
        assert ops.wrong(case, run, ours=False) == ""
        assert ops.wrong(case, lambda x, run=run: change(case.op, run(x)), ours=False) != ""


def test_a_wrong_place_to_write_is_found():
    found = {case.name: case for case in ops.cases(SHAPE, 2, "cpu", torch.float32)}
    out_of_place, in_place = found["fuse_channels"], found["fuse_channels_"]
    assert ops.wrong(out_of_place, in_place.plain["plain"], ours=True) == "wrote into its input"
    assert ops.wrong(in_place, out_of_place.plain["plain"], ours=True).startswith("did not return")


def test_a_wrong_provider_gets_no_time_and_the_others_do(monkeypatch):
    real = ops.cases

    def with_one_wrong(*arguments):
        for case in real(*arguments):
            if case.name == "gather_channels":
                case = dataclasses.replace(case, plain={"plain": lambda x: x[:, :2] + 1})
            yield case

    monkeypatch.setattr(ops, "cases", with_one_wrong)
    rows = measured()
    assert rows["gather_channels:plain"].check == "wrong: gathered other values"
    assert rows["gather_channels:plain"].median_ms is None
    assert rows["fuse_channels:plain"].median_ms > 0


def test_an_engine_that_is_not_there_is_left_out(monkeypatch):
    monkeypatch.setattr(ops.providers, "ENGINES", {"cpu": "cuda"})
    rows = measured()
    assert rows["fuse_channels:cuda"].check.startswith("left out: the CUDA kernels run on cuda")
    assert rows["fuse_channels:plain"].check == "ok" and backends.requested() == "auto"


def test_a_finished_cell_is_skipped():
    labels, results = [], Results({}, "")
    for _ in range(2):
        measured(results, on_cell=lambda label, *_: labels.append(label))
    assert labels == results.finished == ["128x5x3 N=2 1 thread(s)"]

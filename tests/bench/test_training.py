"""The training benchmark: who gets a time, what a step computes, and the memory it holds."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mod_kernels import cli
from mod_kernels.backends.native import CPU
from mod_kernels.bench import blocks, memory, network_training, store, training
from mod_kernels.bench.shapes import Shape
from mod_kernels.spec import CONV_KINDS

needs_engine = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
SHAPE = Shape("bottleneck", 512, 5, 5)
CELL = blocks.Cell(SHAPE, 3, 1, mode="train")
PLAN = blocks.Plan((SHAPE,), (3,), (1,), rounds=2)


def by_provider(rows):
    return {row.provider: row for row in rows}


@needs_engine
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kind", CONV_KINDS)
def test_a_cell(kind, layout, one_thread):
    shape = replace(SHAPE, kind=kind)
    rows = by_provider(training.run_cell(replace(CELL, shape=shape), replace(PLAN, layout=layout), 10.0))
    for name in ("plain-clone", "plain-cat", "cpu", "big-pass", "floor"):
        assert rows[name].median_ms > 0, rows[name].check
    # Autograd itself refuses it: a fact about the plain form that the table shows.
    assert rows["plain-inplace"].check.startswith("left out: ") and rows["plain-inplace"].median_ms is None
    assert all(row.mode == "train" and row.layout == layout for row in rows.values())


@needs_engine
def test_plain_in_training_runs_none_of_our_kernels(monkeypatch, one_thread):
    """Nor does the block that gradients are compared with: the engine is for the provider of that name alone."""
    ran = []
    for name, op in CPU.ops.items():
        monkeypatch.setitem(CPU.ops, name, lambda *given, name=name, op=op: ran.append(name) or op(*given))
    block = training.make_block(SHAPE, torch.float32)
    x, dy = torch.randn(2, 2, SHAPE.channels, SHAPE.height, SHAPE.width)
    for ending in ("clone", "cat"):
        training.Step(training.PlainBlock(block, ending), x, dy).run()
    assert not ran
    training.Step(block, x, dy).run()
    assert "input_gradient" in ran and len(ran) > 3


@needs_engine
def test_a_wrong_gradient_gets_no_time(monkeypatch, one_thread):
    """Half of the gathered channels' gradient: small beside dy, and not small enough."""
    op = CPU.ops["input_gradient"]

    def half(dy, dpooled, dgathered, *rest):
        return op(dy, dpooled, dgathered / 2, *rest)

    monkeypatch.setattr(CPU, "ops", CPU.ops | {"input_gradient": half})
    rows = by_provider(training.run_cell(CELL, PLAN, 10.0))
    assert rows["cpu"].check.startswith("wrong: gradient 0 off by") and rows["cpu"].median_ms is None
    assert rows["plain-cat"].check == "ok"


def test_a_step_leaves_x_and_its_leaf_as_they_were():
    x, dy = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)

    class Writes(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    step = training.Step(Writes(), x.clone(), dy)
    (first,) = step.run()
    step.refill()
    (second,) = step.run()
    assert torch.equal(first, 2 * dy) and torch.equal(second, first)


def test_the_memory_of_a_call_is_counted():
    def call():
        a = torch.ones(1 << 20)  # 4 MiB
        b = a + 1
        del a
        return (b * 2).sum()

    line = memory.timeline(call)
    assert line.peak_mib == pytest.approx(8, abs=0.1)
    assert 0 <= min(share for share, _ in line.points) <= max(share for share, _ in line.points) <= 1
    few = memory.timeline(call, points=2)
    assert len(few.points) <= 2 and few.peak_mib == line.peak_mib


@needs_engine
def test_a_network_in_training(one_thread):
    """Every way computes the same gradients, and the fused one holds less."""
    results = store.Results({}, "")
    rows = by_provider(
        network_training.run_cell("resnet50_mod", 4, 1, torch.float32, 160, rounds=2, results=results)
    )
    assert {name: row.check for name, row in rows.items()} == {
        "plain": "ok",
        "plain-cat": "ok",
        "identity": "none",
        "fused": "ok",
    }
    assert rows["fused"].peak_mib < 0.95 * rows["plain"].peak_mib
    assert set(results.memory) == {f"resnet50_mod N=4 {name}" for name in rows}
    # A loss in another module's hands: what is compared is not the network with itself.
    found, expected = (torch.zeros(1), (torch.ones(4),)), (torch.zeros(1), (torch.full((4,), 1.02),))
    assert network_training._check(found, expected, torch.float32).startswith("wrong: gradients off by 2.0e-02")


@pytest.mark.parametrize(
    "options,said",
    [
        (["--train", "--quick"], "--quick does not go with suite block-train"),
        (["--train", "--max-autotune"], "--max-autotune does not go with suite block-train"),
    ],
)
def test_what_does_not_go_with_training(options, said):
    result = CliRunner().invoke(cli.app, ["bench", *options])
    assert result.exit_code == 2 and said in result.stderr


def test_the_command_measures_blocks_in_training(monkeypatch, tmp_path):
    plans = []

    def run(plan, results, on_cell):
        plans.append(plan)
        on_cell(CELL, 0, 1)
        row = store.Row("512x5x5", "bottleneck", 3, 1, "cpu", "float32", "train", "warm", "cpu", "ok", 1.0)
        results.rows += [row, replace(row, provider="plain-cat", median_ms=2.5)]

    monkeypatch.setattr(training, "run", run)
    path = tmp_path / "train.jsonl"
    result = CliRunner().invoke(cli.app, ["bench", "--train", "--threads", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert plans[0].batches == training.BATCHES
    assert "MoD block in training" in result.stdout and "2.50" in result.stdout
    assert [row.mode for row in store.load(path).rows] == ["train", "train"]

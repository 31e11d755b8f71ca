"""The sweep over c, in small: what is measured, shown, refused."""

import pytest
from typer.testing import CliRunner

from mod_kernels import cli, models
from mod_kernels.bench import machine, paper, store, sweep
from mod_kernels.bench.shapes import BOTTLENECK
from mod_kernels.bench.store import SWEEP, SWEEP_BLOCK, Results

from .test_paper_table import SMALL, shown

runner = CliRunner()


def test_the_blocks_of_a_network_are_found():
    assert tuple(sweep.mod_shapes("resnet50_mod", paper.IMAGENET)) == BOTTLENECK
    assert [shape.channels for shape in sweep.mod_shapes("vgg16_bn_mod", paper.CIFAR10)] == [
        64,
        128,
        256,
        512,
        512,
    ]


def test_k_follows_c():
    assert [sweep.ShapeAtC("basic", 128, 4, 4, c).k for c in (2, 64, 256)] == [64, 2, 1]


def test_counts_follow_c():
    found = {c: sweep.describe("resnet50_mod", c, paper.IMAGENET) for c in (2, 64)}
    assert found[64]["parameters"] == sum(one.numel() for one in models.resnet50_mod().parameters())
    assert found[2]["multiply_adds"] > found[64]["multiply_adds"]
    assert found[2]["paper"] == {"top1": 72.51, "gpu_ms": 2.23}
    assert sweep.describe("resnet18_mod", 2, paper.IMAGENET)["paper"] is None


def test_networks_and_blocks_are_measured_at_each_c(monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "data_of", lambda name: SMALL)
    results, labels = Results(machine.describe(), "mod-kernels sweep"), []
    on_cell = lambda *cell: labels.append(cell[1:])  # noqa: E731
    sweep.run("resnet18_mod", (2, 64), (1,), (1,), results, on_cell, rounds=2, block_rounds=2)
    assert labels == [(number, 10) for number in range(10)]
    found = {row.c for row in results.rows if row.kind == SWEEP}
    blocks = {(row.name, row.c) for row in results.rows if row.kind == SWEEP_BLOCK}
    assert found == {2, 64} and len(blocks) == 8
    assert not [row for row in results.rows if row.check.startswith("wrong")]
    store.save(results, tmp_path / "sweep.jsonl")
    text = shown(store.load(tmp_path / "sweep.jsonl"))
    assert text.count("resnet18_mod") == 2 and text.count("64x32x32") == 2
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert [picture.name for picture in plot.plot(tmp_path / "sweep.jsonl")] == ["sweep-n1-threads1.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "resnet50"], "network must be one of resnet18_mod, "),
        (["--c", "0"], "c must be at least 1, got 0\n"),
        (["--batch", "0"], "batch must be at least 1, got 0\n"),
        (["--threads", "0"], "threads must be at least 1, got 0\n"),
    ],
)
def test_a_wrong_argument_is_one_line_on_stderr(arguments, message):
    result = runner.invoke(cli.app, ["sweep", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"mod-kernels: {message}") and result.stderr.count("\n") == 1

"""The paper's figures as data; its table measured in small, shown, refused; wrong outputs get no time."""

import dataclasses

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mod_kernels import cli, models, optimize
from mod_kernels.bench import machine, networks, paper, paper_table, store, table_paper
from mod_kernels.bench.store import Results
from mod_kernels.bench.timing import Timed

SMALL = paper.Data("CIFAR-10", 32, {"stem": "cifar", "num_classes": 10})
runner = CliRunner()


def shown(results):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table_paper.show(results, console)
    return console.export_text()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("name", paper.MOD)
def test_printed_speedups_are_ratios_of_the_printed_times(name, device):
    mod, dense = paper.MOD[name], paper.DENSE[models.PEERS[name][0]]
    above, below, said = (
        getattr(dense, f"{device}_ms"),
        getattr(mod, f"{device}_ms"),
        getattr(mod, f"{device}_speedup"),
    )
    assert (above is None) == (below is None) == (said is None)
    if said is not None:
        half = 0.005  # of the last digit printed
        assert (above - half) / (below + half) - half <= said <= (above + half) / (below - half) + half


def test_every_network_of_the_paper_has_a_builder_and_a_peer():
    assert set(paper.MOD) == {name for name in models.list_models() if not name.startswith("convnext")}
    assert {models.PEERS[name][0] for name in paper.MOD} == set(paper.DENSE)
    assert paper.RESNET50_MOD_AT_C[64] == paper.PrintedAtC(
        paper.MOD["resnet50_mod"].top1, paper.MOD["resnet50_mod"].gpu_ms
    )


@pytest.fixture(scope="module")
def measured():
    """Two networks that share a dense peer; in the place of optimized ones, which take a minute, as they are."""
    results, labels = Results(machine.describe(), "mod-kernels table"), []

    def as_it_is(ways, provider, network, image, judge=lambda output: "none", fuse=True):
        ways.add(provider, lambda: lambda: network(image), judge)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "data_of", lambda name: SMALL)
        patch.setattr(paper_table.Ways, "add_optimized", as_it_is)
        paper_table.run(
            ("resnet18_mod", "resnet26_mod"),
            (1,),
            (1,),
            results,
            lambda *cell: labels.append(cell),
            rounds=2,
        )
    return results, labels


def test_every_way_is_measured_or_says_why_not(measured):
    results, labels = measured
    assert labels == [("resnet18_mod N=1 1 thread(s)", 0, 2), ("resnet26_mod N=1 1 thread(s)", 1, 2)]
    cells = table_paper.by_cell(results.rows)
    assert len(cells) == 2
    for cell in cells.values():
        alike = {"dense-optimized", "optimized", "plain-optimized", "identity-optimized"}
        assert {"dense", "fused", "identity", *alike, *networks.PLAIN_FORMS} == set(cell)
        for provider, row in cell.items():
            assert (row.median_ms is None) == row.check.startswith("left out")
            if row.median_ms is not None and not provider.startswith("dense"):
                assert row.speedup is not None
        assert all(cell[form].check == "ok" for form in networks.PLAIN_FORMS)
    assert results.networks["resnet18_mod"]["dense"] == "resnet18"
    assert results.networks["resnet18"]["parameters"] > results.networks["resnet18_mod"]["parameters"]


def test_it_survives_a_file_and_is_shown(measured, tmp_path):
    results, _ = measured
    store.save(results, tmp_path / "table.jsonl")
    again = store.load(tmp_path / "table.jsonl")
    assert again.networks == results.networks and len(again.rows) == len(results.rows)
    text = shown(again)
    line = next(line for line in text.splitlines() if "resnet18_mod" in line and "│" in line)
    assert "1.60" in line  # the paper's
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    pictures = [picture.name for picture in plot.plot(tmp_path / "table.jsonl")]
    assert pictures == ["table-n1-threads1-speedups.png", "table-n1-threads1.png"]


def test_a_missing_block_is_wrong():
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(1, 1000, generator=generator)
    contribution = torch.randn(1, 1000, generator=generator) * 2e-3
    assert paper_table._judge(expected + contribution * 0.01, expected, contribution) == "ok"
    assert paper_table._judge(expected + contribution / 6, expected, contribution).startswith("wrong: output off")
    assert paper_table._judge(-expected, expected, contribution).startswith("wrong: output off")


def test_a_way_that_is_wrong_or_lacks_something_gets_no_time():
    ways = paper_table.Ways()

    def lacking():
        raise ImportError("it is not installed (/some/where.py)\nand more")

    ways.add("wrong", lambda: lambda: torch.zeros(1), lambda output: "wrong: off")
    ways.add("lacking", lambda: lacking(), may_lack=(ImportError,))
    ways.add("right", lambda: lambda: torch.zeros(1), lambda output: "ok")
    assert list(ways.calls) == ["right"]
    assert ways.checks == {"wrong": "wrong: off", "lacking": "left out: it is not installed", "right": "ok"}
    with pytest.raises(ImportError):
        ways.add("unexpected", lambda: lacking())


def test_speedups_are_over_the_network_run_alike():
    times = {"dense": 4.0, "dense-optimized": 3.0, "plain": 2.0, "optimized": 1.0, "openvino": 1.0}
    timed = {name: Timed(name, None, samples=[value] * 9) for name, value in times.items()}
    found = {name: paper_table._speedup(name, timed) for name in timed}
    assert found["plain"] == (2.0, 2.0, 2.0) and found["optimized"] == (3.0, 3.0, 3.0)
    assert found["dense"] is None and found["dense-optimized"] is None and found["openvino"] is None


def test_optimized_shares_are_of_networks_optimized_alike():
    times = {"identity": 1.0, "plain": 9.0, "fused": 5.0}
    times |= {"identity-optimized": 1.0, "plain-optimized": 3.0, "optimized": 1.5}
    timed = {name: Timed(name, None, samples=[value] * 9) for name, value in times.items()}
    assert paper_table._times("fused", timed)["share"] == (0.5, 0.5, 0.5)
    assert paper_table._times("optimized", timed)["share"] == (0.25, 0.25, 0.25)
    assert "share" not in paper_table._times("plain-optimized", timed)
    del timed["plain-optimized"]
    assert paper_table._times("optimized", timed)["share"] is None


@pytest.mark.parametrize("fuse", [True, False])
def test_plain_networks_are_optimized_with_their_blocks_plain(monkeypatch, fuse):
    monkeypatch.setattr(optimize, "ROUNDS", 2)
    monkeypatch.setattr(optimize, "_compiled_forms", lambda *arguments: {})
    network = networks.build("resnet18_mod", "cpu", torch.float32, **SMALL.options)["plain-cat"]
    image, ways = torch.randn(1, 3, 32, 32), paper_table.Ways()
    with torch.inference_mode():
        expected = network(image)
    ways.add_optimized("way", network, image, lambda output: networks.compare(output, expected, image.dtype), fuse)
    assert ways.checks == {"way": "ok"} and any("norms folded" in line for line in ways.said["way"])
    kinds = {type(module) for module in ways.calls["way"].func.modules()}
    assert (networks.PlainBlock not in kinds) == fuse


def test_the_fastest_plain_form_counts_and_reasons_are_said_once(measured):
    results, _ = measured
    rows = [dataclasses.replace(row, check="left out: no", median_ms=None) for row in results.rows[:1]]
    rows += [dataclasses.replace(rows[0], name="resnet26_mod")]
    text = shown(dataclasses.replace(results, rows=rows))
    assert text.count("left out: no") == 1 and "(resnet18_mod N=1, resnet26_mod N=1)" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "--networks", "resnet50"], "networks must be one of resnet18_mod, "),
        (["table", "--batch", "0"], "batch must be at least 1, got 0\n"),
        (["table", "--threads", "0"], "threads must be at least 1, got 0\n"),
        (["table", "--rounds", "4"], "rounds must be at least 5, got 4\n"),
        (["table", "--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'\n"),
    ],
)
def test_a_wrong_argument_is_one_line_on_stderr(arguments, message):
    result = runner.invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"mod-kernels: {message}") and result.stderr.count("\n") == 1


def test_the_verb_passes_its_options_on(monkeypatch, tmp_path):
    seen = []

    def interrupted(*arguments):
        seen.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(paper_table, "run", interrupted)
    path = tmp_path / "new" / "table.jsonl"
    options = ["--networks", "resnet50_mod", "--batch", "8", "--threads", "2", "--peers", "--rounds", "7"]
    options += ["--json", str(path)]
    result = runner.invoke(cli.app, ["table", *options])
    assert result.exit_code == cli.INTERRUPTED
    names, batches, counts, _, _, device, peers, rounds = seen[0]
    assert (names, batches, counts, device, peers, rounds) == (("resnet50_mod",), (8,), (2,), "cpu", True, 7)
    assert store.load(path).interrupted

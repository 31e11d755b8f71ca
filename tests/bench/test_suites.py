"""The suites by name, on the command line."""

import dataclasses
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mod_kernels import cli
from mod_kernels.bench import store, suites
from mod_kernels.bench.store import Row

runner = CliRunner()
README = Path(__file__).parents[2] / "README.md"
OPTIONS = {
    "network": ["--network", "resnet50_mod"],
    "quick": ["--quick"],
    "kind": ["--kind", "conv"],
    "layout": ["--layout", "nchw"],
    "batch": ["--batch", "2"],
    "max-autotune": ["--max-autotune"],
    "threads": ["--threads", "1"],
    "dtype": ["--dtype", "float32"],
}


@pytest.fixture
def asked(monkeypatch):
    """What each suite was asked to do, by its name; it leaves one row."""
    found = {}
    for name, suite in suites.SUITES.items():

        def run(request, results, on_cell, name=name):
            found[name] = request
            on_cell("a cell", 0, 1)
            results.rows.append(Row("256x1x1", "op", 1, 1, "cpu", "float32", "eager", "warm", "p", "ok", 1.0))

        fake = dataclasses.replace(suite, run=run, show=lambda results, console: None)
        monkeypatch.setitem(suites.SUITES, name, fake)
    return found


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", suites.SUITES)
def test_an_option_is_passed_on_or_refused(asked, name, option):
    result = runner.invoke(cli.app, ["bench", name, *OPTIONS[option]])
    if option in suites.SUITES[name].options:
        assert result.exit_code == 0, result.output
        given = dataclasses.asdict(asked[name])
        of = {"network": "networks", "batch": "batches", "max-autotune": "max_autotune"}.get(option, option)
        expected = {"networks": ("resnet50_mod",), "batches": (2,), "kind": "conv", "layout": "nchw"}
        expected |= {"quick": True, "max_autotune": True, "threads": (1,), "dtype": torch.float32}
        assert given[of] == expected[of]
    else:
        assert result.exit_code == 2 and not asked
        assert f"--{option} does not go with suite {name}" in result.stderr


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "block"),
        (["--train"], "block-train"),
        (["--networks"], "network"),
        (["--networks", "--train"], "network-train"),
    ],
)
def test_the_options_that_name_a_suite(asked, words, name):
    assert runner.invoke(cli.app, ["bench", *words]).exit_code == 0
    assert list(asked) == [name]
    if words:
        refused = runner.invoke(cli.app, ["bench", "ops", *words])
        assert refused.exit_code == 2 and "name a suite themselves" in refused.stderr


def test_all_goes_through_them_in_files_of_their_own(asked, tmp_path):
    assert runner.invoke(cli.app, ["bench", "all", "--json", str(tmp_path)]).exit_code == 0
    assert tuple(asked) == suites.ALL
    assert sorted(path.stem for path in tmp_path.glob("*/*.jsonl")) == sorted(suites.ALL)


def test_all_resumes_what_is_left(asked, tmp_path, monkeypatch):
    real = suites.SUITES["ops"]

    def cut(request, results, on_cell):
        raise KeyboardInterrupt

    monkeypatch.setitem(suites.SUITES, "ops", dataclasses.replace(real, run=cut))
    assert runner.invoke(cli.app, ["bench", "all", "--json", str(tmp_path)]).exit_code == cli.INTERRUPTED
    done = list(asked)
    asked.clear()
    monkeypatch.setitem(suites.SUITES, "ops", real)
    assert runner.invoke(cli.app, ["bench", "all", "--json", str(tmp_path), "--resume"]).exit_code == 0
    assert (*done, *asked) == suites.ALL
    (path,) = tmp_path.glob("*/ops.jsonl")
    assert not store.load(path).interrupted


def test_a_suite_that_runs_on_a_cpu_alone(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = runner.invoke(cli.app, ["bench", "block-train", "--device", "cuda"])
    assert result.exit_code == 2 and "suite block-train is cpu only" in result.stderr


def test_readme_names_every_suite():
    text = README.read_text()
    assert all(f"`{name}`" in text for name in suites.SUITES)

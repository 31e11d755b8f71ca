"""benchmarks/SCHEMA.md says all that a result file holds, nothing that it does not, and how to read one."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mod_kernels.bench import machine, store
from mod_kernels.bench.store import Results, Row

TEXT = (Path(__file__).parents[2] / "benchmarks" / "SCHEMA.md").read_text()


def table(heading):
    """The cells of the table under a heading, by what its first column names."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M).group(1)
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in re.findall(r"^\| `.*", section, re.M)
    ]
    return {cells[0].strip("`"): cells[1:] for cells in lines}


@pytest.fixture
def records(tmp_path):
    """A line of every kind, in a file."""
    cell = ("256x56x56", "bottleneck", 1, 1, "cpu", "float32", "eager", "warm")
    rows = [Row(*cell, "cpu", "ok", 1.5), Row(*cell, "plain-cat", "wrong: off")]
    results = Results({}, "", rows, {"1": 2.0}, ["a"], {"net": [(0.0, 1.0)]}, {"net": {}}, finished=["a cell"])
    path = tmp_path / "block.jsonl"
    store.save(Results({}, "", rows[1:], started="1"), path)
    store.save(results, path)
    store.Journal(path, results, resumed=True).close()
    return [json.loads(line) for line in path.read_text().splitlines()], path


def test_every_kind_of_record_and_what_it_has_is_there(records):
    said = table("Records")
    found = {one["record"]: set(one) - {"schema", "run", "record"} for one in records[0]}
    assert set(said) == set(found)
    for kind, keys in found.items():
        if kind != "row":
            assert set(re.findall(r"`(\w+)`", said[kind][0])) == keys, kind
    assert f"schema {store.SCHEMA}\n" in TEXT and f"`schema`: {store.SCHEMA}." in TEXT


def test_every_field_of_a_row_is_there_with_its_default():
    said = table("Rows")
    assert list(said) == [one.name for one in dataclasses.fields(Row)]
    for one in dataclasses.fields(Row):
        default = "" if one.default is dataclasses.MISSING else json.dumps(one.default)
        assert said[one.name][0] == default, one.name
        assert said[one.name][1], one.name


def test_what_makes_a_cell_is_there():
    sentence = TEXT.partition("if they agree in ")[2].partition(": a cell.")[0]
    named = re.findall(r"`(\w+)`", sentence)
    values = {name: f"<{name}>" for name in (one.name for one in dataclasses.fields(Row))}
    assert set(Row(**values).cell) == {values[name] for name in named}


def test_every_key_of_the_machine_is_there():
    said = table("Machine")
    assert list(said) == list(machine.describe())
    assert all(cells[0] for cells in said.values())


def test_every_field_of_a_run_is_a_record(records):
    """A field that is added to Results is written, or the round trip of test_store.py has it wrong."""
    written = {"run": "started", "bandwidth": "bandwidth_gbs", "row": "rows", "note": "notes", "cell": "finished"}
    written |= {"memory": "memory", "network": "networks", "end": "interrupted"}
    fields = {one.name for one in dataclasses.fields(Results)} - {"machine", "command", "suite"}
    assert fields == set(written.values())
    assert set(written) <= {one["record"] for one in records[0]}


def test_the_example_reads_a_file(records, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert example.count("\n") == 6 and "mod_kernels" not in example
    exec(example.replace("block.jsonl", str(records[1])), {})
    assert capsys.readouterr().out == "[('256x56x56', 1, 'cpu', 1.5)]\n"

"""The tables of the suites: the numbers of the rows are in them, and what is wrong is said."""

import io

import pytest
from rich.console import Console

from mod_kernels.bench import table_suites
from mod_kernels.bench.store import Results, Row
from mod_kernels.bench.table import MISSING, three_digits

MACHINE = {"gpu": None, "cpu": "a CPU", "cores": 2, "isa": "AVX2", "torch": "2"}
MACHINE |= {"commit": "c0ffee", "date": "today"}


def row(name, kind, provider, ms=None, check="ok", batch=8, mode="eager", threads=1, **more):
    return Row(name, kind, batch, threads, "cpu", "float32", mode, "warm", provider, check, median_ms=ms, **more)


@pytest.mark.parametrize(
    "value, printed",
    [(None, MISSING), (0.01234, "0.0123"), (15.83, "15.8"), (999.4, "999"), (999.6, "1000"), (1583.2, "1583")],
)
def test_a_number_keeps_three_digits_and_all_before_the_point(value, printed):
    assert three_digits(value) == printed


def shown(suite, rows, **fields):
    console = Console(file=io.StringIO(), width=140)
    table_suites.show(Results(MACHINE, "", rows, suite=suite, **fields), console)
    return console.file.getvalue()


def cells_of(text, *start):
    """The cells of the table's one row that begins with ``start``."""
    (found,) = [
        cells
        for cells in ([cell.strip() for cell in line.split("│")] for line in text.splitlines())
        if cells[: len(start)] == list(start)
    ]
    return found[len(start) :]


def test_ops():
    limit = {"bytes": 10**6, "bandwidth_gbs": 10.0}
    rows = [
        row("256x56x56", "op", "gather_channels:plain", 3.0, **limit),
        row("256x56x56", "op", "gather_channels:plain-index", 2.0, **limit),
        row("256x56x56", "op", "gather_channels:cpu", 0.5, **limit),
        row("256x56x56", "op", "gather_channels:plain", 1.0, batch=1),
        row("256x56x56", "op", "gather_channels:cpu", 1.0, batch=1),
        row("256x56x56", "op", "fuse_channels:plain", 1.0),
        row("256x56x56", "op", "fuse_channels:cpu", check="wrong: values off"),
        row("256x56x56", "op", "fuse_channels_:plain", 7.0),
    ]
    text = shown("ops", rows, notes=["a note"], interrupted=True)
    assert cells_of(text, "gather_channels", "256x56x56", "8") == ["2", "0.5", "4.00", "0.1"]
    assert cells_of(text, "gather_channels", "256x56x56", "1") == ["1", "1", "1.00", "-"]
    assert "geometric mean" in text and "2.00" in text
    assert cells_of(text, "fuse_channels", "256x56x56", "8") == ["1", "-", "-", "-"]
    assert cells_of(text, "fuse_channels_", "256x56x56", "8") == ["7", "-", "-", "-"]
    assert "256x56x56 N=8 eager fuse_channels:cpu: wrong: values off\n" in text
    assert "a note\n" in text and "commit c0ffee" in text and "interrupted" in text


def test_scaling_with_the_sentences():
    def block(k, plain, ours):
        times = {"plain-clone": 9.0, "plain-inplace": plain, "cpu-inplace": ours}
        limit = {"bytes": 250_000, "bandwidth_gbs": 1.0}
        return [row("256x14x14", "bottleneck", name, ms, k=k, **limit) for name, ms in times.items()]

    text = shown("scaling", [*block(None, 3.0, 1.5), *block(64, 1.0, 2.0)])
    assert cells_of(text, "8", "14", "256", "4") == ["3", "1.5", "2.00", "0.25"]
    assert cells_of(text, "8", "14", "256", "64") == ["1", "2", "0.50", "0.25"]
    assert "k, float32, 1 thread(s): ahead at 1 of 2 points, even between k = 4 (2.00) and 64 (0.50)\n" in text


def test_overhead_is_in_microseconds():
    times = {"public": 0.0041, "op": 0.0025, "torch.add": 0.001}
    rows = [row("select_channels", "op", name, ms, batch=1) for name, ms in times.items()]
    rows += [row("gather_channels", "op", "public", 0.01, batch=1, mode="train")]
    text = shown("overhead", rows)
    assert cells_of(text, "select_channels", "no") == ["4.10", "2.50", "1.00", "4.10"]
    assert cells_of(text, "gather_channels", "yes") == ["10.00", "-", "-", "-"]


def test_memory():
    peaks = {"plain-clone": 6.5, "plain-cat": 6.0, "plain-inplace": 0.5, "cpu": 3.0, "cpu-inplace": 0.1}
    rows = [row("256x56x56", "bottleneck", name, peak_mib=peak) for name, peak in peaks.items()]
    rows += [row("256x56x56", "bottleneck", name, peak_mib=12.0, mode="train") for name in ("plain-cat", "cpu")]
    rows += [row("256x56x56", "bottleneck", "plain-inplace", check="left out: no", mode="train")]
    text = shown("memory", rows)
    assert cells_of(text, "256x56x56", "8", "6.50") == ["6.00", "0.50", "3.00", "0.10", "2.00", "5.00"]
    assert cells_of(text, "256x56x56", "8", "-") == ["12.00", "-", "12.00", "-", "1.00", "-"]
    assert "backward" in text
    assert "256x56x56 N=8 train plain-inplace: left out: no" in text


def test_cold_start():
    many = {"q1_ms": 1300.0, "q3_ms": 1500.0, "samples": 5}
    rows = [
        row("import torch", "start", "process", 1378.39, "none", batch=1, **many),
        row("torch.compile: first call", "start", "process", 15302.8, batch=1, samples=1),
        row("Triton", "start", "process", check="left out: no compiler", batch=1),
    ]
    text = shown("cold-start", rows)
    assert cells_of(text, "import torch") == ["1378", "1300 to 1500", "5"]
    assert cells_of(text, "torch.compile: first call") == ["15303", "-", "1"]
    assert cells_of(text, "Triton") == ["-", "-", "0"]
    assert "left out: no compiler" in text


@pytest.mark.parametrize("suite", table_suites.SHOWN)
def test_a_run_without_rows_is_shown(suite):
    assert "commit c0ffee" in shown(suite, [])

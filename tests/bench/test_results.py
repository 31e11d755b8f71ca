"""Result files, tables, plots, the timing loop, and the GPU run's steps."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from mod_kernels import cli
from mod_kernels.bench import machine, store, table
from mod_kernels.bench.store import Results, Row
from mod_kernels.bench.timing import MAX_REPEATS, CpuClock, Timed, measure
from mod_kernels.spec import CONV_KINDS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def row(provider, median, check="ok", name="256x56x56", batch=1, **fields):
    return Row(name, "bottleneck", batch, 1, "cpu", "float32", "eager", "warm", provider, check, median, **fields)


@pytest.fixture
def results():
    rows = [row("plain-clone", 4.0), row("plain-cat", None, "wrong: off"), row("plain-inplace", 2.0)]
    rows += [row("cpu", 1.5), row("cpu-inplace", 1.0), row("floor", 0.5, "none")]
    rows += [row("compile", None, "left out: time")]
    rows = [dataclasses.replace(one, bytes=1_200_000, bandwidth_gbs=12.0) for one in rows]  # 0.1 ms
    return Results(machine.describe(), "mod-kernels bench", rows, {"1": 12.0}, ["a note"])


def shown(results, width=200):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.show(results, console)
    return console.export_text()


@pytest.mark.parametrize(
    "path",
    sorted((BENCHMARKS / "results").glob("*/block*.jsonl")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_the_committed_files_are_read_and_shown(path):
    contents = store.read(path)
    assert contents.runs and not contents.problems
    for run in contents.runs:
        text = shown(run, width=140)
        assert run.rows and all(one.name in text for one in run.rows)


def test_the_table_shows_what_compiling_took(results):
    results.rows[-1] = row("compile", 1.2, compile_s=6.04)
    results.rows.append(row("compile-max-autotune", 0.8, compile_s=41.26))
    lines = [line for line in shown(results).splitlines() if "│" in line]
    first = next(number for number, line in enumerate(lines) if "256x56x56" in line)
    times, seconds = ([cell.strip() for cell in line.split("│")] for line in lines[first : first + 2])
    assert times[5:7] == ["1.2", "0.8"] and seconds[5:7] == ["6.04 s", "41.3 s"]
    assert times[-3:] == ["4.00", "0.80", "0.50"]  # ours against the fastest of plain and compiled


def test_layouts_are_tables_of_their_own(results):
    last = [dataclasses.replace(row, layout="channels_last", median_ms=9.0) for row in results.rows[:1]]
    last += [row("cpu-inplace", 3.0, layout="channels_last"), row("cpu-inplace-fed", 2.0, layout="channels_last")]
    results.rows += last
    assert len(table.by_cell(results.rows)) == 2
    results.rows[0] = dataclasses.replace(results.rows[0], warning="took 1.3 times as long")
    text = shown(results)
    assert "256x56x56 N=1 eager 1 thread(s) plain-clone, to be doubted: took 1.3 times as long" in text
    assert "float32, nchw, cpu" in text and "float32, channels_last, cpu" in text
    line = [line for line in text.splitlines() if "256x56x56" in line and "│" in line][1]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    # Fed is shown, and in no ratio.
    assert cells == ["256x56x56", "1", "9", "3", "2", "0.1", "3.00", "3.00", "-"]


def test_many_doubts_are_counted(results):
    count = table.DOUBTS_SHOWN
    doubted = [row("plain-clone", 1.0, batch=batch, warning="took 2 times as long") for batch in range(count + 1)]
    results.rows = doubted[:-1]
    assert shown(results).count("to be doubted: took 2 times as long") == count
    results.rows = doubted
    text = shown(results)
    assert f"{count + 1} of {count + 1} times are to be doubted" in text and "took 2" not in text


def test_the_table_shows_ratios_wrong_and_missing(results):
    text = shown(results)
    line = next(line for line in text.splitlines() if "256x56x56" in line and "│" in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["256x56x56", "1", "4", "WRONG", "2", "-", "1.5", "1", "0.5", "0.1", "4.00", "2.00", "0.50"]
    assert "256x56x56 N=1 plain-cat: wrong: off" in text
    assert "a note" in text
    assert "reads 12 GB/s" in text


def test_a_full_table_fits_the_narrowest_console_it_is_given(results):
    """140 columns (_terminal.make_console)."""
    names = ["plain-clone", "plain-cat", "plain-inplace", "compile", "cpu", "cpu-inplace", "cpu-inplace-fed"]
    where = {"name": "1024x14x14", "batch": 256, "bytes": 123_400, "bandwidth_gbs": 10.0}
    results.rows = [row(name, 0.01234, **where) for name in [*names, "floor"]]
    text = shown(results, width=140)
    assert text.count("0.0123") == 9
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    tuned = row("compile-max-autotune", 0.01234, **where, compile_s=103.4)
    results.rows = [
        dataclasses.replace(one, compile_s=12.34) if one.provider == "compile" else one for one in results.rows
    ]
    results.rows.insert(4, tuned)
    text = shown(results, width=140)
    assert text.count("0.0123") == 10 and "103 s" in text and "12.3 s" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_a_wrong_provider_is_in_no_ratio(results):
    results.rows = [row("plain-clone", None, "wrong: off"), row("cpu-inplace", 1.0)]
    cell = next(iter(table.by_cell(results.rows).values()))
    assert table.ratio(cell, ["plain-clone"], "cpu-inplace") is None


def test_geometric_mean():
    assert table.geometric_mean([1.0, 4.0, None]) == pytest.approx(2.0)
    assert table.geometric_mean([None]) is None


def test_the_network_table_shows_the_share_with_its_interval(results):
    def network(provider, median, share=None):
        cell = ("resnet75_mod", "network", 1, 1, "cpu", "float32", "eager", "warm")
        return Row(*cell, provider, "ok", median, share=share)

    results.rows = [network("plain", 12.0), network("plain-inplace", 11.0), network("identity", 10.0)]
    results.rows.append(network("fused", 10.5, (0.25, 0.2, 0.31)))
    line = next(line for line in shown(results).splitlines() if "resnet75_mod" in line and "│" in line)
    assert line.split("│")[-2].strip() == "0.25 (0.20 to 0.31)"


def test_the_machine_is_described():
    described = machine.describe()
    assert described["cpu"]
    assert described["cores"] >= 1
    assert described["torch"]
    assert str(described["cores"]) in machine.short_name(described)


class FakeClock:
    """Every provider takes what its name says."""

    def __init__(self):
        self.order = []

    def calibrate(self, timed):
        pass

    def sample(self, timed):
        self.order.append(timed.name)
        return float(timed.name)


def test_rounds_are_interleaved():
    clock, timed = FakeClock(), [Timed("1", None), Timed("2", None), Timed("3", None)]
    assert measure(timed, clock, rounds=8) == 8
    rounds = [clock.order[i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(one) == ["1", "2", "3"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # in changing order
    assert timed[1].samples == [2.0] * 8
    assert timed[1].quartiles() == (2000.0, 2000.0, 2000.0)


def test_a_budget_ends_the_rounds_but_not_before_five():
    assert measure([Timed("1", None)], FakeClock(), rounds=50, budget_s=0.0) == 5


def test_a_sample_is_long_enough_and_prepared_outside_the_clock():
    calls = []
    timed = Timed("it", lambda: calls.append("call"), lambda: calls.append("prepare"))
    clock = CpuClock()
    clock.calibrate(timed)
    assert timed.repeats == MAX_REPEATS  # far below a microsecond a call
    calls.clear()
    clock.sample(timed)
    assert calls == ["prepare"] + ["call"] * (MAX_REPEATS + 2)


def test_one_clock_never_times_what_it_timed_before():
    """Those that come and go lie where others lay before them: their place must not be what tells them apart."""
    clock, calls = CpuClock(), []

    def timed_once(number):
        clock.sample(Timed(str(number), lambda: calls.append(number)))
        made = set(calls)
        calls.clear()
        return made

    assert [timed_once(number) for number in range(20)] == [{number} for number in range(20)]


def test_plots_are_made_from_the_file_alone(results, tmp_path):
    pytest.importorskip("matplotlib")
    plot = _script("plot")
    results.rows.append(row("cpu-inplace", 3.0, layout="channels_last"))
    path = tmp_path / "blocks.jsonl"
    store.save(results, path)
    pictures = plot.plot(path)
    assert [picture.name for picture in pictures] == [
        "blocks-bottleneck-float32-threads1.png",
        "blocks-bottleneck-float32-channels_last-threads1.png",
    ]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "gpu.json"
    other.write_text("{}")
    assert plot.plot(other) == []


def test_a_failed_step_does_not_stop_the_next(tmp_path):
    gpu = _script("gpu")
    python = sys.executable
    steps = [
        gpu.Step("good", [python, "-c", "print('fine')"]),
        gpu.Step("bad", [python, "-c", "print('oh'); raise SystemExit(3)"]),
        gpu.Step("slow", [python, "-c", "import time; print('begun', flush=True); time.sleep(60)"], limit_s=2),
        gpu.Step("absent", [str(tmp_path / "nothing")]),
        gpu.Step("left", skip="no GPU"),
        gpu.Step("last", [python, "-c", ""]),
    ]
    seen = []
    outcomes = gpu.run_all(steps, 100.0, lambda done: seen.append(len(done)))
    assert [one.outcome for one in outcomes] == ["ok", "failed", "timed out", "failed", "skipped", "ok"]
    assert seen == [1, 2, 3, 4, 5, 6]
    assert outcomes[1].note == "exit status 3"
    assert outcomes[1].output_tail == ["oh"]
    assert "begun" in outcomes[2].output_tail
    assert outcomes[4].note == "no GPU"


def test_the_record_of_a_run_names_no_folder_of_the_machine(tmp_path):
    gpu = _script("gpu")
    said = f"import sys; print(r'{gpu.ROOT}/csrc/a.cpp'); print(sys.prefix + '/lib'); raise SystemExit(1)"
    steps = [gpu.Step("bad", [sys.executable, "-c", said]), gpu.Step("good", ["ls", f"{tmp_path}/"])]
    gpu.run_all(steps, 100.0, lambda done: gpu.write(tmp_path, None, done))
    text = (tmp_path / "gpu.json").read_text()
    assert not any(str(folder) in text for folder in (gpu.ROOT, tmp_path, sys.prefix))
    assert "csrc/a.cpp" in text


def test_no_step_starts_once_the_time_is_used_up():
    gpu = _script("gpu")
    outcomes = gpu.run_all([gpu.Step("late", ["true"])], 1.0, lambda _: None)
    assert outcomes[0].outcome == "timed out"


def test_the_gpu_run_leaves_at_most_eight_files(tmp_path):
    gpu = _script("gpu")
    steps = gpu.steps_on_gpu(tmp_path, "compute-sanitizer", "empty")
    written = [argument for step in steps for argument in step.command if argument.endswith((".json", ".jsonl"))]
    names = [Path(one).name for one in written]
    # Runs of one suite are appended to its file.
    assert sorted(names) == ["block.jsonl"] * 3 + ["network.jsonl", "verify.json"]
    names = [step.name for step in steps]
    assert names[:4] == ["build", "compile", "engines", "tests"] and "verify" in names
    bench = {step.name: step for step in steps if step.name.startswith("bench")}
    assert not any(step.group for step in bench.values())  # timed: alone
    assert names[-1] == "bench max-autotune"  # what takes as long as it may comes after all else
    compiled = [step for name, step in bench.items() if name != "bench networks"]
    assert {step.environment["TORCHINDUCTOR_CACHE_DIR"] for step in compiled} == {"empty"}
    assert {"compute-sanitizer memcheck", "compute-sanitizer racecheck", "bench float16"} <= set(names)


def test_the_gpu_run_calls_the_command_line_as_it_is(tmp_path):
    """Its options are parsed here: what is misspelt would show on a GPU only."""
    commands = typer.main.get_command(cli.app).commands
    steps = _script("gpu").steps_on_gpu(tmp_path, "compute-sanitizer", "empty")
    called = [step.command[3:] for step in steps if step.command[1:3] == ["-m", "mod_kernels"]]
    assert [name for name, *_ in called] == ["verify", "bench", "bench", "bench", "bench"]
    parsed = [commands[name].make_context(name, arguments).params for name, *arguments in called]
    assert {one["device"] for one in parsed} == {"cuda"}
    assert [bool(one.get("max_autotune")) for one in parsed] == [False] * 4 + [True]


def test_compute_sanitizer_sees_every_kernel(monkeypatch):
    """By what the script would launch on a GPU; of the kernels that have several forms, each."""
    pytest.importorskip("triton")
    from mod_kernels.backends.triton import launch

    launched = []
    monkeypatch.setattr(launch, "run", lambda variant, *arguments: launched.append(variant))
    monkeypatch.setattr("mod_kernels.backends.triton._device_problem", lambda device: "")
    sanitize = _script("sanitize")
    sanitize.run_all(sanitize.jobs(), "cpu", sanitize.TRITON)
    assert {variant.kernel for variant in launched} == set(launch.kernels())

    def values(name):
        return {dict(variant.constexprs)[name] for variant in launched if name in dict(variant.constexprs)}

    assert values("SHARED_OUT") == {"pool", "layers", "nothing"}
    assert values("SELECTION") == {"slots", "keys"}
    assert values("COPY") == values("CHANNELS_LAST") == {False, True}
    assert values("KIND") == set(CONV_KINDS)
    assert values("POSITION") == {"first", "last", "original"}
    assert len(values("RUN")) > 1  # short planes as one run, and not


def _script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

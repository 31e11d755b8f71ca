"""Where the time goes: the plain block in steps, what is summed up from the events, the verb."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from typer.testing import CliRunner

from mod_kernels import cli
from mod_kernels.backends.native import CPU
from mod_kernels.bench import paper, profile, store
from mod_kernels.bench.networks import PlainBlock
from mod_kernels.nn import MoDBlock, NarrowBottleneck

from .test_paper_table import SMALL

runner = CliRunner()


@pytest.mark.parametrize("ending", profile.FORMS)
def test_in_steps_the_plain_block_is_bitwise_what_it_is(ending):
    block = PlainBlock(MoDBlock(64, NarrowBottleneck(4), k=4, bias=True).eval(), ending)
    x = torch.randn(3, 64, 7, 5)
    with torch.inference_mode():
        # Each its own x: one of the endings writes into it.
        assert torch.equal(profile.stepped(block, x.clone()), block(x.clone()))
        assert not torch.equal(block(x.clone()), x)


def event(name, start, end, children=(), kernels=(), device_type=DeviceType.CPU):
    elapsed = SimpleNamespace(elapsed_us=lambda: 1000.0 * (end - start))
    listed = [SimpleNamespace(name=kernel, duration=1000.0 * ms) for kernel, ms in kernels]
    return SimpleNamespace(
        name=name, time_range=elapsed, cpu_children=list(children), kernels=listed, device_type=device_type
    )


def ranged(name, *rest, **named):
    return event(profile.PREFIX + name, *rest, **named)


@pytest.fixture
def forward():
    """0 to 100 ms: a convolution, then from 40 to 60 a MoD block whose pool takes 5 and whose conv takes 9."""
    inner = event("aten::cudnn_convolution", 51, 54, kernels=[("conv", 8.0), ("memset", 0.5)])
    conv = ranged("conv", 50, 59, [event("aten::conv2d", 51, 55, [inner]), event("aten::relu", 55, 58)])
    pool = ranged("pool", 41, 46, [event("aten::mean", 42, 45, kernels=[("reduce", 2.0)])])
    block = ranged(profile.BLOCK, 40, 60, [pool, conv], kernels=[(profile.PREFIX + profile.BLOCK, 30.0)])
    return ranged(profile.PLAIN, 0, 100, [event("aten::conv2d", 1, 30, kernels=[("conv", 28.0)]), block])


def test_wall_times_are_of_ranges_and_what_is_between_them_is_dispatch(forward):
    (found,) = profile.forwards_of(profile.PLAIN, [forward, *forward.cpu_children], "cpu")
    timed = {part: ms for part, ms in found.parts_ms.items() if ms}
    assert timed == {"pool": 5.0, "conv": 9.0, "dispatch": 6.0, "other blocks": 80.0}
    assert set(found.parts_ms) == {*profile.STEPS, profile.DISPATCH, profile.OTHER}
    assert found.calls == [3]  # what an op calls is not counted again


def test_device_times_are_of_kernels_and_ranges_are_none(forward):
    on_gpu = ranged(profile.PLAIN, 0, 90, device_type=DeviceType.CUDA)
    (found,) = profile.forwards_of(profile.PLAIN, [forward, on_gpu], "cuda")
    timed = {part: ms for part, ms in found.parts_ms.items() if ms}
    assert timed == {"pool": 2.0, "conv": 8.5, "other blocks": 28.0}
    assert found.calls == [3] and profile.DISPATCH not in found.parts_ms


def test_ranges_change_nothing_and_go_away():
    """Fused, with ranges: still one op a block, which the ending before it pools for."""
    models = profile.build("resnet18_mod", "cpu", torch.float32, **SMALL.options)
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        before = {name: models[name](image) for name in (profile.PLAIN, profile.FUSED)}
        with profile.in_ranges(models):
            recorded = profile.profile({name: models[name] for name in before}, image, repeats=2)
            assert all(torch.equal(models[name](image), y) for name, y in before.items())
    events = recorded.events()
    fused = profile.forwards_of(profile.FUSED, events, "cpu")
    plain = profile.forwards_of(profile.PLAIN, events, "cpu")
    assert [len(one.calls) for one in (*fused, *plain)] == [4] * 4
    assert all(min(one.parts_ms.values()) > 0 for one in plain)
    if CPU.library is not None:
        assert fused[0].calls == [1] * 4
        assert sum(one.name == "mod_kernels_cpu::add_relu_pool_" for one in events) == 2 * 4
    for kind in (PlainBlock, MoDBlock):
        assert kind.__call__ is nn.Module.__call__
    assert not [one for one in models[profile.PLAIN].modules() if "forward" in vars(one)]


def called(*arguments):
    return runner.invoke(cli.app, ["profile", *map(str, arguments)])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(paper, "data_of", lambda name: SMALL)


def test_the_verb_shows_and_keeps_every_part(small, tmp_path):
    kept, trace = tmp_path / "new" / "profile.jsonl", tmp_path / "trace.json"
    result = called("resnet18_mod", "--repeats", 3, "--form", "inplace", "--json", kept, "--trace", trace)
    assert result.exit_code == 0, result.output
    found = store.load(kept)
    assert found.suite == "profile" and found.finished == ["resnet18_mod N=1 1 thread(s) inplace"]
    rows = {row.provider: row for row in found.rows}
    steps = [*profile.STEPS, profile.DISPATCH, profile.OTHER]
    assert list(rows) == [f"plain/{part}" for part in steps] + ["fused/MoD block", "fused/other blocks"]
    assert {(row.kind, row.check, row.samples) for row in found.rows} == {("part", "ok", 3)}
    assert rows["plain/copies"].median_ms == 0 < rows["plain/pool"].median_ms
    assert all(row.q1_ms <= row.median_ms <= row.q3_ms for row in found.rows)
    for part in (*profile.STEPS, "Python and dispatch", "other blocks", "not profiled"):
        assert part in result.stdout
    ranges = [one["name"] for one in json.loads(trace.read_text())["traceEvents"] if one.get("ph") == "X"]
    assert ranges.count("mod_kernels::pool") == 4 and ranges.count("mod_kernels::fused") == 1


def test_a_folder_gets_a_file_of_this_machine(small, tmp_path):
    assert called("resnet18_mod", "--repeats", 1, "--json", tmp_path / "results").exit_code == 0
    (kept,) = (tmp_path / "results").glob("*/profile.jsonl")
    assert store.load(kept).finished == ["resnet18_mod N=1 1 thread(s) clone"]


def test_wrong_outputs_get_no_time(small, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "compare", lambda *_: "wrong: off")
    result = called("resnet18_mod", "--repeats", 1, "--json", tmp_path / "profile.jsonl")
    assert result.exit_code == 1 and "plain: wrong: off" in result.stdout
    assert not [row for row in store.load(tmp_path / "profile.jsonl").rows if row.timed]


def test_an_interrupt_leaves_a_run_that_says_so(small, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "measure", interrupted)
    result = called("resnet18_mod", "--json", tmp_path / "profile.jsonl")
    assert result.exit_code == 130 and "interrupted: " in result.stdout
    found = store.load(tmp_path / "profile.jsonl")
    assert found.interrupted and not found.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "model must be one of resnet18_mod, "),
        (["resnet18_mod", "--form", "scatter"], "form must be one of clone, cat, inplace, got 'scatter'\n"),
        (["resnet18_mod", "--dtype", "float16"], "dtype must be one of float32, got 'float16'\n"),
        (["resnet18_mod", "--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'\n"),
        (["resnet18_mod", "--batch", "0"], "batch must be at least 1, got 0\n"),
        (["resnet18_mod", "--threads", "0"], "threads must be at least 1, got 0\n"),
        (["resnet18_mod", "--repeats", "0"], "repeats must be at least 1, got 0\n"),
        (["resnet18_mod", "--trace", "."], "what is measured can't be kept: "),
    ],
)
def test_a_wrong_argument_is_one_line_on_stderr(arguments, message, tmp_path):
    result = called(*arguments, "--json", tmp_path / "profile.jsonl")
    assert (result.exit_code, result.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert result.stderr.startswith(f"mod-kernels: {message}") and result.stderr.count("\n") == 1

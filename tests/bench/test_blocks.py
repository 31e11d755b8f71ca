"""The block benchmark: nothing wrong gets a time, what is timed is what was checked, results survive a file."""

import contextlib
import dataclasses
import time
import types

import pytest
import torch

from mod_kernels import backends, plain, reference
from mod_kernels._layout import layout_of
from mod_kernels.backends.native import CPU
from mod_kernels.bench import blocks, cells, providers, store
from mod_kernels.bench.check import check, exact_logits
from mod_kernels.bench.providers import Provider
from mod_kernels.bench.shapes import MIN_GAP, SHAPES, Shape, make_spec, make_x
from mod_kernels.spec import CONV_KINDS

SHAPE = Shape("bottleneck", 256, 7, 5)
PLAN = blocks.Plan(shapes=(SHAPE,), batches=(2,), rounds=3, compile_batches=())
CELL = blocks.Cell(SHAPE, 2, 1)


@pytest.fixture
def block():
    spec = make_spec(SHAPE, torch.float32, "cpu")
    return spec, make_x(SHAPE, 3, spec)


def judge(run, block, in_place=False, ours=True):
    spec, x = block
    return check(Provider("it", run, run, in_place), x, spec, exact_logits(x, spec), ours)


def right(spec, x):
    return providers.plain_provider("clone", spec).checked(x)


@pytest.mark.parametrize("ending", plain.ENDINGS)
@pytest.mark.parametrize("shape", [SHAPE, *(Shape(kind, 192, 5, 7) for kind in CONV_KINDS)])
def test_the_plain_forms_are_right(ending, shape):
    spec = make_spec(shape, torch.float32, "cpu")
    x = make_x(shape, 3, spec)
    before, provider = x.clone(), providers.plain_provider(ending, spec)
    assert provider.in_place == (ending == "inplace")
    assert check(provider, x, spec, exact_logits(x, spec), ours=False) == ""
    assert torch.equal(x, before)
    expected = reference.mod_block(x, spec)
    torch.testing.assert_close(provider.checked(x.clone())[0], expected)


def test_the_plain_provider_is_plain_mod_block(block):
    spec, x = block

    def conv(gathered):
        return providers.conv_block(gathered, spec)

    expected = plain.mod_block(x, spec.fc1_weight, spec.fc2_weight, spec.k, conv)
    assert torch.equal(right(spec, x)[0], expected)


def test_wrong_values_are_found(block):
    def run(x):
        y, scores, index = right(block[0], x)
        y[:, : block[0].k] *= 1.0001
        return y, scores, index

    assert judge(run, block).startswith("values off by")


def test_nan_is_found(block):
    def run(x):
        y, scores, index = right(block[0], x)
        y[0, 0, 0, 0] = float("nan")
        return y, scores, index

    assert judge(run, block).startswith("values off by nan")


def test_a_changed_channel_that_passes_through_is_found(block):
    def run(x):
        y, scores, index = right(block[0], x)
        y[-1, -1, -1, -1] += 1
        return y, scores, index

    assert judge(run, block) == "changed a channel that passes through"


def test_a_wrong_selection_is_found(block):
    spec, x = block

    def with_index(change):
        def run(x):
            _, index = right(spec, x)[1:]
            index = change(index)
            scores = torch.sigmoid(reference.selector_logits(x, spec.fc1_weight, spec.fc2_weight).gather(1, index))
            z = providers.conv_block(plain.gather_channels(x, index), spec)
            return plain.fuse_channels(x, z, scores, index), scores, index

        return judge(run, block)

    assert with_index(lambda index: index) == ""
    assert with_index(lambda index: index.flip(1)) == "selected in the wrong order"
    assert with_index(lambda index: index[:, :1].expand_as(index).contiguous()).startswith(
        "selected channels that"
    )
    lowest = exact_logits(x, spec).argsort(1)[:, : spec.k].flip(1)
    assert with_index(lambda index: lowest) == "selected a channel that is not among the k largest"


def test_wrong_scores_are_found(block):
    def run(x):
        y, scores, index = right(block[0], x)
        return y, scores * 0.9, index

    assert judge(run, block).startswith("scores off by")


def test_writing_into_the_input_is_found(block):
    provider = providers.plain_provider("inplace", block[0])
    assert judge(provider.checked, block, in_place=False) == "wrote into its input"
    assert judge(provider.checked, block, in_place=True) == ""


def test_a_provider_that_raises_is_found(block):
    def run(x):
        raise RuntimeError("no\nmore")

    assert judge(run, block) == "raised: no"


def test_a_wrong_provider_gets_no_time_and_the_others_do(monkeypatch):
    real = providers.plain_provider

    def with_one_wrong(ending, spec):
        provider = real(ending, spec)
        if ending != "cat":
            return provider

        def run(x):
            y, scores, index = provider.run(x)
            return y * 1.001, scores, index

        return Provider(provider.name, run, run)

    monkeypatch.setattr(providers, "plain_provider", with_one_wrong)
    rows = {row.provider: row for row in _run_cell()}
    assert rows["plain-cat"].check.startswith("wrong: values off by")
    assert rows["plain-cat"].median_ms is None
    assert rows["plain-clone"].check == "ok"
    assert 0 < rows["plain-clone"].q1_ms <= rows["plain-clone"].median_ms <= rows["plain-clone"].q3_ms
    assert rows["compile"].check == "left out: time"
    assert rows["floor"].median_ms > 0
    assert rows["floor"].limit_ms == pytest.approx(SHAPE.floor_bytes(2, torch.float32) / 10 / 1e6)


def _run_cell():
    return blocks.run_cell(CELL, PLAN, 10.0, blocks.compiler_of(PLAN))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [SHAPE, Shape("basic", 128, 5, 7)])
def test_every_provider_is_right_in_every_dtype_and_layout(monkeypatch, shape, dtype, layout):
    """And is timed on x in that layout, the floor too."""
    given, timed = set(), blocks._timed

    def noted(provider, x, *others):
        given.add((provider.name, layout_of(x), x.dtype))
        return timed(provider, x, *others)

    monkeypatch.setattr(blocks, "_timed", noted)
    plan = dataclasses.replace(PLAN, dtype=dtype, layout=layout)
    rows = blocks.run_cell(blocks.Cell(shape, 2, 1), plan, 10.0, blocks.compiler_of(plan))
    assert {(row.layout, row.dtype) for row in rows} == {(layout, str(dtype).removeprefix("torch."))}
    checks = {row.provider: row.check for row in rows}
    names = {"plain-clone", "plain-cat", "plain-inplace"}
    if CPU.library is not None:
        names |= {"cpu", "cpu-inplace", "cpu-inplace-fed"}
    assert {name for name, said in checks.items() if said == "ok"} == names
    assert given == {(name, layout, dtype) for name in names | {"floor"}}


def test_the_values_of_x_are_the_same_in_either_layout(block):
    spec, x = block
    assert torch.equal(make_x(SHAPE, 3, spec, layout="channels_last"), x)


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_a_fed_provider_selects_by_the_means_it_was_given(block):
    spec, x = block
    with backends.use_backend("cpu"):
        for given, said in ((x, ""), (x.flip(1), "selected a channel that is not among the k largest")):
            provider = providers.engine_provider("cpu", spec, True, given, fed=True)
            assert provider.name == "cpu-inplace-fed"
            assert check(provider, x, spec, exact_logits(x, spec), ours=True) == said


def test_an_engine_that_is_not_there_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(providers, "ENGINES", {"cpu": "cuda"})
    rows = {row.provider: row for row in _run_cell()}
    for name in ("cuda", "cuda-inplace", "cuda-inplace-fed"):
        assert rows[name].check == "left out: the CUDA kernels run on cuda, not on cpu"
        assert rows[name].median_ms is None
    assert rows["plain-clone"].median_ms > 0


def test_the_fastest_plain_form_is_compiled_and_checked(monkeypatch):
    compiled = []

    def compiled_provider(best, threads, name):
        compiled.append(best.name)
        return Provider(name, best.run, best.run)

    monkeypatch.setattr(providers, "compiled_provider", compiled_provider)
    monkeypatch.setattr(providers, "start_compiler", lambda device: None)
    plan = dataclasses.replace(PLAN, compile_batches=(2,))
    rows = {row.provider: row for row in blocks.run_cell(CELL, plan, 10.0, blocks.compiler_of(plan))}
    assert compiled in (["plain-clone"], ["plain-cat"])
    assert rows["compile"].check == "ok"
    assert rows["compile"].median_ms > 0


def compiling(monkeypatch, fail=()):
    """The names compiled from now on; each takes 0.05 s at its first call, or raises."""
    compiled = []

    def compiled_provider(best, threads, name):
        compiled.append(name)
        calls = iter(range(10**9))

        def run(x):
            if name in fail:
                raise RuntimeError("no kernel\nmore")
            if next(calls) == 0:
                time.sleep(0.05)
            return best.run(x)

        return Provider(name, run, run)

    monkeypatch.setattr(providers, "compiled_provider", compiled_provider)
    monkeypatch.setattr(providers, "start_compiler", lambda device: None)
    return compiled


AUTOTUNE = dataclasses.replace(PLAN, compile_batches=(2,), max_autotune=True, caches=("warm",))


def compiled_rows(results):
    return {name: [row for row in results.rows if row.provider == name] for name in providers.COMPILED}


def test_what_was_compiled_serves_every_cell_of_a_shape_and_keeps_its_time(monkeypatch):
    compiled, results = compiling(monkeypatch), store.Results({}, "")
    monkeypatch.setattr(blocks, "cells", lambda plan: [CELL, CELL, blocks.Cell(SHAPE, 3, 1)])
    plan = dataclasses.replace(AUTOTUNE, batches=(2, 3))
    blocks.run(plan, results, lambda *_: None)
    assert compiled == ["compile", "compile-max-autotune", "compile-max-autotune"]
    plain, tuned = compiled_rows(results).values()
    assert [row.check for row in plain] == ["ok", "ok", "left out: time"]
    assert [row.check for row in tuned] == ["ok"] * 3
    for rows in (plain[:2], tuned[:2]):
        assert rows[0].compile_s == rows[1].compile_s >= 0.05
        assert all(0 < row.median_ms < 50 for row in rows)
    assert plain[2].compile_s is None and tuned[2].compile_s != tuned[0].compile_s
    assert {row.compile_s for row in results.rows if row.provider not in providers.COMPILED} == {None}
    assert results.notes == ["torch.compile left out of 1 of 3 cells to save time; without --quick it is not"]


def test_max_autotune_ends_with_its_own_time(monkeypatch):
    compiled, results = compiling(monkeypatch), store.Results({}, "")
    plan = dataclasses.replace(AUTOTUNE, batches=(2, 3), compile_batches=(2, 3), autotune_s=0.01)
    blocks.run(plan, results, lambda *_: None)
    assert compiled == ["compile", "compile-max-autotune", "compile"]
    assert [row.check for row in compiled_rows(results)["compile-max-autotune"]] == ["ok", "left out: time"]
    note = "torch.compile with max-autotune left out of 1 of 2 cells to save time; without --quick it is not"
    assert results.notes == [note]


def test_what_does_not_compile_is_said_and_not_tried_again(monkeypatch):
    compiled, results = compiling(monkeypatch, fail=("compile-max-autotune",)), store.Results({}, "")
    monkeypatch.setattr(blocks, "cells", lambda plan: [CELL, CELL])
    blocks.run(AUTOTUNE, results, lambda *_: None)
    assert compiled == ["compile", "compile-max-autotune"]
    plain, failed = compiled_rows(results).values()
    assert [row.check for row in plain] == ["ok", "ok"]
    assert [row.check for row in failed] == ["wrong: raised: no kernel"] * 2
    assert failed[0].median_ms is failed[0].compile_s is None


def test_max_autotune_is_compiled_when_asked_for(monkeypatch):
    compiled, results = compiling(monkeypatch), store.Results({}, "")
    blocks.run(dataclasses.replace(AUTOTUNE, max_autotune=False), results, lambda *_: None)
    assert compiled == ["compile"] and not compiled_rows(results)["compile-max-autotune"]


@pytest.mark.parametrize("name", providers.COMPILED)
def test_modes_of_torch_compile(name, block, monkeypatch):
    """Never CUDA graphs of its own: a cell's graph could not be captured around them."""
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda run, **given: seen.update(given) or run)
    providers.compiled_provider(providers.plain_provider("cat", block[0]), 2, name)
    options = seen["options"]
    assert options["cpp.threads"] == 2 and not options.get("triton.cudagraphs")
    assert bool(options.get("max_autotune")) == (name == providers.MAX_AUTOTUNE)


def test_torch_compile_of_a_plain_form_is_right(block):
    spec, x = block
    provider = providers.compiled_provider(providers.plain_provider("cat", spec), torch.get_num_threads())
    assert check(provider, x, spec, exact_logits(x, spec), ours=False) == ""


def test_threads_are_restored_and_time_limits_are_said():
    before = torch.get_num_threads()
    plan = dataclasses.replace(PLAN, threads=(1, 2), total_s=0.0, caches=("warm",))
    results = store.Results({}, "")
    blocks.run(plan, results, lambda *_: None)
    assert torch.get_num_threads() == before
    assert results.rows == []
    assert results.notes == ["out of time (0 s), not measured: 256x7x5 N=2 1 thread(s), 256x7x5 N=2 2 thread(s)"]


def passing(monkeypatch, plan, interrupt_at=None):
    """Rows by batch and provider, and notes, of a run of ``plan`` in passes; each pass is as long as it says."""
    measured, results = [], store.Results({}, "")
    real = blocks.run_cell

    def run_cell(cell, *others, **more):
        measured.append(cell.batch)
        if len(measured) == interrupt_at:
            raise KeyboardInterrupt
        return real(cell, *others, **more)

    monkeypatch.setattr(blocks, "run_cell", run_cell)
    labels = []
    with contextlib.suppress(KeyboardInterrupt):
        blocks.run(plan, results, lambda label, number, total: labels.append((number, total)))
    return measured, labels, {(row.batch, row.provider): row for row in results.rows}, results


PASSES = dataclasses.replace(PLAN, batches=(1, 2), caches=("warm",), passes=3)


def test_passes_go_through_all_cells_in_turn_and_keep_all_samples(monkeypatch):
    measured, labels, rows, results = passing(monkeypatch, PASSES)
    assert measured == [1, 2] * 3
    assert labels == [(number, 6) for number in range(6)]
    assert len(rows) == len(results.rows) and len(results.finished) == 2
    assert {row.samples for row in rows.values() if row.check in ("ok", "none")} == {3 * PASSES.rounds}


def test_an_interrupt_leaves_what_the_passes_before_it_measured(monkeypatch):
    _, _, rows, results = passing(monkeypatch, PASSES, interrupt_at=4)
    assert {batch: rows[batch, "floor"].samples for batch in (1, 2)} == {1: 6, 2: 3}
    assert len(results.finished) == 2


def test_passes_that_there_is_no_time_for_are_said(monkeypatch):
    clock = iter(range(100))  # a second each time it is looked at, by cells.py alone
    monkeypatch.setattr(cells, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    measured, _, rows, results = passing(monkeypatch, dataclasses.replace(PASSES, total_s=3.5))
    assert measured == [1, 2, 1]
    assert {batch: rows[batch, "floor"].samples for batch in (1, 2)} == {1: 6, 2: 3}
    assert results.notes[0] == "out of time (4 s) in pass 2 of 3, before 256x7x5 N=2 1 thread(s)"


def test_what_is_wrong_in_one_pass_gets_no_time(monkeypatch):
    real, checks = blocks.check, []

    def check(provider, *others, **more):
        checks.append(provider.name)
        wrong = provider.name == "plain-cat" and checks.count("plain-cat") == 2
        return "no" if wrong else real(provider, *others, **more)

    monkeypatch.setattr(blocks, "check", check)
    _, _, rows, _ = passing(monkeypatch, dataclasses.replace(PASSES, batches=(2,)))
    assert rows[2, "plain-cat"].check == "wrong: no" and rows[2, "plain-cat"].median_ms is None


def test_a_compiled_form_is_measured_in_the_first_pass_alone(monkeypatch):
    compiled, results = compiling(monkeypatch), store.Results({}, "")
    blocks.run(dataclasses.replace(PASSES, compile_batches=(1, 2)), results, lambda *_: None)
    assert compiled == ["compile"] * 2
    assert [row.samples for row in compiled_rows(results)["compile"]] == [PASSES.rounds] * 2


def test_the_inputs_have_no_near_ties():
    for shape in (SHAPE, Shape("basic", 64, 7, 7)):  # at R = 4 one sample in sixteen is all ties
        spec = make_spec(shape, torch.float32, "cpu")
        x = make_x(shape, 64, spec)
        largest = exact_logits(x, spec).topk(shape.k + 1).values
        gap = (largest[:, :-1] - largest[:, 1:]).amin(1) / largest.abs().amax(1)
        assert float(gap.min()) > MIN_GAP


@pytest.mark.parametrize("shape", [shape for shapes in SHAPES.values() for shape in shapes])
def test_an_in_place_block_stays_finite_on_one_buffer(shape):
    small = dataclasses.replace(shape, height=7, width=7)
    spec = make_spec(small, torch.float32, "cpu")
    x = make_x(small, 1, spec)
    provider = providers.plain_provider("inplace", spec)
    with torch.inference_mode():
        for _ in range(blocks_max_repeats()):
            provider.run(x)
    assert bool(x.isfinite().all())


def blocks_max_repeats():
    from mod_kernels.bench.timing import MAX_REPEATS

    return MAX_REPEATS + 1


def test_the_paper_s_shapes():
    assert list(SHAPES) == list(CONV_KINDS)
    assert [(shape.name, shape.k, shape.hidden) for shape in SHAPES["bottleneck"]] == [
        ("256x56x56", 4, 16),
        ("512x28x28", 8, 32),
        ("1024x14x14", 16, 64),
        ("2048x7x7", 32, 128),
    ]
    for kind, expected in {
        "basic": [("64x56x56", 1), ("128x28x28", 2), ("256x14x14", 4), ("512x7x7", 8)],
        "inverted_residual": [("24x56x56", 1), ("32x28x28", 2), ("64x14x14", 4), ("96x14x14", 6), ("160x7x7", 10)],
        "conv": [("64x32x32", 1), ("128x16x16", 2), ("256x8x8", 4), ("512x4x4", 8), ("512x2x2", 8)],
        "convnext": [("96x56x56", 1), ("192x28x28", 2), ("384x14x14", 4), ("768x7x7", 8)],
    }.items():
        assert [(shape.name, shape.k) for shape in SHAPES[kind]] == expected

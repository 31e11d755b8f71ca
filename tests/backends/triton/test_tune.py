"""The search of `mod-kernels tune`: what it keeps, what it leaves and why, and what it restores."""

import dataclasses
import random

import pytest
import torch

from mod_kernels import tune
from mod_kernels.backends.triton import in_force, launch, tuning_file
from mod_kernels.backends.triton.tuning import DEFAULT
from mod_kernels.bench.shapes import Shape
from mod_kernels.tune import cells as tune_cells
from mod_kernels.tune import search as tune_search
from mod_kernels.tune.candidates import CANDIDATES, Candidates
from mod_kernels.tune.gpu_timer import graph_timer
from mod_kernels.tune.search import OutOfTime, Search

WARPS = Candidates("pool_warps", (4,), "a test")
SLICES = Candidates("plane_k", (16,), "a test")


@pytest.fixture(scope="module")
def cells():
    """Every op on a tiny block, in both layouts."""
    return tune.all_cells([Shape("basic", 64, 5, 7)], [2], [torch.float16], "cpu")


@pytest.fixture
def search(interpreter, cells):
    """A search on CPU tensors: ``seconds(tuning, call)`` is what a measurement gives."""

    def make(seconds, ops=("add_relu_pool_", "gather_channels"), check_time=lambda: None, start=DEFAULT):
        def timer(call):
            tuning = in_force.of_device(-1).tuning
            return lambda: seconds(tuning, call)

        return Search(start, [cell for cell in cells if cell.op in ops], timer, -1, check_time)

    return make


def faster_with_four_warps(tuning, call=None):
    return 0.8 if tuning.pool_warps == 4 else 1.0


def only(found):
    (verdict,) = found.verdicts
    return verdict


def test_what_is_faster_is_kept(search):
    found = search(faster_with_four_warps)
    assert found.run([WARPS])
    assert only(found).kept and only(found).said == "22.3% faster over 2 cells"
    assert dataclasses.asdict(found.best) == dataclasses.asdict(DEFAULT) | {"pool_warps": 4}
    assert in_force.of_device(-1).tuning is DEFAULT


def test_the_next_field_is_searched_from_there(search):
    """Two fields that only help together, and a value that the best one has already."""
    again = Candidates("pool_warps", (4, 16), "a test")
    found = search(lambda tuning, call: {4: 0.8, 16: 0.7}.get(tuning.pool_warps, 1.0))
    assert found.run([WARPS, again])
    assert [(verdict.value, verdict.kept) for verdict in found.verdicts] == [(4, True), (16, True)]
    assert found.best.pool_warps == 16


@pytest.mark.parametrize("gain,noise,kept", [(0.0, 0.2, False), (0.005, 0.0, False), (0.05, 0.001, True)])
def test_noise_is_not_taken_for_a_gain(search, gain, noise, kept):
    for seed in range(10):
        numbers = random.Random(seed)
        found = search(
            lambda tuning, call: (1 - gain * (tuning.pool_warps == 4)) * (1 + noise * numbers.uniform(-1, 1))  # noqa: B023
        )
        found.run([WARPS])
        assert only(found).kept is kept, only(found)


def test_drift_falls_on_both_alike(search):
    """Each measurement takes 3% longer than the one before it."""
    times = iter(1.03**number for number in range(1000))
    found = search(lambda tuning, call: next(times))
    found.run([WARPS])
    assert not only(found).kept


def test_only_what_a_candidate_changes_is_timed(search):
    timed = []
    found = search(lambda tuning, call: timed.append(call) or 1.0)
    found.run([SLICES])
    assert (only(found).said, timed) == ("changes no launch here", [])
    found.run([WARPS])
    assert len(set(map(id, timed))) == 2  # both layouts of add_relu_pool_, no gather


def test_what_is_much_slower_somewhere_is_left(search):
    def seconds(tuning, call):
        last = call.written[0].is_contiguous(memory_format=torch.channels_last)
        return 1.0 if tuning is DEFAULT else 1.1 if last else 0.5

    found = search(seconds)
    found.run([WARPS])
    said = "9.5% slower: add_relu_pool_ basic 64x5x7 N=2 float16 channels_last"
    assert (only(found).kept, only(found).said) == (False, said)


def test_where_the_time_is_up_what_was_found_stays(search):
    asked = []

    def check_time():
        asked.append(1)
        if len(asked) > 4:  # cells of the first candidate
            raise OutOfTime

    found = search(faster_with_four_warps, check_time=check_time)
    assert not found.run([WARPS, SLICES])
    assert only(found).kept and found.best.pool_warps == 4


# ---- results are checked before a time counts


def spoiled(monkeypatch, spoil):
    """Of launches of four warps, the candidate's, ``spoil`` makes what it likes."""
    run = launch.run

    def planted(variant, programs, *arguments):
        if variant.num_warps == 4:
            spoil(lambda: run(variant, programs, *arguments), arguments)
        else:
            run(variant, programs, *arguments)

    monkeypatch.setattr(launch, "run", planted)


def _add_to(place, value=1):
    def spoil(run, arguments):
        run()
        arguments[place].add_(value)

    return spoil


def _does_nothing(run, arguments):
    pass


def _raises(run, arguments):
    raise RuntimeError("out of resource: shared memory\nRequired: 1")


def _is_right(run, arguments):
    run()


BLOCK = Candidates("block_warps", (8,), "a test")  # 4 for planes this small


@pytest.mark.parametrize(
    ("op", "candidates", "spoil", "said"),
    [
        ("add_relu_pool_", WARPS, _add_to(2), "another sum"),
        ("add_relu_pool", WARPS, _add_to(3, 0.1), "pooled off by "),
        ("add_relu_pool", WARPS, _does_nothing, "another sum"),
        ("select_channels", Candidates("layer_warps", (4,), ""), _add_to(6, -1), "another index"),
        ("select_channels", Candidates("layer_warps", (4,), ""), _does_nothing, "another index"),
        ("mod_block_", BLOCK, _does_nothing, "another index"),
        ("mod_block", BLOCK, _add_to(1, 4), "another channel that passes through"),
        ("mod_block_", BLOCK, _add_to(8), "logits off by "),
        ("mod_block_", BLOCK, _add_to(11), "another counters"),
        ("mod_block_", BLOCK, _raises, "does not run (RuntimeError: out of resource: shared memory)"),
    ],
)
def test_a_candidate_with_other_results_is_left_however_fast(search, monkeypatch, op, candidates, spoil, said):
    found = search(lambda tuning, call: 1.0 if tuning is DEFAULT else 0.1, ops=(op,))
    with monkeypatch.context() as patch:
        spoiled(patch, spoil)
        found.run([candidates])
    assert not only(found).kept
    assert only(found).said.startswith(said)
    assert found.best is DEFAULT
    # Without the fault it is kept, after a call that left anything behind too: what is written is restored.
    found.verdicts.clear()
    found.run([candidates])
    assert only(found).kept, only(found)


@pytest.mark.parametrize("op", tune_cells.OPS)
def test_what_a_call_writes_is_as_it_was_at_every_measurement(search, op, monkeypatch):
    """The timer calls as the GPU's does, several times on the same tensors."""
    monkeypatch.setattr(tune_search, "ROUNDS", 3)
    seen = []

    def seconds(tuning, call):
        seen.append(all(torch.equal(a, b) for a, b in zip(call.written, call.kept, strict=True)))
        call.run(), call.run()
        return 1.0

    candidates = [WARPS, BLOCK, Candidates("tail_warps", (8,), ""), Candidates("max_block_hw", (16,), "")]
    search(seconds, ops=(op,), start=dataclasses.replace(DEFAULT, plane_channels=16, plane_k=16)).run(candidates)
    assert seen and all(seen)


def test_a_call_that_is_not_restored_would_be_seen(cells, interpreter):
    """In place, another call on what the first one left gives something else."""
    for cell in cells:
        if cell.op in ("mod_block_", "tail_", "fuse_channels_", "add_relu_pool_"):
            call = cell.open()
            first = call.results()
            assert tune_cells.difference(first, call.results()) == ""
            assert tune_cells.difference(first, call.read(call.run())) != ""


def test_what_a_candidate_does_not_write_is_not_what_the_call_before_left_there():
    torch.use_deterministic_algorithms(False)  # off, as in the tests' fixture it is not
    call = tune_cells.Call(lambda: torch.empty(3), lambda y: tune_cells.Results({"y": y}, {}), (), ())
    assert call.results().equal["y"].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- the candidates


def test_candidates_are_tunings_and_change_something():
    for candidates in CANDIDATES:
        own = candidates.of(DEFAULT)
        for value in candidates.values:
            changed = candidates.with_value(DEFAULT, value)
            assert value != own and candidates.of(changed) == value
            assert sum(a != b for a, b in zip(*map(_values, (changed, DEFAULT)), strict=True)) == 1
        assert len(set(candidates.values)) == len(candidates.values) and candidates.reason


def _values(tuning):
    return dataclasses.astuple(tuning)


def test_every_field_has_candidates():
    assert {candidates.field for candidates in CANDIDATES} == {field.name for field in dataclasses.fields(DEFAULT)}


def test_candidates_give_the_untuned_results(interpreter):
    """As far as blocks small enough for the interpreter show it: each is right, most change something."""
    small = tune.all_cells([Shape("bottleneck", 128, 9, 8)], [1], [torch.float32], "cpu")
    found = Search(DEFAULT, small, lambda call: lambda: 1.0, -1)
    found.run()
    wrong = [str(one) for one in found.verdicts if "cells" not in one.said and "no launch" not in one.said]
    assert not wrong
    assert sum("cells" in verdict.said for verdict in found.verdicts) >= 15


# ---- the whole


@pytest.fixture
def tuned(interpreter, cells, monkeypatch, tmp_path):
    """tune.tune on the tiny cells with a timer of the test's; also its file."""
    monkeypatch.setenv("MOD_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(in_force, "names", lambda device: ("NVIDIA L4", "3.8.0"))
    monkeypatch.setattr(in_force, "built_in", lambda device: DEFAULT)
    monkeypatch.setattr(tune, "all_cells", lambda *_: [cell for cell in cells if cell.op == "add_relu_pool"])

    def run(seconds, budget_s=1000.0):
        def timer(call):
            tuning = in_force.of_device(-1).tuning
            return lambda: seconds(tuning)

        monkeypatch.setattr(tune, "graph_timer", timer)
        return tune.tune([], [], [], budget_s)

    return run, tuning_file.path_of("NVIDIA L4", "3.8.0")


def test_what_was_found_is_in_the_file(tuned):
    run, path = tuned
    assert run(faster_with_four_warps) == (path, True, "pool_warps=4")
    found = tuning_file.load(path, "NVIDIA L4", "3.8.0")
    assert dataclasses.asdict(found) == dataclasses.asdict(DEFAULT) | {"pool_warps": 4}
    assert "kept pool_warps 4: 22.3% faster over 2 cells" in path.read_text()


def test_a_search_starts_from_the_built_in_numbers_again(tuned):
    run, path = tuned
    run(faster_with_four_warps)
    assert run(lambda tuning: 1.0) == (path, True, "")
    assert dataclasses.asdict(tuning_file.load(path, "NVIDIA L4", "3.8.0")) == dataclasses.asdict(DEFAULT)


def test_a_search_without_time_finds_nothing_and_says_so(tuned):
    run, path = tuned
    assert run(faster_with_four_warps, budget_s=-1.0) == (path, False, "")


def test_ctrl_c_leaves_the_file_as_it_was(tuned):
    run, path = tuned
    run(faster_with_four_warps)
    before, measured = path.read_text(), []

    def stop(tuning):
        measured.append(1)
        if len(measured) > 50:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]
    assert in_force.of_device(-1).tuning is DEFAULT


def test_on_a_gpu(device):
    """The real timer, on two cells: times are those of kernels, not of Python, and x is as it was."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    place = torch.cuda.current_device()
    some = [cell for cell in tune.all_cells([Shape("bottleneck", 256, 56, 56)], [8], [torch.float16])]
    some = [cell for cell in some if cell.op in ("mod_block_", "add_relu_pool")]
    found = Search(in_force.built_in(place), some, graph_timer, place)
    with torch.inference_mode():
        assert found.run([WARPS, Candidates("block_warps", (8,), "a test")])
        call = some[0].open()
        call.restore()
        assert 1e-6 < graph_timer(call)() < 1e-3
    assert not [
        str(verdict) for verdict in found.verdicts if "cells" not in verdict.said and "slower" not in verdict.said
    ]

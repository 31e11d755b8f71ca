"""Inputs in turn: how many, in which order, and refilled."""

import torch

from mod_kernels.bench import blocks, rotation, store
from mod_kernels.bench.rotation import Rotation, copies_of
from mod_kernels.bench.shapes import Shape

SHAPE = Shape("bottleneck", 256, 7, 5)


def test_together_they_are_twice_the_last_level_cache(monkeypatch):
    monkeypatch.setattr(rotation, "_cache_bytes", lambda: 1000)
    assert [copies_of(size) for size in (1, 999, 1000, 1999, 2000, 5000)] == [2000, 3, 2, 2, 1, 1]


def test_a_machine_that_does_not_say_rotates_nothing(monkeypatch):
    monkeypatch.setattr(rotation, "_cache_bytes", lambda: 0)
    assert copies_of(1) == 1


def test_cold_calls_go_through_all_of_them_in_turn():
    turn, seen = Rotation(torch.zeros(2), 3, cold=True), []
    call = turn.calling(lambda x: seen.append(x.data_ptr()))
    for _ in range(7):
        call()
    assert len(set(seen[:3])) == 3 and seen[3:6] == seen[:3] and seen[6] == seen[0]


def test_refilling_cold_begins_with_the_one_written_longest_ago():
    turn, x = Rotation(torch.zeros(2), 3, cold=True), torch.tensor([1.0, 2.0])
    call = turn.calling(lambda given: given.add_(1))
    call()
    turn.prepare(refill_with=x)
    assert torch.equal(call(), x + 1) and turn.first is not x
    assert torch.equal(turn.first, x + 1)
    assert torch.equal(call(), x + 1) and torch.equal(call(), x + 1)


def test_a_warm_sample_stays_in_one_place_and_the_next_are_spread_over_all():
    turn, x = Rotation(torch.zeros(2), 3), torch.tensor([1.0, 2.0])
    call, samples = turn.calling(lambda given: (given.data_ptr(), given.add_(1).clone())), []
    for _ in range(30):
        turn.prepare(refill_with=x)
        (place, once), (again, twice) = call(), call()
        assert place == again
        assert torch.equal(once, x + 1) and torch.equal(twice, x + 2)
        samples.append(place)
    assert len(set(samples)) == 3


def test_large_tensors_have_fewer_places():
    assert [rotation.places_of(size) for size in (1, 32 << 20, 65 << 20, 1 << 30)] == [8, 8, 3, 1]


def test_cold_cells_are_those_whose_x_would_stay_in_the_cache(monkeypatch):
    monkeypatch.setattr(rotation, "_cache_bytes", lambda: 2 * 256 * 35 * 4)
    plan = blocks.Plan((SHAPE,), batches=(1, 3, 8))
    assert [(cell.batch, cell.cache) for cell in blocks.cells(plan)] == [
        (1, "warm"),
        (1, "cold"),
        (3, "warm"),
        (3, "cold"),
        (8, "warm"),
    ]


def test_a_cold_cell_measures_every_provider_on_tensors_of_its_own(monkeypatch):
    monkeypatch.setattr(rotation, "_cache_bytes", lambda: 3 * 256 * 35 * 4)
    made = []
    real = Rotation.__init__

    def counted(self, first, copies, cold=False):
        made.append((copies, cold))
        real(self, first, copies, cold)

    monkeypatch.setattr(Rotation, "__init__", counted)
    plan = blocks.Plan((SHAPE,), (1,), compile_batches=(), rounds=2)
    results = store.Results({}, "")
    blocks.run(plan, results, lambda *_: None)
    caches = {cache: {row.provider for row in results.rows if row.cache == cache} for cache in ("warm", "cold")}
    assert caches["warm"] == caches["cold"] and "plain-inplace" in caches["cold"]
    assert {one for one in made if one[0] > 1} == {(8, False), (6, True)}
    assert all(row.check in ("ok", "none") for row in results.rows if row.provider != "compile")

"""The scaling suite: its points, what a row says of k, and where break-even lies."""

import pytest
import torch

from mod_kernels.bench import blocks, providers, scaling
from mod_kernels.bench.providers import Provider
from mod_kernels.bench.scaling import ShapeOfK, break_even
from mod_kernels.bench.store import Results, Row

BASE = (ShapeOfK("bottleneck", 256, 14, 14, 4), 8)


def test_the_points_vary_one_thing_at_a_time():
    found = scaling.points()
    assert len(found) == len(set(found)) == 11 + 8 + 7 + 9 - 3  # the base point is on every axis
    assert BASE in found and (ShapeOfK("bottleneck", 4096, 14, 14, 64), 8) in found
    assert (ShapeOfK("bottleneck", 256, 14, 14, 256), 8) in found
    assert (ShapeOfK("bottleneck", 256, 112, 112, 4), 8) in found
    quick = scaling.points(quick=True)
    assert set(quick) < set(found) and BASE in quick
    assert {batch for _, batch in quick} == {1, 4, 8, 16, 64, 256, 1024}


@pytest.fixture
def small(monkeypatch):
    """Two points, one of a k of its own, and one that is too large."""
    given = [(64, 1, 2), (64, 2, 2), (4 << 20, 1, 1)]
    shapes = [(ShapeOfK("bottleneck", channels, 3, 3, k), batch) for channels, k, batch in given]
    monkeypatch.setattr(scaling, "points", lambda quick: shapes)
    monkeypatch.setattr(scaling, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(scaling, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(blocks, "bandwidth_gbs", lambda device: 10.0)


def measured(results, labels):
    scaling.run((1,), results, lambda label, *_: labels.append(label), quick=True)


def test_rows_say_k_where_it_is_not_the_papers(small):
    results, labels = Results({}, ""), []
    for _ in range(2):  # the second time there is nothing to do
        measured(results, labels)
    assert labels == ["64x3x3 k=1 N=2 1 thread(s)", "64x3x3 k=2 N=2 1 thread(s)"]
    assert {(row.k, row.provider) for row in results.rows if "plain" in row.provider} == {
        (k, f"plain-{ending}") for k in (None, 2) for ending in ("clone", "cat", "inplace")
    }
    assert not [row for row in results.rows if row.check.startswith("wrong")]
    assert results.notes == ["x would take more than 1 GiB, left out: 4194304x3x3 k=1 N=1 1 thread(s)"]


def test_a_wrong_provider_gets_no_time(small, monkeypatch):
    real = providers.plain_provider

    def wrong(ending, spec):
        def run(x):
            y, scores, index = real("clone", spec).run(x)
            return (y + 1 if ending == "cat" else y), scores, index

        return Provider(f"plain-{ending}", run, run)

    monkeypatch.setattr(providers, "plain_provider", wrong)
    results = Results({}, "")
    measured(results, [])
    found = {row.check.partition(":")[0]: row.median_ms for row in results.rows if row.provider == "plain-cat"}
    assert found == {"wrong": None}
    assert all(row.median_ms > 0 for row in results.rows if row.provider == "plain-clone")


def rows(name, batch, plain, ours, k=None, threads=1):
    where = (name, "bottleneck", batch, threads, "cpu", "float32", "eager", "warm")
    times = {"plain-clone": 2 * plain, "plain-inplace": plain, "cpu": ours and ours / 4, "cpu-inplace": ours}
    return [Row(*where, provider, "ok", median_ms=ms, k=k) for provider, ms in times.items()]


BASE_ROWS = rows("256x14x14", 8, 3.0, 2.0)


def test_break_even_lies_between_the_points_where_the_sign_turns():
    given = [*BASE_ROWS, *rows("256x14x14", 8, 1.0, 2.0, k=64), *rows("256x14x14", 8, 2.2, 2.0, k=32)]
    (axis,) = break_even(given)
    assert axis.points == ((4, 1.5), (32, pytest.approx(1.1)), (64, 0.5))
    assert str(axis) == (
        "k, float32, 1 thread(s): ahead at 2 of 3 points, even between k = 32 (1.10) and 64 (0.50)"
    )


def test_an_axis_without_a_turn_is_said_to_have_none():
    ahead, behind = (rows("256x14x14", 1, *times) for times in ((4.0, 1.0), (1.0, 4.0)))
    (axis,) = break_even([*ahead, *BASE_ROWS])
    assert str(axis) == "N, float32, 1 thread(s): ahead everywhere, N = 1 to 8 (plain / ours 1.50 to 4.00)"
    axis = scaling.Axis("N", "graph", tuple((value, 0.25) for value in (1, 8)))
    assert str(axis).startswith("N, graph: behind everywhere, N = 1 to 8")
    assert len(break_even(behind)) == 0  # one point is no axis


def test_the_base_point_is_on_every_axis_and_k_follows_the_channels():
    given = [
        *BASE_ROWS,
        *rows("256x28x28", 8, 3.0, 1.0),
        *rows("1024x14x14", 8, 5.0, 1.0),  # k = 16, as C // 64 is
        *rows("256x14x14", 8, 4.0, 1.0, k=8),
        *rows("256x14x14", 32, 6.0, 1.0),
        *rows("256x14x14", 8, 1.0, 1.0, threads=2),  # another way of running: a point by itself
    ]
    found = {axis.name: axis.points for axis in break_even(given)}
    assert found == {
        "N": ((8, 1.5), (32, 6.0)),
        "H=W": ((14, 1.5), (28, 3.0)),
        "C": ((256, 1.5), (1024, 5.0)),
        "k": ((4, 1.5), (8, 4.0)),
    }


def test_a_point_without_a_time_is_left_out():
    given = [*BASE_ROWS, *rows("256x14x14", 1, 1.0, None)]
    given = [row for row in given if not (row.batch == 1 and row.provider == "cpu-inplace")]
    assert break_even(given) == []


def test_a_base_shape_makes_a_block_of_its_k():
    spec = scaling.blocks.make_spec(ShapeOfK("bottleneck", 256, 2, 2, 32), torch.float32, "cpu")
    assert spec.k == 32

"""What every picture shows, worked out from rows without drawing."""

import pytest

from mod_kernels.report import bars, heatmap, memory, paper, roofline, scaling, sweep, timeline

from . import made


def test_the_heat_map_is_the_fastest_plain_form_over_ours_in_place():
    heat = heatmap.data(made.cell(3.0, 1.0, batch=8) + made.cell(0.5, 1.0, batch=1))
    assert (heat.rows, heat.columns) == (("256x14x14",), (1, 8))
    assert {key: pair.ratio for key, pair in heat.cells.items()} == {("256x14x14", 8): 3.0, ("256x14x14", 1): 0.5}
    assert heatmap.said(heat.cells["256x14x14", 8]) == "plain-inplace 3 ms, cpu-inplace 1 ms"


def test_the_heat_map_of_training_has_ours_by_copy():
    rows = [
        made.row(name, ms, mode="train") for name, ms in (("plain-cat", 6.0), ("cpu", 2.0), ("cpu-inplace", 1.0))
    ]
    assert [pair.ratio for pair in heatmap.data(rows).cells.values()] == [3.0]


def test_the_heat_map_of_ops_has_a_line_for_each_and_none_for_fed():
    times = {"add_relu:plain": 4.0, "add_relu:cpu": 2.0, "add_relu:cpu fed": 1.0, "gather:cpu": 1.0}
    heat = heatmap.data([made.row(provider, ms, kind="op") for provider, ms in times.items()])
    assert {key: pair.ratio for key, pair in heat.cells.items()} == {("add_relu 256x14x14", 8): 2.0}


def test_a_cell_without_a_time_of_both_has_no_ratio():
    rows = [made.row("plain-cat", None, check="wrong: off"), made.row("cpu-inplace", 1.0)]
    assert heatmap.data(rows).cells == {}


def test_shades_are_of_the_ratio_alike_on_both_sides_of_one():
    assert heatmap.shade(1.0)[1] == 0
    assert heatmap.shade(4.0)[1] == heatmap.shade(0.25)[1] > heatmap.shade(2.0)[1] > 0
    assert heatmap.shade(4.0)[0] != heatmap.shade(0.25)[0]
    assert heatmap.shade(100.0)[1] == heatmap.MOST_OPAQUE


def test_the_roofline_has_rates_and_both_floors():
    rows = made.cell(2.0, 0.5, bytes=4_000_000, bandwidth_gbs=20.0) + made.cell(9.0, 1.0, batch=1)  # bytes unknown
    calls = [
        made.row("op", 0.02, name="select_channels", kind="op"),
        made.row("op", 0.03, name="mod_block_", kind="op"),
    ]
    calls += [
        made.row("torch.add", 0.001, kind="op"),
        made.row("op", 0.001, name="mod_block_", kind="op", threads=2),
    ]
    line = roofline.data(rows, calls)
    assert (line.plain, line.ours) == (((4.0, 2.0),), ((4.0, 8.0),))
    assert (line.bandwidth_gbs, line.call_ms) == (20.0, 0.03)
    assert roofline.data(rows).call_ms is None


def test_the_time_line_keeps_the_rest_of_the_network_apart():
    plain, fused = timeline.data(made.profile())
    assert (plain.way, plain.parts, plain.rest_ms) == ("plain", (("pool", 2.0), ("add", 1.0)), 40.0)
    assert (fused.way, fused.total_ms, fused.rest_ms) == ("fused", 1.5, None)


def test_scaling_sorts_cells_to_axes_and_finds_where_they_break_even():
    curves = {curve.axis: curve for curve in scaling.data(made.scaling())}
    assert {axis: [x for x, _, _ in curve.points] for axis, curve in curves.items()} == {
        "N": [1, 8, 64],
        "H*W": [196, 784],
        "C": [256, 1024],
        "k": [4, 16],
    }
    assert curves["C"].points == ((256, 1.0, 0.5), (1024, 2.0, 8.0))
    # log(ours / plain) goes from log(1/2) to log(4): a third of the way, which is two octaves.
    assert curves["C"].break_even == pytest.approx((256 * 4 ** (1 / 3),))
    assert curves["C"].verdict == "break-even at C = 406"
    assert (curves["N"].break_even, curves["N"].verdict) == ((), "ours faster all along")


def test_the_papers_speedup_stands_beside_that_of_the_fastest_plain_form():
    run = made.table()
    line = paper.data(run.rows, run.networks)[0]
    assert (line.network, line.printed) == ("resnet50_mod", 1.48)
    assert (line.plain, line.fused, line.identity) == ((1.5, 1.4, 1.6), (1.8, 1.7, 1.9), None)
    eager = paper.accuracy(run.rows, run.networks, optimized=False)
    assert eager["dense"] == [(90.0, 76.0, "resnet50")]
    assert (60.0, 75.0, "resnet50_mod") in eager["MoD, plain PyTorch"]
    assert paper.data(run.rows, {})[0].printed is None


def test_the_sweep_rises_in_c():
    run = made.sweep()
    found = sweep.data([row for row in run.rows if row.kind == "sweep"])
    assert found["resnet50_mod"]["ours"] == [(2, 55.0), (64, 50 + 10 / 64)]
    blocks = sweep.data([row for row in run.rows if row.kind != "sweep"])
    assert blocks["256x14x14"]["plain"] == [(2, 1.0), (64, 2.0 / 64)]


def test_bars_leave_the_place_of_a_missing_time_empty():
    shapes, times = bars.data(tuple(made.block(batches=(1,))))[1]
    assert shapes == ["256x56x56", "2048x7x7"]
    assert (times["ours"], times["compile"]) == ([0.5, 0.5], [None, None])


def test_peaks_of_memory():
    rows = [made.row("plain-cat", None, peak_mib=3.0), made.row("cpu", None, peak_mib=1.0), made.row("floor")]
    assert memory.peaks(rows) == (
        ["256x14x14 N=8"],
        ["plain-cat", "cpu"],
        {("256x14x14 N=8", "plain-cat"): 3.0, ("256x14x14 N=8", "cpu"): 1.0},
    )

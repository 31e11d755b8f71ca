"""The page and the pictures as they are written: complete, self-contained, quick, and without matplotlib too."""

import re
import sys
import time

import pytest
from typer.testing import CliRunner

from mod_kernels import cli
from mod_kernels.bench import store
from mod_kernels.report import NoResults, make, picture

from . import made

runner = CliRunner()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page of every suite, and its folder of pictures."""
    pytest.importorskip("matplotlib")
    folder = made.save_all(made.every_suite(), tmp_path_factory.mktemp("results"))
    out, pictures = folder / "page" / "report.html", folder / "pictures"
    assert make([folder], out, pictures, "svg") == []
    return out.read_text(), pictures / "made-up-2c-avx2-l1d32k"


def test_every_suite_has_its_picture(everything):
    page, folder = everything
    assert sorted(path.stem for path in folder.iterdir()) == [
        "block-bottleneck-float32-threads1",
        "block-bottleneck-float32-threads1-heat",
        "memory-bottleneck-float32-threads1",
        "network-train-network-float32-threads1-heat",
        "network-train-resnet75_mod-n16-memory",
        "ops-op-float32-threads1-heat",
        "profile-part-float32-threads1",
        "roofline-cpu-threads1",
        "scaling-bottleneck-float32-threads1",
        "scaling-bottleneck-float32-threads1-heat",
        "sweep-n1-threads1",
        "sweep-sweep-block-float32-threads1-heat",
        "sweep-sweep-float32-threads1-heat",
        "table-n1-threads1",
        "table-n1-threads1-speedups",
        "table-paper-float32-threads1-heat",
    ]
    # Heat maps are tables in the page.
    assert page.count("<svg") == len([one for one in folder.iterdir() if not one.stem.endswith("-heat")])
    assert "0123456789ab, 2026-01-01" in (folder / "roofline-cpu-threads1.svg").read_text()


def test_the_page_loads_nothing(everything):
    page, _ = everything
    named = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert named
    assert all((href or url).startswith("#") for href, url in named)
    assert not re.search(r"<(script|link|img|iframe|object)\b", page)
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page


def test_pictures_take_the_pages_colour_and_share_no_names(everything):
    page, _ = everything
    assert picture.INK not in page
    assert "currentColor" in page
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(names)
    assert page.count('role="img" aria-label="') == page.count("<svg")


def test_sections_are_signed_and_say_what_was_measured(everything):
    page, _ = everything
    assert page.count("commit 0123456789ab, 2026-01-01 00:00 UTC; mod-kernels bench ") == len(made.every_suite())
    assert "geometric mean 4.00" in page
    assert "a note" in page
    assert "compile: left out: time (256x56x56 N=1, " in page
    assert "C: break-even at C = 406" in page
    assert "1.80 (1.70 to 1.90)" in page


def test_what_files_hold_is_text_and_no_markup(tmp_path):
    rows = [*made.cell(2.0, 1.0, name="<script>x</script>"), made.row("<b>", check="left out: <i>")]
    store.save(made.results("<u>", rows), tmp_path / "a.jsonl")
    make([tmp_path], tmp_path / "r.html")
    assert not re.search(r"<(script|b|i|u)>", (tmp_path / "r.html").read_text())


def test_problems_stand_at_the_top(tmp_path):
    store.save(made.results("block", made.cell(2.0, 1.0)), tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"schema": 2, "run"')
    (problem,) = make([tmp_path], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "is cut off" in problem
    assert page.index(problem) < page.index("<h2")
    assert "2.00</td>" in page


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch):
    made.save_all(made.every_suite(), tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = runner.invoke(
        cli.app, ["report", str(tmp_path), "--out", str(tmp_path / "r.html"), "--pictures", str(tmp_path / "p")]
    )
    page = (tmp_path / "r.html").read_text()
    assert done.exit_code == 0
    assert done.stderr.count("no pictures: matplotlib can't be imported") == 1
    assert "no pictures: matplotlib can&#x27;t be imported" in page
    assert "<svg" not in page
    assert "4.00</td>" in page


def test_a_page_that_cant_be_written_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # quicker
    made.save_all([made.results("block", made.cell(2.0, 1.0))], tmp_path)
    out = tmp_path / "block.jsonl" / "r.html"
    done = runner.invoke(cli.app, ["report", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"mod-kernels: {out} can't be written: File exists"


def test_pictures_that_cant_be_written_leave_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    made.save_all([made.results("block", made.cell(2.0, 1.0))], tmp_path)
    (problem,) = make([tmp_path], tmp_path / "r.html", tmp_path / "block.jsonl")
    assert problem == f"no pictures in {tmp_path}/block.jsonl: Not a directory"
    assert "2.00</td>" in (tmp_path / "r.html").read_text()


def test_nothing_to_report_writes_nothing(tmp_path):
    (tmp_path / "old.jsonl").write_text('{"schema": 1}\n')
    with pytest.raises(NoResults, match=r"lines of schema 1 left out.*no results to report"):
        make([tmp_path], tmp_path / "r.html")
    done = runner.invoke(cli.app, ["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 2
    assert not (tmp_path / "r.html").exists()


def test_a_report_of_ten_thousand_rows_takes_under_ten_seconds(tmp_path):
    pytest.importorskip("matplotlib")
    shapes = tuple(f"{c}x{s}x{s}" for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7)))
    count = 0
    for machine in (made.MACHINE, made.OTHER_MACHINE):
        rows = []
        for kind in ("bottleneck", "basic", "inverted_residual", "conv", "convnext"):
            for dtype in ("float32", "bfloat16", "float16"):
                for layout in ("nchw", "channels_last"):
                    for threads in (1, 2):
                        run = {"kind": kind, "dtype": dtype, "layout": layout, "threads": threads}
                        rows += made.block(shapes, (1, 8, 32), bandwidth_gbs=20.0, **run)
        folder = tmp_path / machine["cpu"]
        made.save_all([made.results("block", rows, machine=machine), *made.every_suite()], folder)
        count += len(rows)
    assert count >= 10_000
    started = time.perf_counter()
    make([tmp_path], tmp_path / "r.html")
    seconds = time.perf_counter() - started
    print(f"{count} rows in {seconds:.1f} s")
    assert f"{count:d}"[:2] in (tmp_path / "r.html").read_text()
    assert seconds < 10

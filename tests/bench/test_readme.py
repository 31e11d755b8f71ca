"""README's tables and pictures are what the committed results say."""

import re

import pytest

from benchmarks import plot, readme_table
from benchmarks.readme_table import README, ROOT
from mod_kernels.bench.store import Results, Row
from mod_kernels.report.collect import Group

PICTURES = re.findall(r"\]\((benchmarks/results/\S+\.png)\)", README.read_text())


def test_the_tables_are_made_of_the_results_they_name():
    readme = readme_table.README.read_text()
    assert readme_table.filled(readme) == readme, "make figures"


def test_a_file_without_markers_is_refused():
    blocks = "<!-- blocks, from benchmarks/results -->\n<!-- end of blocks -->\n"
    with pytest.raises(ValueError, match=r"README.md has no markers around blocks"):
        readme_table.filled("# mod_kernels\n")
    with pytest.raises(ValueError, match=r"README.md has no markers around the paper's table"):
        readme_table.filled(blocks)


def test_a_line_of_blocks_has_the_mean_and_the_worst_of_its_cells():
    def cell(batch, **times):
        names = {"clone": "plain-clone", "inplace": "plain-inplace", "compiled": "compile"}
        names |= {"ours": "cpu-inplace", "copying": "cpu"}
        where = ("256x56x56", "bottleneck", batch, 1, "cpu", "float32", "eager", "warm")
        return [Row(*where, names.get(name, name), "ok", median) for name, median in times.items()]

    rows = cell(1, clone=8.0, inplace=4.0, compiled=3.0, ours=2.0, copying=4.0, floor=1.0)
    rows += cell(8, clone=4.0, inplace=3.0, ours=2.0, floor=4.0)
    rows += cell(32, clone=4.0)  # ours was not timed: no ratio, and no cell
    run = Results({"commit": "0123456789ab"}, "mod-kernels bench", rows)
    line = readme_table.group_line(Group("block", run, tuple(rows)))
    figures = ("2.83 (2.00)", "1.50 (1.50)", "2.00 (2.00)", "1.00 (2.00)")
    assert line[0] == "bottleneck" and line[2:] == ("2", *figures, "0123456")
    assert readme_table.group_line(Group("block-train", run, tuple(rows)))[5:7] == ("-", "-")


def test_a_column_that_a_run_has_nothing_for_is_left_out():
    headings = {
        batch: re.search(rf"^N = {batch}, .+\n\n\| (.+) \|$", README.read_text(), re.MULTILINE)[1].split(" | ")
        for batch in (1, 8, 32)
    }
    assert "openvino" in headings[1] and "share, optimized" in headings[1]
    assert "openvino" in headings[8] and "share, optimized" not in headings[8]  # older than that share
    assert "openvino" not in headings[32] and "share, optimized" in headings[32]  # of a run without --peers


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_is_no_older_than_its_results(picture):
    path = ROOT / picture
    kept = re.search(rb"tEXtSource\x00(\S+ sha256:[0-9a-f]{64})", path.read_bytes())
    assert kept, "make figures"
    said = kept[1].decode()
    assert said == plot.source_of(path.with_name(said.split()[0])), "make figures"


def test_readme_has_pictures():
    assert len(PICTURES) >= 4

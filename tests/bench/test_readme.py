"""README's table and pictures are what the committed results say."""

import re

import pytest

from benchmarks import plot, readme_table
from benchmarks.readme_table import README, ROOT

PICTURES = re.findall(r"\]\((benchmarks/results/\S+\.png)\)", README.read_text())


def test_the_table_is_made_of_the_results_it_names():
    readme = readme_table.README.read_text()
    assert readme_table.filled(readme) == readme, "make figures"


def test_a_file_without_markers_is_refused():
    with pytest.raises(ValueError, match=r"README.md has no markers around the paper's table"):
        readme_table.filled("# mod_kernels\n")


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_is_no_older_than_its_results(picture):
    path = ROOT / picture
    kept = re.search(rb"tEXtSource\x00(\S+ sha256:[0-9a-f]{64})", path.read_bytes())
    assert kept, "make figures"
    said = kept[1].decode()
    assert said == plot.source_of(path.with_name(said.split()[0])), "make figures"


def test_readme_has_pictures():
    assert len(PICTURES) >= 4

"""README's table is what the committed results say."""

import pytest

from benchmarks import readme_table


def test_the_table_is_made_of_the_results_it_names():
    readme = readme_table.README.read_text()
    assert readme_table.filled(readme) == readme, "make figures"


def test_a_file_without_markers_is_refused():
    with pytest.raises(ValueError, match=r"README.md has no markers around the paper's table"):
        readme_table.filled("# mod_kernels\n")

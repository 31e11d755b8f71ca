"""What every picture has around it."""

import re

import pytest

from mod_kernels.bench.machine import signature
from mod_kernels.report import picture
from mod_kernels.report.picture import WIDTH, Picture

from .made import MACHINE


@pytest.mark.parametrize(
    "cpu", ["Made Up", "A Processor With a Name That Is Longer Than Most, 64 Cores at 2.6 GHz"]
)
def test_a_signature_stays_within_the_picture(cpu, tmp_path):
    pytest.importorskip("matplotlib")
    machine, path = MACHINE | {"cpu": cpu}, tmp_path / "picture.svg"
    picture.save(Picture("picture", "Title", "", machine, (WIDTH, 1.0), lambda figure: None), path)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text())
    lines = texts[texts.index("Title") + 1 :]
    assert " ".join(lines) == signature(machine)
    assert len(lines) == 1 + (cpu != "Made Up")
    # A letter of 7 points is some 4 points wide.
    assert all(len(line) * 4 < WIDTH * 72 * 1.06 for line in lines)

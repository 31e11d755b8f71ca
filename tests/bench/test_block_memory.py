"""Memory of a block's call: what is known of it beforehand, and nothing for a provider that is wrong."""

import pytest
import torch

from mod_kernels import backends
from mod_kernels.backends.native import CPU
from mod_kernels.bench import block_memory, providers, training
from mod_kernels.bench.providers import Provider
from mod_kernels.bench.shapes import Shape
from mod_kernels.bench.store import Results

SHAPE = Shape("bottleneck", 256, 16, 16)
X_MIB = 4 * 256 * 16 * 16 * 4 / (1 << 20)
ENDINGS = ("clone", "cat", "inplace")


def cell(mode):
    return block_memory.Cell(SHAPE, 4, 1, mode)


def measured(mode):
    return {row.provider: row for row in block_memory.run_cell(cell(mode), "cpu", torch.float32)}


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_a_copy_of_x_is_seen_and_in_place_there_is_none():
    rows = measured("eager")
    assert {row.check for row in rows.values()} == {"ok"}
    assert rows["plain-clone"].peak_mib >= X_MIB and rows["cpu"].peak_mib >= X_MIB
    assert rows["plain-inplace"].peak_mib < X_MIB / 2 and rows["cpu-inplace"].peak_mib < X_MIB / 2
    assert all(row.median_ms is None for row in rows.values())


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_training_takes_the_output_and_the_gradient_of_x():
    rows = measured("train")
    assert rows["plain-inplace"].check.startswith("left out: one of the variables needed")
    for name in ("plain-clone", "plain-cat", "cpu"):
        assert rows[name].check == "ok" and rows[name].peak_mib >= 2 * X_MIB


def test_no_engine_trains_what_is_plain(monkeypatch):
    asked, real = [], training.Step.run

    def run(step):
        asked.append((type(step.module).__name__, backends.requested()))
        return real(step)

    monkeypatch.setattr(training.Step, "run", run)
    measured("train")
    assert set(asked) == {("PlainBlock", "reference"), ("MoDBlock", "cpu")}


def test_a_wrong_provider_gets_no_peak(monkeypatch):
    def wrong(ending, spec):
        def run(x):
            y, scores, index = real(ending, spec).run(x)
            return y * 2, scores, index

        return Provider(f"plain-{ending}", run, run, ending == "inplace")

    real = providers.plain_provider
    monkeypatch.setattr(providers, "plain_provider", wrong)
    rows = measured("eager")
    assert all(rows[f"plain-{ending}"].check.startswith("wrong: ") for ending in ENDINGS)
    assert all(rows[f"plain-{ending}"].peak_mib is None for ending in ENDINGS)
    monkeypatch.setattr(training, "_problem", lambda *_: "gradient 0 off")
    assert {row.check for row in measured("train").values() if row.provider != "plain-inplace"} == {
        "wrong: gradient 0 off"
    }


def test_both_modes_are_cells_of_their_own_and_done_once():
    results, labels = Results({}, ""), []
    for _ in range(2):
        block_memory.run((1,), (1,), results, lambda label, *_: labels.append(label), shapes=(SHAPE,))
    assert labels == results.finished == ["256x16x16 N=1 eager 1 thread(s)", "256x16x16 N=1 train 1 thread(s)"]


def test_an_engine_that_is_not_there_is_left_out(monkeypatch):
    monkeypatch.setattr(block_memory, "ENGINES", {"cpu": "cuda"})
    rows = measured("train")
    assert rows["cuda"].check.startswith("left out: ") and rows["cuda"].peak_mib is None
    assert rows["plain-clone"].peak_mib >= X_MIB

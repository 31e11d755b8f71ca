"""Occupancy and the estimate against cases worked out by hand."""

import pytest

from mod_kernels.backends.triton import estimate, occupancy, sass


@pytest.mark.parametrize(
    ("capability", "num_warps", "registers", "shared", "expected"),
    [
        (90, 8, 32, 0, 1.0),  # 1024 registers a warp, 16 warps a quarter
        (90, 8, 33, 0, 48 / 64),  # 1280: 12 a quarter, 48 warps, 6 programs of 8
        (90, 8, 62, 128, 32 / 64),  # 2048: 8 a quarter
        (86, 8, 62, 128, 32 / 48),
        (90, 4, 255, 0, 8 / 64),  # 8192: 2 a quarter, 2 programs of 4
        (90, 8, 255, 0, 8 / 64),
        (90, 1, 16, 0, 32 / 64),  # 32 programs at most
        (86, 1, 16, 0, 16 / 48),
        (89, 1, 16, 0, 24 / 48),
        (120, 1, 16, 0, 24 / 48),
        (80, 4, 32, 16 * 1024, 36 / 64),  # 17 KB each of 164: 9 programs
        (120, 4, 32, 32 * 1024, 12 / 48),  # 33 KB each of 100: 3 programs
        (100, 4, 32, 100, 64 / 64),  # 1152 bytes each
        (86, 4, 32, 100 * 1024, 0.0),
    ],
)
def test_occupancy(capability, num_warps, registers, shared, expected):
    assert occupancy.occupancy(capability, num_warps, registers, shared) == expected


GPU = estimate.Gpu("made up", multiprocessors=100, clock_ghz=2.0, bandwidth_gbs=4000)  # 20 bytes a clock


def _loop(loads, stores, others):
    names = ["LDG.E.128"] * loads + ["STG.E.128"] * stores + ["FADD"] * others
    return [sass.Instruction(name, 0) for name in names]


def test_a_loop_that_keeps_up_with_the_memory():
    loop = _loop(loads=4, stores=0, others=96)  # 64 bytes a thread in 100 instructions
    found = estimate.estimate(loop, loop[:4], 4_000_000, 1, 1.0, GPU)
    assert found == estimate.Estimate(100, 81.92, 20.0, 1.0, 1.0, 1.0, 1.0)


def test_a_loop_held_up_by_its_instructions():
    loop = _loop(loads=1, stores=0, others=255)  # 16 bytes a thread in 256 instructions: 8 bytes a clock
    found = estimate.estimate(loop, loop[:1], 4_000_000, 1, 0.5, GPU)
    assert (found.bytes_per_clock, found.over_floor, found.floor_us, found.us) == (8.0, 5.0, 1.0, 5.0)


def test_stores_of_the_loop_share_the_memory():
    loop = _loop(loads=2, stores=1, others=61)  # two tensors read, one written
    found = estimate.estimate(loop, loop[:2], 4_000_000, 2, 1.0, GPU)
    assert found.bytes_per_clock == 64.0
    assert found.needed_bytes_per_clock == pytest.approx(20 * 2 / 3)
    assert found.floor_us == pytest.approx(3.0)


def test_every_architecture_that_is_compiled_for_is_known():
    from mod_kernels.backends.triton.compile import CAPABILITIES

    assert set(CAPABILITIES) == set(occupancy.LIMITS) == set(estimate.GPUS)
    # An H100's memory delivers some 13 bytes a clock and multiprocessor.
    assert estimate.GPUS[90].bytes_per_clock == pytest.approx(13, rel=0.05)

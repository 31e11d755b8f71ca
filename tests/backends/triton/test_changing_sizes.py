"""Calls of other sizes in one process: what is kept between calls, plans, variants and counters, fits the next."""

import pytest
import torch

from mod_kernels.backends import _workspace as workspace
from mod_kernels.backends.triton import TRITON

from ...support import feature_map, make_spec
from .checks import check_block, differing_runs, same_bits
from .test_block import WAYS

# (N, C, H, W), k: one or two of them change each time. A batch larger than any before needs more counters; the
# smaller ones after it find those.
SIZES = [
    ((1, 24, 5, 7), 4),
    ((3, 24, 5, 7), 4),
    ((1, 24, 7, 5), 6),
    ((2, 24, 9, 5), 6),
]


@pytest.mark.parametrize(
    "way,op",
    [
        ("pool", "mod_block"),
        ("pool", "mod_block_"),
        ("layers", "mod_block_"),
        ("nothing", "mod_block"),
        ("apart", "mod_block_"),
    ],
)
def test_each_call_is_right_whatever_came_before(way, op, device, with_tuning):
    with_tuning(pool_blocks=((None, 64, 8),), **WAYS[way])
    workspace.forget()
    specs = {k: make_spec(24, k, device=device) for _, k in SIZES}
    inputs = [feature_map(shape, device=device) for shape, _ in SIZES]
    rounds = []
    for _ in range(2):
        results = []
        for value, (_, k) in zip(inputs, SIZES, strict=True):
            x = value.clone()
            result = TRITON.ops[op](x, *specs[k].selector_arguments, None, k, *specs[k].conv_arguments)
            results.append(result if op == "mod_block" else (x, result))
            check_block(value, specs[k], *results[-1])
            assert not any(counters.any() for counters in workspace._of_stream.values())
        rounds.append(results)
    for first, second in zip(*rounds, strict=True):
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_counters_grow_with_the_batch_and_are_then_kept(device):
    workspace.forget()
    held = []
    for samples in (3, 20, 4, 20):
        workspace.counters_for(torch.empty((samples, 1, 1, 1), device=device))
        held += [counters.shape[0] for counters in workspace._of_stream.values()]
    assert held == [4, 32, 32, 32]


def test_runs_that_differ_are_counted(device):
    """The count by which ten thousand runs on a GPU are compared."""
    x, spec = feature_map((2, 24, 5, 7), device=device), make_spec(24, 4, device=device)
    runs = iter(range(100))

    def run():
        y, logits = TRITON.ops["mod_block"](x, *spec.selector_arguments, None, 4, *spec.conv_arguments)
        if next(runs) in (2, 5):
            logits[1, 3] = -logits[1, 3]
        return y, logits

    assert differing_runs(run, 8) == 2
    assert differing_runs(run, 3) == 0

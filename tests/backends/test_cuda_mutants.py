"""What the checks of test_cuda_host.py find in real kernels that were broken on purpose, one thing at a time.

MOD_KERNELS_MUTANTS=all in the environment takes every barrier of the kernels away in turn (some minutes): those
that nothing is found without are not needed, or are not run into by the checks below.
"""

import os
import re
import shutil

import pytest
import torch

from mod_kernels import reference

from ..support import feature_map, make_spec
from .cuda_host_cases import Ops, Program
from .cuda_host_program import KERNELS, ROOT, all_cases, cases, need_sanitizers
from .triton.checks import check_block, check_selection, same_bits

SEEDS = 1  # shuffled orders: what is looked for here shows in forward or reversed
BARRIER = r"(if \(step > 0\) )?(__syncthreads|cluster_sync)\(\);"
# One value further than meant: wrong, and at the end outside of memory.
FURTHER = r"\g<0> + 1"


def places(header, pattern):
    return len(re.findall(pattern, (KERNELS / header).read_text()))


def mutated(folder, header, pattern, number, new):
    """A copy of csrc in which the number-th place that the pattern finds in a header is something else."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu"))
    path = csrc / "cuda" / header
    text = path.read_text()
    place = list(re.finditer(pattern, text))[number]
    path.write_text(text[: place.start()] + place.expand(new) + text[place.end() :])
    return csrc


def findings(path, log, check):
    """What is said of a program's kernels when ``check(program, clusters)`` runs; nothing where all is well."""
    program = Program(path, log)
    try:
        torch.manual_seed(0)
        for clusters in (True, False):
            check(program, clusters)
    except (AssertionError, RuntimeError) as error:
        return str(error) or "the numerics check fails"
    finally:
        program.end()
    return ""


def check_maps(program, clusters):
    ops = Ops(program, clusters, SEEDS).ops
    for layout in ("nchw", "channels_last"):
        a, z = feature_map((2, 20, 30, 35), layout=layout), feature_map((2, 5, 30, 35), layout=layout)
        y, pooled = ops["add_relu_pool"](a, None, True)
        expected, mean = reference.add_relu_pool(a)
        assert same_bits(y, expected), "y is wrong"
        torch.testing.assert_close(pooled, mean, rtol=1e-4, atol=1e-5)
        scores, index = torch.rand(2, 5), torch.stack([torch.randperm(20)[:5] for _ in range(2)])
        index[0, 3] = index[0, 1]
        expected = reference.fuse_channels(a, z, scores, index, "original")
        torch.testing.assert_close(ops["fuse_channels"](a, z, scores, index, "original"), expected)
        ops["fuse_channels_"](y.copy_(a), z, scores, index, "original")
        torch.testing.assert_close(y, expected)
        gathered = ops["input_gradient"](a, None, z, index, None, None, "first")
        torch.testing.assert_close(gathered, reference.fuse_channels(a, z, torch.ones(2, 5), index, "original"))
        dpooled = torch.rand(2, 20)
        dx = ops["input_gradient"](a, dpooled, None, None, None, None, "first")
        torch.testing.assert_close(dx, a + dpooled[:, :, None, None] / 1050)


# On one device or the other: copies in a ring, several blocks a sample, two launches, a tail of its own.
BLOCK_CASES = [
    ((1, 40, 14, 16), 4, 6, "bottleneck", {}),
    ((1, 12, 48, 50), 3, 2, "basic", {"max_cluster": 1}),
    ((2, 96, 14, 14), 4, 6, "convnext", {}),
    ((1, 520, 5, 5), 8, 128, "conv", {}),
    ((1, 40, 7, 7), 32, 4, "basic", {"max_cluster": 1}),
    ((1, 16, 5, 5), 16, 4, "conv", {}),
]


def check_blocks(program, clusters):
    for shape, k, hidden, kind, device in BLOCK_CASES:
        ops = Ops(program, clusters, SEEDS, **device).ops
        for layout in ("nchw", "channels_last"):
            x, spec = feature_map(shape, layout=layout), make_spec(shape[1], k, kind, hidden=hidden)
            selector = spec.selector_arguments
            check_block(x, spec, *ops["mod_block"](x, *selector, None, k, *spec.conv_arguments))
            pooled = torch.randn(shape[:2])
            check_selection(x, spec, *ops["select_channels_saving"](x, *selector, pooled, k)[:3], pooled)
            scores, index, logits, _, means = ops["select_channels_saving"](x, *selector, None, k)
            check_selection(x, spec, scores, index, logits)
            torch.testing.assert_close(means, x.mean((2, 3)), rtol=1e-4, atol=1e-5)


# Family, header, pattern, which of its places, what stands there instead, what the machine or a check says.
MUTANTS = [
    ("maps", "add_relu_pool.cuh", BARRIER, 0, "", "pooled differs from the first launch's"),
    (
        "maps",
        "add_relu_pool.cuh",
        r"block\.sums\[plane(?=\] /)",
        0,
        FURTHER,
        "AddressSanitizer: heap-buffer-overflow",
    ),
    ("block", "mod_block.cuh", r"cluster_sync\(\);", 0, "", "differs from the first launch's"),
    ("block", "selector.cuh", r"slot\(group\)\[unit(?=\])", 0, FURTHER, "logits differs from the first launch's"),
]
HEADERS = {
    "maps": ("add_relu_pool.cuh", "fuse.cuh", "input_gradient.cuh", "map_pieces.cuh"),
    "block": ("mod_block.cuh", "pooling.cuh", "ranking.cuh"),
}
if os.environ.get("MOD_KERNELS_MUTANTS") == "all":
    MUTANTS = [
        (family, header, BARRIER, number, "", "")
        for family, headers in HEADERS.items()
        for header in headers
        for number in range(places(header, BARRIER))
    ]
CHECKS = {"maps": check_maps, "block": check_blocks}


@pytest.fixture(autouse=True)
def compiler():
    need_sanitizers()


@pytest.mark.parametrize("family,header,pattern,number,new,said", MUTANTS)
def test_finds(family, header, pattern, number, new, said, tmp_path, tmp_path_factory):
    csrc = mutated(tmp_path, header, pattern, number, new)
    program = cases(tmp_path_factory, tmp_path, [family], csrc, "-DMOD_KERNELS_FLOAT_ONLY")
    found = findings(program, tmp_path / "log", CHECKS[family])
    assert found and said in found


@pytest.mark.parametrize("family", CHECKS)
def test_finds_nothing_in_kernels_as_they_are(family, tmp_path, tmp_path_factory):
    assert not findings(all_cases(tmp_path_factory), tmp_path / "log", CHECKS[family])

"""How far a kernel may be from float64: one table, for ``verify``, the benchmark and the tests alike.

u is the unit round-off: 2^-53 float64, 2^-24 float32, 2^-11 float16, 2^-8 bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Stage 1, a share of the largest |logit|. The selector works in float32 whatever x is: a mean over H*W up to
# 3136 values, then sums over C up to 2048 and over R up to 128. Summed one by one, the worst case, that is
# 2048 * u = 1.2e-4 for the longest, and rounding seldom adds up that badly; a selector run in float16 is off
# by 1e-3 and must fail. float64: the same lengths times 2^-53 are 2.5e-13, and mean and two layers compound.
LOGITS = {
    torch.float16: 2e-4,
    torch.bfloat16: 2e-4,
    torch.float32: 2e-4,
    torch.float64: 1e-11,
}

# Stage 3, by relative norm, given the kernel's own index and scores. The result is rounded once to its dtype
# (2 u allows for an engine that rounds the branch and then the sum); the convolutions behind it are float32
# sums of at most 9 * 32 products: 288 * u = 1.7e-5 in the worst case, a tenth of that in practice. bfloat16
# has twice 2 u: Triton's interpreter truncates on the way to bfloat16 where a GPU rounds. Scores are held to
# the entry of the dtype they have (float32, or float64), not to x's.
VALUES = {
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


# By relative norm, of the outputs of two right runs of a network of some fifty layers; below float32 plain
# selectors flip between near-equal channels, so that only a gross error can be told.
NETWORKS = {
    torch.float16: 1e-1,
    torch.bfloat16: 1e-1,
    torch.float32: 1e-3,
    torch.float64: 1e-9,
}


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64; NaN where either holds a NaN or an infinity."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return _share(difference, torch.linalg.vector_norm(expected.double()))


def relative_to_largest(actual: Tensor, expected: Tensor) -> float:
    """The largest ``|actual - expected|`` as a share of the largest ``|expected|``."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().amax()
    return _share(difference, expected.double().abs().amax())


def _share(difference: Tensor, scale: Tensor) -> float:
    difference, scale = float(difference), float(scale)
    if difference == 0.0:
        return 0.0
    return difference / scale if scale else float("inf")

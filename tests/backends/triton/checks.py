"""The three stages of the numerics check, for one result of the engine."""

import torch

from mod_kernels import reference
from mod_kernels._tolerances import LOGITS, VALUES, relative_norm, relative_to_largest

from ...support import double


def same_bits(a, b):
    """Shape, dtype and every bit (NaNs and signed zeros included)."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def differing_runs(run, times):
    """Of so many more runs, how many give other bits than the first. Counted where the tensors are: the calls
    follow each other without a wait.
    """
    first = [_bits(one) for one in run()]
    count = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(times):
        again = [_bits(one) for one in run()]
        count += torch.stack([torch.ne(a, b).any() for a, b in zip(first, again, strict=True)]).any()
    return int(count)


def _bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def check_selection(x, spec, scores, index, logits, pooled=None):
    """Stages 1 and 2: logits against float64, the top k of the kernel's own logits, their sigmoids."""
    exact = check_logits(x, spec, logits, pooled)
    check_ranking(spec.k, scores, index, logits)
    if exact.numel():
        slack = 2 * LOGITS[x.dtype] * exact.abs().amax()
        assert (exact.gather(1, index) >= exact.topk(spec.k).values[:, -1:] - slack).all()


def check_logits(x, spec, logits, pooled=None):
    """Stage 1; returns the float64 logits."""
    pooled64 = None if pooled is None else pooled.double()
    exact = reference.selector_logits(x.double(), *double(spec).selector_arguments, pooled=pooled64)
    assert relative_to_largest(logits, exact) <= LOGITS[x.dtype]
    return exact


def check_ranking(k, scores, index, logits):
    """Stage 2 alone, for logits of any kind."""
    assert torch.equal(index, reference.rank_channels(logits, k))
    expected = torch.sigmoid(logits.double().gather(1, index))
    torch.testing.assert_close(scores.double(), expected, rtol=VALUES[torch.float32], atol=1e-30, equal_nan=True)


def check_block(before, spec, y, logits, pooled=None):
    """Stages 1 and 3; ``before`` is x as it went in. Index and scores of a block are those of its own logits."""
    check_logits(before, spec, logits, pooled)
    index = reference.rank_channels(logits, spec.k)
    check_tail(before, spec, y, torch.sigmoid(logits.double().gather(1, index)), index)


def check_tail(before, spec, y, scores, index):
    """Stage 3: the written channels given index and scores, and the others bit for bit."""
    z = reference.narrow_conv_block(reference.gather_channels(before.double(), index), double(spec))
    oracle = reference.fuse_channels(before.double(), z, scores.double(), index, spec.position)
    n, channels = before.shape[:2]
    touched = torch.zeros((n, channels), dtype=torch.bool, device=before.device)
    if spec.position == "original":
        touched.scatter_(1, index, True)
    else:
        first = 0 if spec.position == "first" else channels - spec.k
        touched[:, first : first + spec.k] = True
    assert relative_norm(y[touched], oracle[touched]) <= VALUES[before.dtype]
    assert same_bits(y[~touched], before[~touched])

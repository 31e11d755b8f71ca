"""The check every provider passes before it gets a time: its output against float64, given its own selection."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._tolerances import LOGITS, VALUES, relative_norm
from .._verify_inputs import spec_in_float64
from ..spec import MoDSpec
from .providers import Provider

# Plain code runs the selector in x's dtype, as people write it, so below float32 it is held to that dtype: a
# dozen roundings of the logits. Ours keeps float32 logits and is held to the table.
_LOW_PRECISION = {torch.float16: 2e-2, torch.bfloat16: 1.6e-1}


def exact_logits(x: Tensor, spec: MoDSpec) -> Tensor:
    """The float64 logits (N, C) that the providers of a cell are checked with."""
    pooled = x.mean((2, 3), dtype=torch.float64)
    selector = (tensor if tensor is None else tensor.double() for tensor in spec.selector_arguments)
    return reference.selector_logits(pooled[:, :, None, None], *selector, pooled=pooled)


def check(provider: Provider, x: Tensor, spec: MoDSpec, logits: Tensor, ours: bool) -> str:
    """Say what is wrong with ``provider`` on x, or ``""``; x is left as it is.

    ``logits`` are :func:`exact_logits`; ``ours`` holds the selector to float32 whatever x is. The block's
    position is "first", as everywhere in the benchmark.
    """
    given = x.clone()
    try:
        with torch.inference_mode():
            y, scores, index = provider.checked(given)
    except RuntimeError as error:
        return f"raised: {str(error).partition(chr(10))[0]}"
    if not provider.in_place and not torch.equal(given, x):
        return "wrote into its input"
    if y.shape != x.shape or y.dtype != x.dtype:
        return f"gave {tuple(y.shape)} {y.dtype}"
    tolerance = LOGITS[x.dtype] if ours else _LOW_PRECISION.get(x.dtype, LOGITS[x.dtype])
    problem = _check_selection(logits, scores, index, tolerance)
    if problem:
        return problem
    gathered = reference.gather_channels(x, index).double()
    z = reference.narrow_conv_block(gathered, spec_in_float64(spec))
    expected = x[:, : spec.k].double() + scores.double()[:, :, None, None] * z
    error = relative_norm(y[:, : spec.k], expected)
    if not error <= VALUES[x.dtype]:
        return f"values off by {error:.1e}, {VALUES[x.dtype]:.1e} is allowed"
    if not torch.equal(y[:, spec.k :], x[:, spec.k :]):
        return "changed a channel that passes through"
    return ""


def _check_selection(logits: Tensor, scores: Tensor, index: Tensor, tolerance: float) -> str:
    k = index.shape[1]
    repeated = index.sort(1).values.diff(dim=1).eq(0).any()
    if bool((index < 0).any() | (index >= logits.shape[1]).any() | repeated):
        return "selected channels that repeat or do not exist"
    slack = 2 * tolerance * logits.abs().amax()
    chosen = logits.gather(1, index)
    if bool((chosen < logits.topk(k, dim=1).values[:, -1:] - slack).any()):
        return "selected a channel that is not among the k largest"
    if bool((chosen.diff(dim=1) > slack).any()):
        return "selected in the wrong order"
    error = float((scores.double() - torch.sigmoid(chosen)).abs().amax())
    # A sigmoid's slope is at most a quarter.
    return "" if error <= slack / 4 + tolerance else f"scores off by {error:.1e}"

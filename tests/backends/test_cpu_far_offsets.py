"""The CPU engine on views whose samples begin beyond 2^31 elements: the bits of dense tensors, from every op.

What lies between the samples is never touched and takes no memory.
"""

import pytest
import torch

from mod_kernels.backends.native import CPU

from ..support import far_apart
from .cpu_cases import MARKS, bits, calls

pytestmark = MARKS


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("samples", "stride"), [(2, 2**31 + 48), (3, 2**30 + 16)])
def test_samples_far_apart(samples, stride, layout):
    for op, arguments in calls(layout, torch.float16, torch.float32, shape=(samples, 64, 5, 7)):
        dense = [one.clone() if is_map(one) else one for one in arguments]
        far = [far_apart(one, stride) if is_map(one) else one for one in arguments]
        expected, results = CPU.ops[op](*dense), CPU.ops[op](*far)
        for a, b in zip(tensors(results, far), tensors(expected, dense), strict=True):
            assert torch.equal(bits(a), bits(b)), op


def is_map(argument):
    return isinstance(argument, torch.Tensor) and argument.dim() == 4


def tensors(results, arguments):
    """What an op gave, and what became of the feature maps it was given."""
    given = results if isinstance(results, tuple) else (results,)
    return [*(one for one in given if one is not None), *filter(is_map, arguments)]

"""What a call costs beside the arithmetic: Python, checks, dispatch, allocation.

Each op runs on one sample of 16 channels and one pixel, k = 1, where its kernel takes well under half a
microsecond: the time of the call is the cost of the call, kernel included. It is the minimum over many short
runs, on one thread: other processes only ever add to it. ``make unit`` runs this file before the others, not
beside them.

The promise is 8 us without gradients on a machine where ``torch.add`` of two such tensors takes 1.6 us (an x86-64
server core of 2020, torch 2.14). That call goes the same way (Python, dispatcher, one small allocation), so on a
slower machine the limit grows with it, as measured between the runs of the op; on a faster one it stays.

Before calls were remembered (``mod_kernels/_remembered.py``) the ops took 8 to 19 us, and failed here one and all
(``gather_channels`` under ``no_grad`` only, by a hair).
"""

import time

import pytest
import torch

from mod_kernels import functional
from mod_kernels.backends.native import CPU

from .support import feature_map, make_spec

pytestmark = [
    pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems)),
    pytest.mark.usefixtures("one_thread"),
]

LIMIT_US = 8.0
TORCH_ADD_US = 1.6


def calls():
    """Every public op on tensors as small as they get, as functions without arguments."""
    x, spec = feature_map((1, 16, 1, 1)), make_spec(16, 1)
    b, z = feature_map((1, 16, 1, 1)), feature_map((1, 1, 1, 1))
    scores, index = torch.rand(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    return {
        "select_channels": lambda: functional.select_channels(x, spec.fc1_weight, spec.fc2_weight, 1),
        "gather_channels": lambda: functional.gather_channels(x, index),
        "fuse_channels": lambda: functional.fuse_channels(x, z, scores),
        "fuse_channels_": lambda: functional.fuse_channels_(x, z, scores),
        "add_relu_pool": lambda: functional.add_relu_pool(x, b),
        "add_relu_pool_": lambda: functional.add_relu_pool_(x, b),
        "mod_block": lambda: functional.mod_block(x, spec),
        "mod_block_": lambda: functional.mod_block_(x, spec),
    }


def microseconds(call, count=500):
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count * 1e6


def cost_and_yardstick(call, runs=60):
    """Microseconds of ``call`` and of ``torch.add``, each the minimum over ``runs``, taken in turns."""
    a, b = torch.randn(1, 16, 1, 1), torch.randn(1, 16, 1, 1)
    pairs = [(microseconds(call), microseconds(lambda: torch.add(a, b))) for _ in range(runs)]
    return tuple(min(times) for times in zip(*pairs, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", list(calls()))
def test_a_call_costs_at_most(op, mode):
    call = calls()[op]
    with mode():
        for _ in range(10):  # some seconds: all of one may be slow on a busy machine
            cost, yardstick = cost_and_yardstick(call)
            limit = LIMIT_US * max(1.0, yardstick / TORCH_ADD_US)
            if cost <= limit:
                return
    pytest.fail(f"{op} takes {cost:.2f} us, {limit:.2f} are allowed (torch.add takes {yardstick:.2f})")


def test_every_public_op_is_timed():
    ops = {name for name in functional.__all__ if name not in ("MoDSpec", "explain")}
    assert set(calls()) == ops

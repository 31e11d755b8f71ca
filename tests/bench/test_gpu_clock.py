"""The GPU's clock against Triton's own, which measure one call at a time: on a GPU only."""

import pytest
import torch

from mod_kernels.bench.providers import graphed
from mod_kernels.bench.timing import GpuClock, Timed, measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def x():
    return torch.rand(64 << 20, device="cuda")


def ours(call, cold):
    timed = Timed("sum", call)
    measure([timed], GpuClock(cold), rounds=20)
    return timed.quartiles()[1]


def test_cold_agrees_with_do_bench(x):
    testing = pytest.importorskip("triton.testing")
    expected = testing.do_bench(x.sum, return_mode="median")
    assert ours(x.sum, cold=True) == pytest.approx(expected, rel=0.1)


def test_warm_in_a_graph_agrees_with_do_bench_cudagraph(x):
    testing = pytest.importorskip("triton.testing")
    expected = testing.do_bench_cudagraph(x.sum, return_mode="median")
    replay = graphed(lambda given: given.sum(), x)
    assert ours(replay, cold=False) == pytest.approx(expected, rel=0.1)

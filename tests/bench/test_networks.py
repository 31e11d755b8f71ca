"""The networks that are compared, and what is made of their times."""

import pytest
import torch

from mod_kernels.bench import networks
from mod_kernels.bench.timing import Timed


def test_the_share_of_plain_compares_round_by_round():
    """What slows a whole round down cancels; the fastest plain form counts; the interval holds the share."""
    slow = torch.rand(100, dtype=torch.float64) * 5

    def timed(name, over):
        noise = torch.rand(100, dtype=torch.float64) * 0.01
        return Timed(name, None, samples=(slow + 1 + over + noise).tolist())

    found = {"identity": timed("identity", 0.0), "fused": timed("fused", 0.5)}
    found |= {"plain": timed("plain", 2.5), "plain-inplace": timed("plain-inplace", 2.0)}
    share, low, high = networks.share_of_plain(found)
    assert share == pytest.approx(0.25, abs=0.01)
    assert low <= share <= high and high - low < 0.01
    del found["plain"], found["plain-inplace"]
    assert networks.share_of_plain(found) is None


def test_the_networks_that_are_compared_share_their_tensors():
    built = networks.build("resnet18_mod", "cpu", torch.float32)
    pointers = {name: model.conv1.weight.data_ptr() for name, model in built.items()}
    assert set(networks.PLAIN_FORMS) < set(pointers) and len(set(pointers.values())) == 1
    assert len({id(model.layer1) for model in built.values()}) == len(built)

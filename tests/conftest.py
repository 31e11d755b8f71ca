import os
import zlib

import pytest
import torch

from mod_kernels import _remembered, backends
from mod_kernels.bench import allocator


def pytest_collection_modifyitems(config, items):
    """TEST_SHARE=1/2 in the environment: half of the tests, 2/2: the others.

    By their names' checksums: counted off in turn, one half would have all of what is parametrized last.
    """
    number, shares = map(int, os.environ.get("TEST_SHARE", "1/1").split("/"))
    assert 1 <= number <= shares, "TEST_SHARE must be 1/2, 2/2 or the like"
    parts = [[], []]
    for item in items:
        parts[zlib.crc32(item.nodeid.encode()) % shares == number - 1].append(item)
    left_out, items[:] = parts
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240917)


@pytest.fixture(autouse=True)
def allocator_as_it_is(monkeypatch):
    """Verbs that measure run in the tests' process: it goes on giving memory back to the system."""
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)


@pytest.fixture
def one_thread():
    """For small tensors, which a second thread only makes wait, and for timings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def oracle_engine(monkeypatch):
    """Every op on a CPU goes to the float64-capable oracle engine."""
    from .oracle_engine import ORACLE

    monkeypatch.setattr(backends, "_AUTO", {"cpu": (ORACLE,)})
    monkeypatch.setattr(backends, "_requested", "auto")
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(_remembered, "_passed", {})
    return ORACLE

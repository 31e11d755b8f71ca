import pytest
import torch

from mod_kernels import _remembered, backends


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240917)


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

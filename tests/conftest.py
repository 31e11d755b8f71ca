import pytest
import torch

from mod_kernels import _remembered, backends


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240917)


@pytest.fixture
def oracle_engine(monkeypatch):
    """Every op on a CPU goes to the float64-capable oracle engine."""
    from .oracle_engine import ORACLE

    monkeypatch.setattr(backends, "_AUTO", {"cpu": (ORACLE,)})
    monkeypatch.setattr(backends, "_requested", "auto")
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(_remembered, "_passed", {})
    return ORACLE

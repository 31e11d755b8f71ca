import pytest
import torch


@pytest.fixture
def poison():
    """Every tensor an op allocates is full of NaN (int64: its largest value) before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

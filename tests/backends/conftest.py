import warnings

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture
def poison():
    """Every tensor an op allocates is full of NaN (int64: its largest value) before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned():
    """Outputs and scratch are NaN (integers: the largest value) before a kernel sees them."""
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        # The setting warns of cuBLAS; NumPy, inside the interpreter, of NaN and overflow.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
    deterministic.fill_uninitialized_memory = before[1]

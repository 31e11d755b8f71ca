import pytest

from mod_kernels._fresh_memory import poisoned
from mod_kernels.backends.native import CPU


@pytest.fixture
def fresh_memory_is_nan():
    with poisoned():
        yield


@pytest.fixture
def conv_calls(monkeypatch):
    """The arguments of each call of the two ops."""
    made = []

    def recording(name, op):
        return lambda *arguments: made.append((name, arguments)) or op(*arguments)

    ops = {name: recording(name, op) for name, op in CPU.ops.items() if name.startswith("conv_block")}
    monkeypatch.setattr(CPU, "ops", CPU.ops | ops)
    return made

import pytest

from mod_kernels import functional


@pytest.fixture
def ran(monkeypatch):
    """The ops that blocks ended in, by name, in the order they ran."""
    names = []

    def recorded(name, op):
        def recording(*args, **kwargs):
            names.append(name)
            return op(*args, **kwargs)

        return recording

    for name in ("mod_block", "mod_block_", "fuse_channels", "fuse_channels_"):
        monkeypatch.setattr(functional, name, recorded(name, getattr(functional, name)))
    return names

"""The same tests under ``TRITON_INTERPRET=1`` on CPU tensors and, without it, on a GPU; else skipped."""

import contextlib
import dataclasses
import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device():
    if INTERPRETING:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")


@pytest.fixture
def interpreter(device):
    if not INTERPRETING:
        pytest.skip("the order of programs can be chosen in the interpreter only: needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def always_poisoned(poisoned):
    """Scratch too, then."""


@pytest.fixture
def program_order(interpreter, monkeypatch):
    """Context manager: the interpreter runs the programs of a grid "forward", "reversed" or "shuffled"."""
    from triton.runtime.interpreter import interpreter_builder

    set_grid_idx = interpreter_builder.set_grid_idx

    @contextlib.contextmanager
    def in_order(order):
        places = {}

        def permuted(x, y, z):
            count = interpreter_builder.grid_dim[0]
            if count not in places:
                shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
                forward = list(range(count))
                places[count] = {"forward": forward, "reversed": forward[::-1], "shuffled": shuffled}[order]
            set_grid_idx(places[count][x], y, z)

        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_idx", permuted)
            yield
        assert places, "no kernel ran"

    return in_order


@pytest.fixture
def with_tuning(device):
    """Call with fields of a Tuning by name: they are in force until the test ends, on top of the built-in ones."""
    from mod_kernels.backends.triton import in_force, tuning

    place = -1 if device == "cpu" else torch.cuda.current_device()
    own = tuning.DEFAULT if place < 0 else in_force.built_in(place)
    with contextlib.ExitStack() as stack:

        def change(**fields):
            changed = dataclasses.replace(own, **fields)
            stack.enter_context(in_force.using(changed, place))
            return changed

        yield change

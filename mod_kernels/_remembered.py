"""Calls that went through before: a repeated call skips the checks and the choice of an engine.

Both cost several microseconds of Python, as much as a whole kernel takes, and a network makes the same calls
again and again. A call is remembered once its arguments have passed and an engine serves it with every tensor as
it was given (nothing cast, nothing copied into another layout); the next one that is equal to it in everything
the checks and the choice look at goes straight to the engine's op:

* the op, and the backend asked for;
* of every tensor its shape, strides, dtype and device (:func:`facts`), or that there is none;
* every other argument, with its type where equal values of another type are refused (``1 == True``);
* of a :class:`mod_kernels.MoDSpec` its ``token``: its tensors were checked when it was made, and engines get
  aliases of its own (``selector_arguments``, ``conv_arguments``) that nobody gives another shape or dtype.

What an equal call may differ in is looked at every time, by the ops themselves: whether gradients are needed,
and whether a map that is written shares memory with one that is read. Values (an index's range) are the engines'
to check.

No tensor is kept alive. While compiling nothing is looked up or written: a graph is traced once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends

# The shapes a process sees are few; where they are not (dynamic sizes), starting over is cheap.
_MOST = 1024
_passed: dict[tuple, Callable] = {}


def facts(tensor: Tensor) -> tuple | type:
    """What the checks look at in a tensor; of anything else its type, which no remembered call has."""
    try:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except AttributeError:
        return type(tensor)


def recall(key: tuple) -> Callable | None:
    """The op that served a call with this key and takes its arguments as they are; None if there was none."""
    if forward_ad._current_level >= 0:  # an engine's op would drop the tangents
        return None
    try:
        return _passed.get((backends.requested(), key))
    except TypeError:  # symbolic sizes, and arguments that are no good: neither can be hashed
        return None


def remember(key: tuple | None, op: Callable, given: tuple[Any, ...], passed: tuple[Any, ...]) -> None:
    """Note that ``op`` serves calls with this key, if it gets every tensor that was ``given`` as it is."""
    if key is None or torch.jit.is_tracing() or any(a is not b for a, b in zip(given, passed, strict=True)):
        return
    if len(_passed) >= _MOST:
        _passed.clear()
    try:
        # An OpOverload's own call is a Python function around its _op: 0.3 us.
        _passed[backends.requested(), key] = getattr(op, "_op", op)
    except TypeError:  # symbolic sizes
        return

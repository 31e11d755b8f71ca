"""What an engine is to the rest of the package: a name, the ops it has, and a yes or a no with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Call(NamedTuple):
    """What an engine needs to know of a call to say whether it can serve it."""

    op: str
    device: str
    dtype: torch.dtype
    layout: str
    channels: int
    k: int
    kind: str | None = None
    position: str | None = None
    weight_dtype: torch.dtype | None = None


class Support(NamedTuple):
    """An engine's answer: ``ok``, or the reason why not."""

    ok: bool
    reason: str = ""


class Engine:
    """Base class of the engines.

    ``ops`` maps a raw op's name (:data:`mod_kernels._library.OPS`) to a callable taking that op's arguments.
    An op that is not in ``ops`` is served by the reference. ``select_channels`` and ``select_channels_saving``
    come together: a ``Call`` of the former stands for both.
    """

    name: str
    ops: dict[str, Callable]

    def supports(self, call: Call) -> Support:
        """Whether this engine serves ``call``; must be cheap and must not launch anything."""
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        """What ``info`` shows: ``status`` (``"ok"`` or the reason it is not) and whatever helps a bug report."""
        raise NotImplementedError

"""What the builders of every family are told, c, position and stem; and the MoD block they make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from .. import _checks
from ..nn import MoDBlock, MoDStage

STEMS = ("imagenet", "cifar")


def check(c: int, position: str, stem: str = "imagenet") -> None:
    """Raise ValueError for one that is not allowed, naming it."""
    if not isinstance(c, int) or isinstance(c, bool) or c < 1:
        raise ValueError(f"c must be an int of at least 1, got {c!r}")
    _checks.where(position)
    check_stem(stem)


def check_stem(stem: str) -> None:
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(map(repr, STEMS))}, got {stem!r}")


def mod_block(channels: int, c: int, position: str, narrow: Callable[[int], nn.Module]) -> MoDBlock:
    """A MoD block of k = max(1, channels // c) around ``narrow(k)``."""
    k = max(1, channels // c)
    return MoDBlock(channels, narrow(k), k, position=position)


def stage(blocks: Iterable[nn.Module]) -> MoDStage:
    """A row whose inner maps nothing else reads."""
    row = MoDStage(*blocks)
    row.owns_maps = True
    return row

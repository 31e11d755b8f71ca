"""Inputs in turn, more of them than the caches hold: so that a CPU finds none there, as within a network.

A call on the same x again and again finds in the cache what a block of a network, after convolutions that went
through other tensors, does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from .machine import last_level_cache_bytes

# Together they are this many times as large as the last-level cache.
TIMES_CACHE = 2


@functools.cache
def _cache_bytes() -> int:
    return last_level_cache_bytes()


def copies_of(size: int) -> int:
    """How many tensors of so many bytes go beyond the caches; 1 where one does, or nothing is known of them."""
    return max(1, -(-TIMES_CACHE * _cache_bytes() // max(1, size)))


class Rotation:
    """``first`` and ``copies - 1`` clones of it, handed out in turn."""

    def __init__(self, first: Tensor, copies: int) -> None:
        self.first, self.copies = first, copies
        self._all = [first, *(first.clone() for _ in range(copies - 1))]
        self._next = 0

    def calling(self, run: Callable[[Tensor], object]) -> Callable[[], object]:
        """A call of ``run`` on the next of them."""
        if self.copies == 1:
            first = self.first
            return lambda: run(first)

        def call() -> object:
            place, self._next = self._next, (self._next + 1) % self.copies
            return run(self._all[place])

        return call

    def refill(self, x: Tensor) -> None:
        """Copy x into all of them. The first one is next: it is out of the cache again by then."""
        for one in self._all:
            one.copy_(x)
        self._next = 0

"""Inputs in turn: on a CPU a block's time hangs on whether x is in a cache, and on where in memory it lies.

Cold: another x at each call, together more than the caches hold, as a block of a network finds it after
convolutions that went through other tensors. Warm: the same x for all calls of a sample, for the next sample one
elsewhere: which of its lines push each other out of the cache is decided by the pages that the system gave it, so
that the rounds of one process would agree with each other and not with those of the next.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from torch import Tensor

from .machine import last_level_cache_bytes

# Cold: together they are this many times as large as the last-level cache.
TIMES_CACHE = 2
# Warm: so many places, but not more than this takes.
PLACES, PLACES_BYTES = 8, 256 << 20


@functools.cache
def _cache_bytes() -> int:
    return last_level_cache_bytes()


def copies_of(size: int) -> int:
    """How many tensors of so many bytes go beyond the caches; 1 where one does, or nothing is known of them."""
    return max(1, -(-TIMES_CACHE * _cache_bytes() // max(1, size)))


def places_of(size: int) -> int:
    """In how many places a tensor of so many bytes is measured warm."""
    return max(1, min(PLACES, PLACES_BYTES // max(1, size)))


class Rotation:
    """``first`` and ``copies - 1`` clones of it; ``cold``: another at each call, else at each :meth:`prepare`."""

    def __init__(self, first: Tensor, copies: int, cold: bool = False) -> None:
        self.first, self.copies, self.cold = first, copies, cold
        self._all = [first, *(first.clone() for _ in range(copies - 1))]
        self._next, self._random = 0, random.Random(0)

    def beside(self, first: Tensor) -> Rotation:
        """One like this of other tensors."""
        return Rotation(first, self.copies, self.cold)

    def calling(self, run: Callable[[Tensor], object]) -> Callable[[], object]:
        """A call of ``run`` on the one whose turn it is."""
        if self.copies == 1:
            first = self.first
            return lambda: run(first)
        if not self.cold:
            return lambda: run(self._all[self._next])

        def call() -> object:
            place, self._next = self._next, (self._next + 1) % self.copies
            return run(self._all[place])

        return call

    def prepare(self, refill_with: Tensor | None = None) -> None:
        """Before a sample: warm, on to another place, drawn; ``refill_with`` is copied into what is called next.

        Cold that is all of them, the first one first: it is out of the cache again by the time it is called.
        """
        self._next = 0 if self.cold else self._random.randrange(self.copies)
        if refill_with is not None:
            for one in self._all if self.cold else [self._all[self._next]]:
                one.copy_(refill_with)

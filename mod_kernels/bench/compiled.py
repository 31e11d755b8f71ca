"""torch.compile of the fastest plain form: once for all cells of its shape, while there is time to compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import providers
from .providers import Provider, Unavailable


class LeftOut(Exception):
    """There is no time left to compile in."""


@dataclass
class Limit:
    """The batches that are compiled, and the seconds after which no new compilation starts."""

    batches: tuple[int, ...]
    seconds: float
    spent: float = 0.0
    cells_refused: int = 0


class Compiler:
    """What torch.compile made for the cells of one key. ``limits``: by the names that are compiled."""

    def __init__(self, limits: dict[str, Limit]) -> None:
        self.limits = limits
        self._key: Hashable = None
        self._best: Provider | None = None
        self._made: dict[str, Provider | Unavailable] = {}

    def provider(
        self, name: str, key: Hashable, x: Tensor, threads: int, fastest: Callable[[], Provider]
    ) -> Provider:
        """A compiled provider for cells of ``key``, which hold x; ``fastest()`` is asked once for what to compile.

        Raises:
            LeftOut: no time, or not this batch.
            Unavailable: it raised when it was first called, or ``fastest`` did.
        """
        if key != self._key:
            self._key, self._best, self._made = key, None, {}
        if name not in self._made:
            limit = self.limits[name]
            if len(x) not in limit.batches or limit.spent >= limit.seconds:
                limit.cells_refused += 1
                raise LeftOut
            start = time.monotonic()
            self._made[name] = self._compile(name, x, threads, fastest)
            limit.spent += time.monotonic() - start
        made = self._made[name]
        if isinstance(made, Unavailable):
            raise made
        return made

    def _compile(
        self, name: str, x: Tensor, threads: int, fastest: Callable[[], Provider]
    ) -> Provider | Unavailable:
        from torch._inductor import config as inductor

        try:
            if self._best is None:
                self._best = fastest()
                torch._dynamo.reset()  # every key is a new shape: no recompile limit, no dynamic shapes
            providers.start_compiler(x.device.type)
            provider = providers.compiled_provider(self._best, threads, name)
            start = time.monotonic()
            # What an earlier process left on the disk would make this the time of reading it.
            with inductor.patch(force_disable_caches=True):
                provider.run(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            provider.compile_s = time.monotonic() - start
        except Unavailable as reason:
            return reason
        except RuntimeError as error:
            return Unavailable(f"raised: {str(error).partition(chr(10))[0]}")
        return provider

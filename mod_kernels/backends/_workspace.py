"""The counters by which a block's programs know the last of a sample: whose they are, and that they are zero.

A launch of any engine finds its counters at zero and leaves them so. What runs at the same time must share none:

* calls outside of a graph: one set for each device and stream, where launches follow each other;
* a call that a CUDA graph captures: a set of its own for as long as the process lives, because its replay may run
  beside anything else. It comes from a slab that was zeroed before, so that the graph need not zero it; where the
  slab is used up, or nothing ran on the device before the capture, the zeroing becomes a part of the graph;
* a call that torch.compile traces: zeros that the graph makes, for the same reason.

After a launch that did not end the counters may be anything. On a GPU the context is then lost, and the counters
with it. In the interpreter an exception can stop a launch half way: :func:`forget` drops the set it had.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# 1 MiB: a graph of a hundred blocks at N = 32 takes 3200.
SLAB_COUNTERS = 1 << 18

_of_stream: dict[tuple[int, int], Tensor] = {}
_slabs: dict[int, _Slab] = {}


class _Slab:
    """Zeroed counters of a device, handed out once each."""

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(SLAB_COUNTERS, dtype=torch.int32, device=device)
        self._given = 0
        # A graph is replayed on any stream. Once in the life of a slab, outside of captures.
        torch.cuda.current_stream(device).synchronize()

    def take(self, count: int) -> Tensor | None:
        start, self._given = self._given, self._given + count
        return self._counters[start : self._given] if self._given <= SLAB_COUNTERS else None


def counters_for(x: Tensor) -> Tensor:
    """(N,) int32 or more, zero, on x's device, for one launch on the current stream."""
    samples = x.shape[0]
    if torch.compiler.is_compiling():
        return _zeros(x, samples)
    if not x.is_cuda:  # the interpreter
        return _kept(x, (-1, 0), samples)
    device = x.device.index
    if torch.cuda.is_current_stream_capturing():
        taken = _slabs[device].take(samples) if device in _slabs else None
        return _zeros(x, samples) if taken is None else taken
    if device not in _slabs:
        _slabs[device] = _Slab(x.device)
    return _kept(x, (device, torch.cuda.current_stream(device).cuda_stream), samples)


def with_counters(op: Callable) -> Callable:
    """``op`` with the last of its arguments given."""

    def call(x, *arguments):
        try:
            return op(x, *arguments, counters_for(x))
        except BaseException:
            forget()  # a launch that was stopped half way leaves its counters as they are then
            raise

    return call


def forget() -> None:
    """Drop the sets of streams: one of them may not be zero."""
    _of_stream.clear()


def _kept(x: Tensor, key: tuple[int, int], samples: int) -> Tensor:
    counters = _of_stream.get(key)
    if counters is None or counters.shape[0] < samples:
        # The one before goes back to the allocator, which gives it to this stream again at the earliest.
        counters = _of_stream[key] = _zeros(x, 1 << max(0, samples - 1).bit_length())
    return counters


def _zeros(x: Tensor, samples: int) -> Tensor:
    return torch.zeros((samples,), dtype=torch.int32, device=x.device)

"""Interleaved timing: rounds over all providers of a cell, so that drift of the machine falls on all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A CPU sample lasts at least this long: below 1 ms the clock and the loop around the calls show, a bit above that
# what the machine beneath happens to do.
MIN_SAMPLE_S = 4e-3
# Calls in a sample, at most: an in-place block runs that often on one buffer before it is refilled.
MAX_REPEATS = 200
# Two warm-up times this close to each other count as steady.
STEADY = 0.1
# Rounds before the spread of the samples is asked for, and before a budget ends them.
SETTLING_ROUNDS, LEAST_ROUNDS = 10, 5
# A time is doubted where more than this share of its samples lie above the upper quartile by more than three
# interquartile ranges, or where the last third of the rounds took so much longer or shorter than the first.
OUTLIERS, DRIFT = 0.1, 0.1


@dataclass
class Timed:
    """One provider in a cell. ``prepare`` runs before every sample, outside the clock (refills a buffer)."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    repeats: int = 1
    samples: list[float] = field(default_factory=list)  # seconds per call
    timer: object = None  # of CpuClock, which makes one at the first sample

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile in milliseconds."""
        low, median, high = (value * 1e3 for value in _quartiles(self.samples))
        return low, median, high

    def settled(self, spread: float) -> bool:
        """Whether half of the samples lie within ``spread`` of the median, end to end."""
        low, median, high = _quartiles(self.samples)
        return high - low <= spread * median

    def warning(self) -> str | None:
        """Why the time is to be doubted, or None."""
        if len(self.samples) < SETTLING_ROUNDS:
            return None
        low, _, high = _quartiles(self.samples)
        above = sum(one > high + 3 * (high - low) for one in self.samples) / len(self.samples)
        third = len(self.samples) // 3
        first, last = (_quartiles(part)[1] for part in (self.samples[:third], self.samples[-third:]))
        said = []
        if above > OUTLIERS:
            said.append(f"{above:.0%} of the samples are outliers")
        if abs(last / first - 1) > DRIFT:
            said.append(f"took {last / first:.2f} times as long in the last rounds as in the first")
        return "; ".join(said) or None


def _quartiles(samples: list[float]) -> list[float]:
    values = torch.tensor(samples, dtype=torch.float64)
    return values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


class CpuClock:
    """``repeats`` calls by :class:`torch.utils.benchmark.Timer`, on as many threads as torch has at the first one.

    It calls twice before it measures: what ``prepare`` touched is not what the first call finds.
    """

    def __init__(self) -> None:
        # Takes 50 ms to import, and says so where there is a compiler and no GPU: not for everyone to wait for.
        from torch.utils.benchmark import Timer

        self._new_timer = Timer

    def sample(self, timed: Timed) -> float:
        if timed.timer is None:
            how = {"globals": {"call": timed.call}, "num_threads": torch.get_num_threads()}
            timed.timer = self._new_timer("call()", **how)
        timed.prepare()
        return timed.timer.timeit(timed.repeats).median

    def calibrate(self, timed: Timed) -> None:
        """Warm up to steady state, then choose the repeats that fill MIN_SAMPLE_S."""
        before = float("inf")
        for _ in range(10):
            now = self.sample(timed)
            timed.repeats = min(MAX_REPEATS, max(1, round(MIN_SAMPLE_S / now + 0.5)))
            if abs(now - before) <= STEADY * now:
                return
            before = now


class MovingHeap:
    """After each round, other places in memory for what the next one allocates; on a CPU.

    Where a convolution's input and output lie to each other changes a network's time by more than its MoD blocks
    cost, and whether a freed tensor's pages go back to the system, to be faulted in again by the next call, hangs
    on what lies above them. A process that allocates the same sizes in the same order gets the same places: its
    rounds would agree with each other and not with those of the next process.
    """

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._kept: list[Tensor] = []

    def __call__(self, done: int) -> None:
        draw = self._random.randrange
        self._kept.clear()
        self._kept += [torch.empty(draw(1 << 10, 1 << 18)) for _ in range(draw(1, 12))]


def on_round_of(device: str) -> Callable[[int], None]:
    """What to do after each round: on a CPU a new :class:`MovingHeap`'s part, on a GPU nothing."""
    return MovingHeap() if device == "cpu" else lambda done: None


class GpuClock:
    """CUDA events around one call with a cold L2, or around ``repeats`` calls with a warm one.

    Not ``triton.testing.do_bench``, which measures one provider to its end and always flushes, nor
    ``do_bench_cudagraph``, which never does: providers could not be interleaved, nor two of the four ways be had.
    On a GPU a test holds this clock to both of them (``tests/bench/test_gpu_clock.py``).
    """

    def __init__(self, cold: bool) -> None:
        self.cold = cold
        # Twice the L2: written before each cold sample. Also keeps the GPU busy while the call is queued, so
        # that the events do not see Python unless the call is slower to queue than this is to run.
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(size, 64 << 20), dtype=torch.int8, device="cuda")

    def sample(self, timed: Timed) -> float:
        timed.prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        repeats = 1 if self.cold else timed.repeats
        if not self.cold:
            timed.call()
        self._flush.zero_() if self.cold else torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            timed.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    def calibrate(self, timed: Timed) -> None:
        for _ in range(3):
            now = self.sample(timed)
            timed.repeats = min(MAX_REPEATS, max(1, round(MIN_SAMPLE_S / now + 0.5)))


def measure(
    providers: list[Timed],
    clock: CpuClock | GpuClock,
    rounds: int,
    budget_s: float = float("inf"),
    on_round: Callable[[int], None] = lambda done: None,
    spread: float = 0.0,
) -> int:
    """Fill every provider's samples: ``rounds`` rounds in a new order each; returns the rounds done.

    They end early once every provider has settled to ``spread`` (:meth:`Timed.settled`), or past ``budget_s``:
    cells of a second a call would never end.
    """
    order = list(providers)
    start, shuffle = time.monotonic(), random.Random(0).shuffle
    with torch.inference_mode():
        for timed in providers:
            clock.calibrate(timed)
        for done in range(1, rounds + 1):
            shuffle(order)
            for timed in order:
                timed.samples.append(clock.sample(timed))
            on_round(done)
            if done >= LEAST_ROUNDS and time.monotonic() - start > budget_s:
                return done
            if spread and done >= SETTLING_ROUNDS and all(timed.settled(spread) for timed in providers):
                return done
    return rounds

"""Coordinate search: one field after the other, a candidate against the best so far, on the cells that it changes.

A candidate is kept if it gives what the untuned kernels give, is faster on the average of its cells beyond noise,
and on none of them slower by more than a little: one tuning serves all shapes of a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..backends.triton import launch
from ..backends.triton.in_force import using
from ..backends.triton.tuning import Tuning
from .candidates import CANDIDATES, Candidates
from .cells import Call, Cell, Results, difference

# Pairs of measurements, of the best so far and of the candidate in turns: drift of the clock falls on both alike.
ROUNDS = 20
# A gain counts from here on, whatever the noise; and beyond so many standard errors of it. Some fifty candidates
# are tried, and at two errors one of them would win by luck.
LEAST_GAIN = 0.01
ERRORS = 3
# A candidate may be so much slower on a cell.
LARGEST_LOSS = 0.03

# Given a call, under the tuning in force: what measures it, in seconds; its tensors are restored before each time.
Timer = Callable[[Call], Callable[[], float]]


@dataclass(frozen=True)
class Verdict:
    """What became of a candidate; ``said``: why, in words."""

    field: str
    value: object
    kept: bool
    said: str

    def __str__(self) -> str:
        return f"{'kept' if self.kept else 'left'} {self.field} {self.value}: {self.said}"


class OutOfTime(Exception):
    """The budget is spent."""


class _Gain(NamedTuple):
    """Of a candidate in one cell: log(time before / time with it), its median and that one's standard error."""

    median: float
    error: float


class Search:
    """The best tuning so far, from ``start`` on; ``verdicts`` so far.

    Args:
        start: what the results of every candidate are compared with.
        cells: what is timed.
        timer: how.
        device: index of the device of the cells' tensors, -1 for the CPU.
        check_time: raises OutOfTime; asked before every cell.
    """

    def __init__(
        self,
        start: Tuning,
        cells: Iterable[Cell],
        timer: Timer,
        device: int,
        check_time: Callable[[], None] = lambda: None,
    ) -> None:
        self.start = self.best = start
        self.verdicts: list[Verdict] = []
        self._cells, self._timer, self._device, self._check_time = list(cells), timer, device, check_time

    def run(
        self,
        fields: Iterable[Candidates] = CANDIDATES,
        on_verdict: Callable[[Verdict], None] = lambda verdict: None,
    ) -> bool:
        """Try every candidate once; whether there was time for all."""
        try:
            for candidates in fields:
                for value in candidates.values:
                    if value != candidates.of(self.best):
                        self._try(candidates, value)
                        on_verdict(self.verdicts[-1])
        except OutOfTime:
            return False
        return True

    def _try(self, candidates: Candidates, value: object) -> None:
        tuning = candidates.with_value(self.best, value)
        kept, said = self._judge(tuning)
        self.verdicts.append(Verdict(candidates.name, value, kept, said))
        if kept:
            self.best = tuning

    def _judge(self, tuning: Tuning) -> tuple[bool, str]:
        gains = []
        for cell in self._cells:
            self._check_time()
            call = cell.open()
            if self._launches(call, tuning) == self._launches(call, self.best):
                continue
            problem = self._problem(call, tuning)
            if problem:
                return False, f"{problem}: {cell}"
            gain = self._gain(call, tuning)
            if gain.median < -LARGEST_LOSS:
                return False, f"{_percent(-gain.median)} slower: {cell}"
            gains.append(gain)
        if not gains:
            return False, "changes no launch here"
        mean = statistics.fmean(gain.median for gain in gains)
        noise = ERRORS * math.sqrt(sum(gain.error**2 for gain in gains)) / len(gains)
        word = f"{_percent(abs(mean))} {'faster' if mean > 0 else 'slower'} over {len(gains)} cells"
        if mean > LEAST_GAIN and mean > noise:
            return True, word
        return False, f"{word}, {_percent(max(LEAST_GAIN, noise))} is noise"

    def _launches(self, call: Call, tuning: Tuning) -> list:
        with using(tuning, self._device), launch.recorded() as launched:
            call.run()
        return launched

    def _problem(self, call: Call, tuning: Tuning) -> str:
        """What is wrong with the results under ``tuning``, or ""."""
        expected = self._results(call, self.start)
        try:
            found = self._results(call, tuning)
        except Exception as error:  # whatever Triton, ptxas or the driver may raise: another candidate may do
            return f"does not run ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        return difference(expected, found)

    def _results(self, call: Call, tuning: Tuning) -> Results:
        with using(tuning, self._device):
            return call.results()

    def _gain(self, call: Call, tuning: Tuning) -> _Gain:
        measures = []
        for one in (self.best, tuning):
            with using(one, self._device):
                measures.append(self._timer(call))
        gains = []
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            times = {}
            for which in order:
                call.restore()
                times[which] = measures[which]()
            gains.append(math.log(times[0] / times[1]))
        low, median, high = statistics.quantiles(gains, n=4)
        # Of normal values the quartiles are 1.35 deviations apart, and a median's error is 1.25 / sqrt(number).
        return _Gain(median, (high - low) / 1.35 * 1.25 / math.sqrt(ROUNDS))


def _percent(share: float) -> str:
    return f"{share:.1%}"

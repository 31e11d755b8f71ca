"""When rounds end, and which times are doubted."""

import pytest

from mod_kernels.bench.timing import SETTLING_ROUNDS, Timed, measure


class Scripted:
    """A clock that gives each provider the samples it is told."""

    def __init__(self, samples):
        self._samples = {name: iter(values) for name, values in samples.items()}

    def calibrate(self, timed):
        pass

    def sample(self, timed):
        return next(self._samples[timed.name])


def rounds_of(samples, spread):
    timed = [Timed(name, None) for name in samples]
    return measure(timed, Scripted(samples), rounds=40, spread=spread)


def test_rounds_end_once_every_provider_has_settled():
    steady, wild = [1.0] * 40, [1.0, 2.0] * 5 + [1.0] * 30
    assert rounds_of({"a": steady}, 0.02) == SETTLING_ROUNDS
    # Of five 2.0s the upper quartile is rid once less than a quarter of the samples lie above it.
    assert rounds_of({"a": steady, "b": wild}, 0.02) == 21
    assert rounds_of({"a": [1.0, 2.0] * 20}, 0.02) == 40
    assert rounds_of({"a": steady}, 0.0) == 40


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([1.0, 1.01, 0.99] * 10, None),
        ([1.0] * 9, None),  # too few to say
        ([1.0, 1.01, 0.99] * 8 + [9.0] * 6, "took"),
        ([1.0, 1.01, 0.99, 1.0, 1.0, 1.01, 5.0] * 6, "14% of the samples are outliers"),
        ([1.0 + 0.02 * at for at in range(30)], "took 1.37 times as long in the last rounds as in the first"),
    ],
)
def test_what_is_doubted(samples, said):
    warning = Timed("it", None, samples=samples).warning()
    assert warning is said is None or said in warning

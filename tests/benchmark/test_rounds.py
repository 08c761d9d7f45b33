# SPDX-License-Identifier: Apache-2.0
"""Rounds of the benchmark: their order, when they end, and what follows from their times."""

from collections import Counter

import numpy as np
import pytest

from vivit_jax.benchmark import measure
from vivit_jax.benchmark.intervals import LEAST, Interval, interval, ratio
from vivit_jax.benchmark.measure import Rounds, Timing, alternate


class Fake:
    """A side whose steps take known times on a made-up clock."""

    def __init__(self, name, clock, seconds):
        self.name, self.clock, self.seconds = name, clock, seconds

    def run(self):
        self.clock.ran.append(self.name)
        self.clock.now += self.seconds


class Clock:
    def __init__(self):
        self.now, self.ran = 0.0, []

    def perf_counter(self):
        return self.now

    @property
    def rounds(self):
        """The order of three sides in each round, one letter for the two steps of a turn."""
        assert self.ran[::2] == self.ran[1::2]
        turns = "".join(self.ran[::2])
        return [turns[i : i + 3] for i in range(0, len(turns), 3)]


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", made.perf_counter)
    return made


def run(clock, rounds, reach=lambda _: None):
    return alternate(
        [Fake(n, clock, s) for n, s in zip("abc", (1, 2, 4), strict=True)], rounds, reach
    )


def test_every_side_runs_once_in_each_round_in_an_order_of_its_own(clock):
    timings = run(clock, Rounds(60)).timings
    assert {name: set(timing.seconds) for name, timing in timings.items()} == {
        **{"a": {1.0}, "b": {2.0}, "c": {4.0}}
    }
    orders = clock.rounds
    assert len(orders) == 60 and all(sorted(order) == ["a", "b", "c"] for order in orders)
    count = Counter(orders)
    assert len(count) == 6 and max(count.values()) < 25  # of 10 on average
    assert all(len(timing.seconds) == 60 for timing in timings.values())


def test_the_seed_says_the_order(clock):
    for seed in (3, 3, 4):
        run(clock, Rounds(12, seed=seed))
    first, again, other = clock.rounds[:12], clock.rounds[12:24], clock.rounds[24:]
    assert first == again != other


def test_rounds_go_on_until_it_is_known_well_enough(clock):
    widths = iter([None, 0.5, 0.04, 0.03, 0.02])
    asked = []

    def reach(timings):
        asked.append(len(timings["a"].seconds))
        return next(widths)

    measured = run(clock, Rounds(3, until=0.03, most=50), reach)
    assert asked == [3, 4, 5, 6] and measured.reach == 0.03
    assert len(measured.timings["b"].seconds) == 6


def test_rounds_end_at_the_ceiling(clock):
    measured = run(clock, Rounds(3, until=0.03, most=7), lambda _: 0.1)
    assert len(measured.timings["a"].seconds) == 7 and measured.reach == 0.1
    assert len(run(clock, Rounds(4), lambda _: 0.1).timings["a"].seconds) == 4


def test_a_median_its_interval_and_spread():
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).median == 3
    assert Timing((2.0, 1.0, 3.0)).least == 1
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)
    found = interval((1.0, 2.0, 3.0, 4.0, 5.0))
    assert found == Interval(3.0, 1.0, 5.0)  # of five rounds all of them
    assert found.reach == pytest.approx(2 / 3) and str(found) == "1.000-5.000"
    uneven = Interval(1.0, 0.99, 1.15)  # half of its width, 8 %, would be too narrow
    assert uneven.reach == pytest.approx(0.15)
    assert Interval(1.0, 0.85, 1.01).reach == pytest.approx(0.15)
    assert interval([2.0] * 7) == Interval(2.0, 2.0, 2.0)


def test_too_few_rounds_have_no_interval():
    assert interval([1.0] * (LEAST - 1)) == Interval(1.0, None, None)
    assert interval([1.0]).reach is None and str(interval([1.0])) == "-"


def test_a_ratio_is_taken_within_rounds_and_of_the_least():
    """A drift that slows both sides alike leaves no trace in the rounds' ratios."""
    drift = np.linspace(1, 3, 9)
    found = ratio(drift * 1.5, drift)
    assert found.median == pytest.approx(1.5) and found.rounds.reach == pytest.approx(0)
    assert found.least == pytest.approx(1.5)
    assert Timing((1.0, 2.0, 9.0)).over(Timing((2.0, 2.0, 3.0))).median == 1
    assert ratio((1.0, 2.0, 9.0), (2.0, 2.0, 3.0)).least == 0.5
    with pytest.raises(ValueError, match="same rounds, got 2 and 1"):
        ratio((1.0, 2.0), (1.0,))


def test_the_same_rounds_have_the_same_interval():
    values = np.random.default_rng(5).normal(1, 0.1, 20)
    assert interval(values) == interval(list(values)) != interval(values[:-1])


@pytest.mark.parametrize("rounds", [LEAST, 20])
def test_intervals_hold_the_median_about_as_often_as_they_say(rounds):
    """Measured 0.92 to 0.95; half as wide intervals would hold it 0.7 of the time."""
    rng = np.random.default_rng(0)
    times = np.exp(rng.normal(0, 0.03, (300, rounds)))
    held = [found.low <= 1 <= found.high for found in map(interval, times)]
    assert 0.88 <= np.mean(held) <= 0.99


def test_more_rounds_make_it_narrower():
    values = np.exp(np.random.default_rng(1).normal(0, 0.03, 200))
    assert interval(values).reach < interval(values[:20]).reach / 2

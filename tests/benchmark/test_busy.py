# SPDX-License-Identifier: Apache-2.0
"""Whether the machine was busy: from made-up counters, and from this system's own."""

import math

import pytest

from vivit_jax.benchmark import busy
from vivit_jax.benchmark.busy import LOAD, STAT, Sample, Watch, of_load, of_samples

# Two cores; user nice system idle iowait irq softirq steal guest guest_nice, in ticks.
STAT_TEXT = """cpu  999 99 99 9999 99 9 9 99 99 9
cpu0 100 20 30 400 50 6 7 8 90 5
cpu1 1 2 3 4 5 6 7 8 0 0
cpu10 7 7 7 7 7 7 7 7 7 7
intr 1 2 3
"""


def test_counters_of_the_usable_cores_alone():
    passed, worked, steal = busy.parse(STAT_TEXT, [0, 1])
    assert (passed, worked, steal) == pytest.approx((6.57, 1.82, 0.16))
    passed, worked, steal = busy.parse(STAT_TEXT, [1])
    assert (passed, worked, steal) == pytest.approx((0.36, 0.19, 0.08))
    assert busy.parse("cpu 1 1 1 1\n", [0]) == (0, 0, 0)


def test_shares_and_the_rounds_in_which_others_took_more():
    samples = [
        (0, Sample(10.0, 5.0, 1.0)),
        (3, Sample(12.0, 5.02, 1.0)),  # 1 %
        (4, Sample(14.0, 5.02, 1.2)),  # 10 %, all of it steal
        (9, Sample(16.0, 5.00, 1.2)),  # ticks that do not add up
        (11, Sample(18.0, 5.60, 1.2)),  # 30 %
        (12, Sample(20.0, 5.60, 1.2)),
    ]
    found = of_samples(samples, 2)
    assert found.others == pytest.approx(0.08) and found.steal == pytest.approx(0.02)
    assert found.rounds == (4, 10, 11) and found.timed == 12 and found.notable
    assert str(found) == (
        "busy machine: others took 8% of the time of 2 cores (/proc/stat, steal 2%), "
        "over 5% in 3 of 12 rounds: 4, 10-11"
    )


def test_a_quiet_machine_gives_no_warning():
    found = of_samples([(0, Sample(0.0, 1.0, 0.0)), (8, Sample(10.0, 1.1, 0.0))], 2)
    assert found.rounds == () and not found.notable
    assert of_samples([(0, Sample(0.0, 1.0, 0.0)), (8, Sample(10.0, 1.6, 0.0))], 2).notable


def test_a_load_average_without_its_memory_of_before():
    """Four threads wanted a core before the rounds, and three during them, two of them ours."""
    kept = math.exp(-2)
    found = of_load(120.0, 4.0, 4 * kept + 3 * (1 - kept), 240.0, 2, 20)
    assert found.source == LOAD and found.others == pytest.approx(0.5)
    assert found.notable and found.rounds is None and found.steal is None
    assert str(found).endswith("others wanted 50% of the time of 2 cores (load average), over 25%")
    assert not of_load(120.0, 4.0, 4 * kept + 2 * (1 - kept), 240.0, 2, 20).notable
    assert of_load(5.0, 1.0, 9.0, 1.0, 2, 3) is None


class Machine:
    """A clock and counters that pass as the test says."""

    def __init__(self, monkeypatch, still=False):
        self.now = self.own = self.others = 0.0
        self.passing = 0 if still else 2
        monkeypatch.setattr(
            busy, "_sample", lambda: Sample(self.passing * self.now, self.others, 0)
        )
        monkeypatch.setattr(busy, "_load", lambda: 1.0)
        monkeypatch.setattr(busy, "usable_cores", lambda: 2)
        monkeypatch.setattr(busy.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(busy.time, "process_time", lambda: self.own)

    def passes(self, seconds, others=0.0):
        self.now += seconds
        self.others += others


def test_short_rounds_are_judged_together(monkeypatch):
    machine = Machine(monkeypatch)
    watch = Watch()
    for number in range(1, 18):
        machine.passes(0.25, others=0.25 if number == 6 else 0.0)
        watch.round_done()
    found = watch.busy()
    assert found.source == STAT and found.rounds == (5, 6, 7, 8) and found.timed == 17
    assert found.others == pytest.approx(0.25 / (2 * 17 * 0.25))


def test_what_is_left_over_joins_the_rounds_before(monkeypatch):
    machine = Machine(monkeypatch)
    watch = Watch()
    for others in (0.0, 0.0, 0.0, 0.5):
        machine.passes(0.6, others)
        watch.round_done()
    assert watch.busy().rounds == (3, 4)
    watch = Watch()
    machine.passes(0.1, others=0.1)
    watch.round_done()
    assert watch.busy().rounds == (1,)


def test_counters_that_stand_still_are_not_believed(monkeypatch):
    machine = Machine(monkeypatch, still=True)
    watch = Watch()
    for _ in range(40):
        machine.passes(1.0)
        watch.round_done()
    assert watch.busy().source == LOAD


def test_a_system_without_counters(monkeypatch):
    monkeypatch.setattr(busy, "_sample", lambda: None)
    monkeypatch.setattr(busy, "_load", lambda: None)
    watch = Watch()
    watch.round_done()
    assert watch.busy() is None


def test_rounds_are_named_in_ranges():
    assert busy._ranges([1]) == "1" and busy._ranges([]) == ""
    assert busy._ranges([1, 2, 3, 5, 8, 9]) == "1-3, 5, 8-9"
    assert busy._ranges(range(1, 200, 2)) == "1, 3, 5, 7, 9, 11, 13, 15, ..."


@pytest.mark.skipif(not busy.Path(STAT).exists(), reason="no /proc/stat here")
def test_this_systems_counters_are_those_of_its_clock():
    before, start = busy._sample(), busy.time.monotonic()
    busy.time.sleep(0.5)
    after, seconds = busy._sample(), busy.time.monotonic() - start
    share = (after.passed - before.passed) / seconds / busy.usable_cores()
    assert 0.5 < share < 1.5  # ticks of 10 ms
    assert after.others >= before.others - 0.1 and after.steal >= before.steal

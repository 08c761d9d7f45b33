# SPDX-License-Identifier: Apache-2.0
"""Whether the machine was busy with other work while something was timed.

On Linux, /proc/stat counts the time of each core. The share of others is the busy time of the cores
that this process may use, less its own, plus what the hypervisor took (steal). The file counts
ticks of 10 ms, so rounds are judged in spans of at least SPAN seconds, short rounds together.
Elsewhere the load average gives the threads that wanted a core over the whole time; it lags by a
minute and knows no rounds. Without either there is no warning.
"""

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from vivit_jax.data.video.sequence import usable_cores

STAT, LOAD = "/proc/stat", "load average"
# Shares of the cores' time that are worth a warning. Two cores measured 1 to 3 %, now and then 5,
# on a quiet machine and 19 to 46 % beside one busy process; by load average, which counts this
# process's own waiting threads as others, 3 and 94 %.
THRESHOLD = {STAT: 0.05, LOAD: 0.25}
SPAN = 1.0
_TICKS = 100  # per second
_MINUTE = 60.0  # time constant of the first load average, in seconds
_LEAST_LOAD_SECONDS = 30.0
_NAMED = 8  # runs of rounds in the warning


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds of all usable cores together, since some start."""

    passed: float
    others: float  # of other processes, without steal
    steal: float


@dataclasses.dataclass(frozen=True)
class Busy:
    """The shares of the cores' time that others took while rounds were timed."""

    source: str  # STAT or LOAD
    threshold: float
    cores: int
    others: float  # with steal
    steal: float | None  # None if unknown
    rounds: tuple[int, ...] | None  # those over the threshold, from 1
    timed: int  # rounds

    @property
    def notable(self) -> bool:
        """Whether it is worth a warning."""
        return self.others > self.threshold or bool(self.rounds)

    def __str__(self) -> str:
        steal = "" if self.steal is None else f", steal {self.steal:.0%}"
        took = "took" if self.source == STAT else "wanted"
        text = (
            f"busy machine: others {took} {self.others:.0%} of the time of {self.cores} cores "
            f"({self.source}{steal}), over {self.threshold:.0%}"
        )
        if self.rounds is None:
            return text
        return f"{text} in {len(self.rounds)} of {self.timed} rounds: {_ranges(self.rounds)}"


def of_samples(samples: Sequence[tuple[int, Sample]], cores: int) -> Busy:
    """From consecutive samples, each with the number of rounds done; the first has 0."""
    (_, first), (timed, last) = samples[0], samples[-1]
    others, steal = _shares(first, last)
    limit, busy = THRESHOLD[STAT], []
    for (done, before), (now, after) in zip(samples[:-1], samples[1:], strict=True):
        if _shares(before, after)[0] > limit:
            busy += range(done + 1, now + 1)
    return Busy(STAT, limit, cores, others, steal, tuple(busy), timed)


def _shares(before: Sample, after: Sample) -> tuple[float, float]:
    """Of others with steal, and of steal; rounding to ticks may make them negative, so clipped."""
    passed = max(after.passed - before.passed, 1 / _TICKS)
    steal = max(0.0, after.steal - before.steal) / passed
    return max(0.0, after.others - before.others) / passed + steal, steal


def of_load(
    seconds: float, before: float, after: float, own: float, cores: int, timed: int
) -> Busy | None:
    """From the one-minute load averages before and after, and this process's own CPU seconds.

    A load average decays by a factor of e a minute, so the mean in between follows from both. None
    if the time was too short.
    """
    if seconds < _LEAST_LOAD_SECONDS:
        return None
    kept = math.exp(-seconds / _MINUTE)
    wanted = (after - before * kept) / (1 - kept)
    others = max(0.0, wanted - own / seconds) / cores
    return Busy(LOAD, THRESHOLD[LOAD], cores, others, None, None, timed)


class Watch:
    """Counts from now on; call `round_done` after every round."""

    def __init__(self):
        self._cores, self._done = usable_cores(), 0
        self._start, self._own, self._load = time.monotonic(), time.process_time(), _load()
        self._at, self._samples = self._start, list[tuple[int, Sample]]()
        self._add_sample()

    def _add_sample(self) -> None:
        sample = _sample()
        if sample is not None:
            self._samples.append((self._done, sample))

    def round_done(self) -> None:
        """Take a sample at the end of a round, unless the last one was a moment ago."""
        self._done += 1
        if self._samples and time.monotonic() - self._at >= SPAN:
            self._add_sample()
            self._at = time.monotonic()

    def busy(self) -> Busy | None:
        """What was seen until now; None if the system has no counters."""
        seconds = time.monotonic() - self._start
        last = _sample()
        if self._samples and last is not None:
            # Rounds since the last sample are too short to be judged alone: they join those before.
            samples = [*(self._samples[:-1] or self._samples), (self._done, last)]
            # Some sandboxes have a /proc/stat that stands still.
            if samples[-1][1].passed - samples[0][1].passed > self._cores * seconds / 2:
                return of_samples(samples, self._cores)
        load = _load()
        if self._load is None or load is None:
            return None
        own = time.process_time() - self._own
        return of_load(seconds, self._load, load, own, self._cores, self._done)


def parse(stat: str, usable: Sequence[int]) -> tuple[float, float, float]:
    """Seconds of the usable cores in a /proc/stat: passed, worked, and lost to steal.

    The line of a core has user, nice, system, idle, iowait, irq, softirq and steal; the time of
    this machine's guests is part of user.
    """
    names, sums = {f"cpu{core}" for core in usable}, [0] * 8
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in names:
            sums = [total + int(field) for total, field in zip(sums, fields[:8], strict=True)]
    user, nice, system, _, _, irq, softirq, steal = sums
    worked = user + nice + system + irq + softirq
    return sum(sums) / _TICKS, worked / _TICKS, steal / _TICKS


def _sample() -> Sample | None:
    if not hasattr(os, "sched_getaffinity") or not Path(STAT).exists():  # Linux's
        return None
    stat = Path(STAT).read_text()
    passed, worked, steal = parse(stat, sorted(os.sched_getaffinity(0)))
    return Sample(passed, worked - time.process_time(), steal)


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as "3, 5-9, 14"; at most _NAMED runs of them."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    named = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs[:_NAMED])
    return named if len(runs) <= _NAMED else f"{named}, ..."

# SPDX-License-Identifier: Apache-2.0
"""Rounds in which sides take turns, and their times."""

import dataclasses
import datetime
import importlib.metadata
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from vivit_jax.benchmark.busy import Busy, Watch
from vivit_jax.benchmark.intervals import Interval, Ratio, interval, ratio
from vivit_jax.benchmark.sides import Runnable
from vivit_jax.data.video.sequence import usable_cores


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one step of a side, over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / 2 / self.median

    @property
    def interval(self) -> Interval:
        """The median's interval at 95 %."""
        return interval(self.seconds)

    def over(self, other: "Timing") -> Ratio:
        """The ratio to another side in the same rounds."""
        return ratio(self.seconds, other.seconds)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The number of rounds, and the seed of the order of the sides in each.

    There are `least` rounds; with `until`, there are more until the intervals in question reach no
    farther than that share to either side, at most `most`.
    """

    least: int = 5
    until: float | None = None
    most: int = 200
    seed: int = 0


QUICK_LOOK = Rounds()


@dataclasses.dataclass(frozen=True)
class Measured:
    """The sides' times, the reach of their intervals, and the load of other work."""

    timings: dict[str, Timing]
    reach: float | None  # None for too few rounds
    busy: Busy | None  # None if the system has no counters


Timings = Mapping[str, Timing]


def alternate(
    sides: Sequence[Runnable],
    rounds: Rounds,
    reach: Callable[[Timings], float | None] = lambda _: None,
) -> Measured:
    """Time every warm side once a round, in an order drawn anew for each round.

    What slows the machine down for a while slows all sides down, so ratios hold where times do not;
    in a fixed order a side would always follow the same one. A turn is two steps in a row, of which
    the second is timed, as steps follow each other in use: the first finds caches and memory as the
    other side left them, which took a pre-training step of VideoMAE-B from 4.7 to 5.5 s. `reach`
    gives the farthest reach of the intervals in question after some rounds.
    """
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    rng, watch, done = np.random.default_rng(rounds.seed), Watch(), 0
    while True:
        for i in rng.permutation(len(sides)):
            side = sides[i]
            side.run()
            start = time.perf_counter()
            side.run()
            seconds[side.name].append(time.perf_counter() - start)
        done += 1
        watch.round_done()
        if done < rounds.least:
            continue
        timings = {name: Timing(tuple(times)) for name, times in seconds.items()}
        known = reach(timings)
        enough = rounds.until is None or (known is not None and known <= rounds.until)
        if enough or done >= rounds.most:
            return Measured(timings, known, watch.busy())


PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "av", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Environment:
    """The machine, the versions, the date and the command of a measurement."""

    device: str
    cores: int
    versions: dict[str, str]  # of the packages that are installed
    date: str
    command: str

    @property
    def line(self) -> str:
        """All of it but the command, in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device}, {self.cores} cores; {versions}; {self.date}"


def environment() -> Environment:
    """The current environment."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return Environment(_device(), usable_cores(), versions, f"{datetime.date.today()}", command)


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{cpu_name()} CPU"


def cpu_name() -> str:
    """The processor's name, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

# SPDX-License-Identifier: Apache-2.0
"""Rounds in which sides take turns, and what their times are."""

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
        """The middle round."""
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range between first and third quartile, as a share of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / 2 / self.median

    @property
    def interval(self) -> Interval:
        """Where the median lies at 95 %."""
        return interval(self.seconds)

    def over(self, other: "Timing") -> Ratio:
        """The ratio to another side of the same rounds."""
        return ratio(self.seconds, other.seconds)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How many rounds there are, and the seed of the order of the sides in each.

    `least` rounds; with `until` on from there until the intervals of what is asked for reach no
    farther than that share to either side, or `most` rounds are done.
    """

    least: int = 5
    until: float | None = None
    most: int = 200
    seed: int = 0


QUICK_LOOK = Rounds()


@dataclasses.dataclass(frozen=True)
class Measured:
    """The sides' times, how far the intervals reach, and what others did meanwhile."""

    timings: dict[str, Timing]
    reach: float | None  # None for too few rounds to tell
    busy: Busy | None  # None where the system does not tell


Timings = Mapping[str, Timing]


def alternate(
    sides: Sequence[Runnable],
    rounds: Rounds,
    reach: Callable[[Timings], float | None] = lambda _: None,
) -> Measured:
    """Every side once in each round, in an order drawn anew for each; warm sides only.

    What slows the machine down for a while slows all sides down, so that ratios hold where times
    do not; in turns of one order a side would always have the same one before it. A turn is two
    steps in a row, of which the second counts, as in use one step follows another: the first finds
    the caches and the memory of the side before, which took a pre-training step of VideoMAE-B from
    4.7 to 5.5 s. `reach` says how well what is asked for is known after some rounds.
    """
    seconds = {side.name: [] for side in sides}
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


PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "av", "torch", "transformers", "torchcodec")


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
    """The environment of this process."""
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
    """What the processor calls itself, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

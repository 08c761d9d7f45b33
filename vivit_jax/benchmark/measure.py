# SPDX-License-Identifier: Apache-2.0
"""Rounds in which sides take turns, and what their times are."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np

from vivit_jax.benchmark.sides import Runnable


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one step of a side, over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range between first and third quartile, as a share of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / 2 / self.median

    def over(self, other: "Timing") -> float:
        """The middle of the rounds' ratios to another side of the same rounds."""
        return statistics.median(
            mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)
        )


def alternate(sides: Sequence[Runnable], repeats: int) -> dict[str, Timing]:
    """Every side once in each round, in turn forwards and backwards; warm sides only.

    What slows the machine down for a while slows all sides down, so that ratios hold where times
    do not. A turn is two steps in a row, of which the second counts, as in use one step follows
    another: the first finds the caches and the memory of the side before, which took a
    pre-training step of VideoMAE-B from 4.7 to 5.5 s.
    """
    seconds = {side.name: [] for side in sides}
    for round_ in range(repeats):
        for side in sides[:: 1 if round_ % 2 == 0 else -1]:
            side.run()
            start = time.perf_counter()
            side.run()
            seconds[side.name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}

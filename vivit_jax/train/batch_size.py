# SPDX-License-Identifier: Apache-2.0
"""The batch for a number of clips."""

import math

FEW, LARGE = 1000, 10_000  # clips; from LARGE on papers' recipes are followed


def suited_batch(clips: int, unit: int = 1, most: int = 256) -> int:
    """A batch for so many clips, a multiple of `unit`: a power of two, four steps an epoch or more.

    At most 16 for FEW clips, 64 below LARGE, `most` above; 0 for fewer clips than a unit.
    """
    limit = 16 if clips < FEW else 64 if clips < LARGE else most
    power = 2 ** int(math.log2(max(clips / 4, 1)))
    wanted = min(max(power, 4), limit, clips)
    return max(wanted // unit, min(1, clips // unit)) * unit

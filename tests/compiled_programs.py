# SPDX-License-Identifier: Apache-2.0
"""What XLA made of a program on a mesh, in the few words that tests compare."""

import math

from vivit_jax.train.planning.compiled import read_program


def collectives(compiled, mesh) -> list[str]:
    """The kinds of a compiled program's collectives, one for each, in alphabetical order."""
    return sorted(each.kind for each in read_program(compiled, mesh).collectives)


def moved(compiled, mesh) -> list[tuple]:
    """Of each of a compiled program's collectives its kind, its axes, its bytes and how often."""
    found = read_program(compiled, mesh).collectives
    return sorted((each.kind, each.axes, each.bytes, each.times) for each in found)


def rounds(compiled, mesh) -> list[int]:
    """How many rounds each of its loops has, in order of size."""
    return sorted(each.trips for each in read_program(compiled, mesh).loops)


def largest(compiled, mesh) -> int:
    """Elements of the largest array that an operation of a device returns."""
    operations = read_program(compiled, mesh).operations
    return max(math.prod(array.shape) for each in operations for array in each.results)

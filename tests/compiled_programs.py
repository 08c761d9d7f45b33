# SPDX-License-Identifier: Apache-2.0
"""What XLA made of a program: its collectives, its loops and its largest array."""

import math
import re

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(compiled) -> list[str]:
    """The kinds of a compiled program's collectives, one for each."""
    return re.findall(rf" = .*? ({COLLECTIVES})(?:-start)?\(", compiled.as_text())


def rounds(compiled) -> list[int]:
    """How many rounds each of its loops has, in order of size."""
    return sorted(map(int, re.findall(r'known_trip_count":\{"n":"(\d+)"', compiled.as_text())))


def largest(compiled) -> int:
    """Elements of its largest array on one device."""
    shapes = re.findall(r"\b(?:bf16|f16|f32|f64)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)

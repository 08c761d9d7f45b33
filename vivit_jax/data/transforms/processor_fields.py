# SPDX-License-Identifier: Apache-2.0
"""Checks and normalises the values of a `VideoProcessor`'s fields."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from vivit_jax.data.transforms.processor_keys import VIDEOMAE, VIVIT
from vivit_jax.errors import ConfigError
from vivit_jax.files.limits import check_unpacked

# Forms of a size, and the classes of transformers that resize to them.
_RESIZES = {
    ("shortest_edge",): (VIVIT, VIDEOMAE),
    ("height", "width"): (VIVIT, VIDEOMAE),
    ("longest_edge", "shortest_edge"): (VIDEOMAE,),
    ("max_height", "max_width"): (VIDEOMAE,),
    ("longest_edge",): (),
    ("max_pixels", "min_pixels"): (),
}


def checked_sides(
    name: str, value: Any, used: bool, kind: str | None = None, *, square: bool = False
) -> dict[str, int]:
    """A size in pixels by side, which the class can resize to if its step is on (`used`)."""
    forms = [form for form, kinds in _RESIZES.items() if kind in kinds or not used]
    if square and used:
        forms = [("height", "width")]
    listed = ("{" + ", ".join(f"{side!r}: n" for side in form) + "}" for form in forms)
    expected = f"{', '.join(listed)}, (h, w) or one int"
    sides: dict[str, Any]
    if isinstance(value, Mapping):
        sides = dict(value)
    elif isinstance(value, list | tuple) and len(value) == 2:
        sides = {"height": value[0], "width": value[1]}
    elif square:
        sides = {"height": value, "width": value}
    else:
        sides = {"shortest_edge": value}
    if sides.keys() not in [set(form) for form in forms] or not all(
        is_integer(side) and side > 0 for side in sides.values()
    ):
        raise ConfigError(f"{name} is {value!r}, expected {expected}, in pixels above 0")
    sides = {key: int(side) for key, side in sides.items()}
    pixels = math.prod(sides.values()) if len(sides) == 2 else next(iter(sides.values())) ** 2
    # Three channels of float32.
    check_unpacked(f"a frame of {name} {value!r}", 12 * pixels, error=ConfigError)
    return sides


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of any type, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def finite(name: str, value: Any) -> float:
    """The value as a float. Raises ConfigError for anything but a finite number."""
    try:
        found = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, expected a finite number")
    return found


def per_channel(name: str, value: Any) -> float | tuple[float, ...]:
    """A finite number, or one for each channel. Raises ConfigError for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value):
        return tuple(finite(name, entry) for entry in value)
    return finite(name, value)

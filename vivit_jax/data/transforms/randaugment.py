# SPDX-License-Identifier: Apache-2.0
"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) of clips, with one draw for all frames.

Two families have the operations and magnitudes of the code that trained the papers' models: "timm"
for VideoMAE (with geometric operations) and "scenic" for ViViT (colours and Cutout only). Clips are
uint8 [t, h, w, 3], RGB. The operations themselves are in `vivit_jax.data.transforms.image_ops`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from vivit_jax.data.transforms.geometric_ops import GEOMETRIC, Box, geometric
from vivit_jax.data.transforms.image_ops import Clip, apply_scenic, apply_timm
from vivit_jax.errors import UserError

TIMM_OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
SCENIC_OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "Cutout",
    "SolarizeAdd",
)
_ENHANCE = ("Color", "Contrast", "Brightness", "Sharpness")
# Those whose pixels depend on more than their neighbours.
_WHOLE = (*GEOMETRIC, "AutoContrast", "Equalize", "Contrast")
_NUMBER = r"(\d+(?:\.\d+)?)"
_PARTS = {  # of a text: field, form, type
    "timm": {
        "m": ("magnitude", _NUMBER, float),
        "n": ("layers", r"(\d+)", int),
        "mstd": ("std", _NUMBER, float),
        "p": ("probability", _NUMBER, float),
        "inc": ("increasing", r"([01])", lambda digit: digit == "1"),
    },
    "scenic": {"m": ("magnitude", _NUMBER, float), "n": ("layers", r"(\d+)", int)},
}
_FORMS = {
    "timm": "'rand-m<magnitude>-n<layers>' and any of '-mstd<spread of the magnitude>', "
    "'-p<probability>' and '-inc1', as in 'rand-m7-n4-mstd0.5-inc1'",
    "scenic": "'scenic-m<magnitude>-n<layers>', as in 'scenic-m20-n2'",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Which operations a clip goes through, see `rand_augment`."""

    family: Literal["timm", "scenic"]
    layers: int  # operations drawn, with replacement
    magnitude: float  # at most 10 in "timm", unbounded in "scenic"
    std: float = 0.0  # of the magnitude, which "timm" draws for each operation
    probability: float = 0.5  # of applying a drawn operation; "scenic" applies all
    increasing: bool = False  # whether more magnitude always means more change in "timm"

    def __post_init__(self):
        if self.family not in _PARTS:
            raise UserError(f"family is {self.family!r}, expected one of {tuple(_PARTS)}")
        if self.layers < 1:
            raise UserError(f"layers of RandAugment is {self.layers}, expected at least 1")
        for name, most in (("magnitude", math.inf), ("std", math.inf), ("probability", 1)):
            value = getattr(self, name)
            if not 0 <= value <= most or value == math.inf:
                limits = "0 or more" if most == math.inf else f"0 to {most}"
                raise UserError(f"{name} of RandAugment is {value}, expected {limits}")


def parse_rand_augment(text: str) -> RandAugment:
    """Reads "rand-m7-n4-mstd0.5-inc1" (timm's notation) or "scenic-m20-n2".

    Parts come in any order; m and n are required. In "rand-..." the others default to `mstd0`,
    `p0.5` and `inc0`. Raises `UserError` for anything else.
    """
    name, *parts = text.split("-")
    families: dict[str, Literal["timm", "scenic"]] = {"rand": "timm", "scenic": "scenic"}
    family = families.get(name)
    if family is None:
        raise UserError(
            f"rand_augment is {text!r}, expected {_FORMS['timm']}, or {_FORMS['scenic']}"
        )
    fields: dict[str, Any] = {}
    for part in parts:
        for key, (field, form, kind) in _PARTS[family].items():
            match = re.fullmatch(key + form, part)
            if match and field not in fields:
                fields[field] = kind(match[1])
                break
        else:
            raise UserError(
                f"rand_augment is {text!r}, in which {part!r} is unknown or repeated: "
                f"expected {_FORMS[family]}"
            )
    missing = [field for field in ("magnitude", "layers") if field not in fields]
    if missing:
        raise UserError(f"rand_augment is {text!r} without {missing[0]}: expected {_FORMS[family]}")
    try:
        return RandAugment(family=family, **fields)
    except UserError as error:
        raise UserError(f"rand_augment is {text!r}: {error}") from error


def rand_augment(
    rng: np.random.Generator, clip: UInt8[np.ndarray, "t h w 3"], spec: RandAugment
) -> UInt8[np.ndarray, "t h w 3"]:
    """Applies `spec.layers` random operations, each with one argument for all frames.

    "timm": drawn uniformly from `TIMM_OPERATIONS`, each applied with `spec.probability`, its
    magnitude normal with `spec.std` around `spec.magnitude` and clipped to [0, 10], its sign drawn.
    "scenic": drawn uniformly from `SCENIC_OPERATIONS` and the identity, with a fixed magnitude.

    Args:
        rng: source of all draws.
        clip: uint8 [t, h, w, 3], RGB; not modified.
        spec: from `parse_rand_augment`.

    Returns:
        uint8 [t, h, w, 3].

    Raises:
        UserError: another dtype, number of axes or of channels.
    """
    check_colours(clip)
    if spec.family == "timm":
        return apply_operations(clip, draw_operations(rng, spec), (0, 0, *clip.shape[1:3]))
    for _ in range(spec.layers):
        index = rng.integers(len(SCENIC_OPERATIONS) + 1)
        if index < len(SCENIC_OPERATIONS):
            clip = _apply_scenic(rng, clip, SCENIC_OPERATIONS[index], spec.magnitude)
    return clip


def check_colours(clip: np.ndarray) -> None:
    """UserError for a clip that RandAugment cannot change."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise UserError(
            f"a clip is {clip.dtype} {list(clip.shape)}, expected uint8 [t, h, w, 3]: RandAugment "
            "changes colours, so it needs RGB frames; set augment.rand_augment to None for others"
        )


def draw_operations(rng: np.random.Generator, spec: RandAugment) -> list[tuple[str, float]]:
    """Draws what `rand_augment` does to a clip in the "timm" family: names and arguments."""
    operations = []
    for _ in range(spec.layers):
        name = TIMM_OPERATIONS[rng.integers(len(TIMM_OPERATIONS))]
        if rng.random() < spec.probability:
            level = float(np.clip(rng.normal(spec.magnitude, spec.std), 0, 10))
            sign = 1 if rng.random() < 0.5 else -1
            operations.append((name, timm_argument(name, level, sign, spec.increasing)))
    return operations


def apply_operations(
    clip: UInt8[np.ndarray, "t _ _ 3"], operations: Sequence[tuple[str, float]], box: Box
) -> UInt8[np.ndarray, "t h w 3"]:
    """Applies operations of `draw_operations` one after the other, and returns what `box` shows.

    After the last operation that sees whole frames (it moves pixels or counts levels), only the box
    is computed, and a pixel around it for each Sharpness.
    """
    whole = [i for i, (name, _) in enumerate(operations) if name in _WHOLE]
    last = whole[-1] if whole else -1
    edge = sum(name == "Sharpness" for name, _ in operations[last + 1 :])
    top, left, height, width = box
    rows = max(top - edge, 0), min(top + height + edge, clip.shape[1])
    columns = max(left - edge, 0), min(left + width + edge, clip.shape[2])
    wider = rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0]
    for name, argument in operations[: max(last, 0)]:
        clip = apply_timm(clip, name, argument)
    if whole and operations[last][0] in GEOMETRIC:
        clip = geometric(clip, *operations[last], wider)
    else:
        clip = apply_timm(clip, *operations[last]) if whole else clip
        clip = clip[:, slice(*rows), slice(*columns)]
    for name, argument in operations[last + 1 :]:
        clip = apply_timm(clip, name, argument)
    top, left = top - rows[0], left - columns[0]
    return clip[:, top : top + height, left : left + width]


def timm_argument(name: str, level: float, sign: int, increasing: bool) -> float:
    """The argument of one of `TIMM_OPERATIONS` at a level of 0 to 10, 0 if it takes none.

    It is in degrees, bits to keep, a threshold, levels to add, a factor, or a share of the side.
    sign: +1 or -1, for operations with a direction.
    """
    share = level / 10
    if name in _ENHANCE:
        return 1 + sign * share * 0.9 if increasing else 0.1 + share * 1.8
    match name:
        case "Rotate":
            return sign * share * 30
        case "Posterize":
            return 4 - int(share * 4) if increasing else int(share * 4)
        case "Solarize":
            return 256 - int(share * 256) if increasing else int(share * 256)
        case "SolarizeAdd":
            return int(share * 110)
        case "ShearX" | "ShearY":
            return sign * share * 0.3
        case "TranslateX" | "TranslateY":
            return sign * share * 0.45
    return 0


def scenic_argument(name: str, magnitude: float) -> float:
    """The argument of one of `SCENIC_OPERATIONS`, 0 if it takes none; it grows beyond 10.

    There Solarize's threshold and Posterize's shift exceed a byte, see `apply_scenic`.
    """
    share = magnitude / 10
    if name in _ENHANCE:
        return 0.1 + share * 1.8
    most = {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110, "Cutout": 40}
    return int(share * most.get(name, 0))


def _apply_scenic(
    rng: np.random.Generator, clip: np.ndarray, name: str, magnitude: float
) -> np.ndarray:
    argument = scenic_argument(name, magnitude)
    if name == "Cutout":
        return _cutout(rng, clip, int(argument))
    return apply_scenic(clip, name, argument)


def _cutout(rng: np.random.Generator, clip: Clip, half: int) -> Clip:
    """Blackens a square of side 2 * `half` around a random pixel, clipped at the frames' edges."""
    y, x = rng.integers(clip.shape[1]), rng.integers(clip.shape[2])
    clip = clip.copy()
    clip[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
    return clip

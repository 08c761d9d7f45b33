# SPDX-License-Identifier: Apache-2.0
"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) of clips: the same draw for all frames.

Two families, each with the operations and magnitudes of the code that trained the papers' models:
"timm" of VideoMAE (per frame, geometric operations too) and "scenic" of ViViT (colours and
Cutout only). Clips are uint8 [t, h, w, 3], RGB.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

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
_FILL = (128, 128, 128)
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
    magnitude: float  # 10 is the strongest of "timm"; "scenic" goes on beyond it
    std: float = 0.0  # of the magnitude, which "timm" draws for each operation
    probability: float = 0.5  # that a drawn operation is applied; "scenic" applies all
    increasing: bool = False  # whether in "timm" more magnitude always means more change

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

    Parts come in any order; m and n must be there. In "rand-..." the others default to `mstd0`,
    `p0.5` and `inc0`. Raises `UserError` for anything else.
    """
    name, *parts = text.split("-")
    family = {"rand": "timm", "scenic": "scenic"}.get(name)
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
                f"rand_augment is {text!r} and {part!r} in it is unknown or there twice: "
                f"expected {_FORMS[family]}"
            )
    missing = [field for field in ("magnitude", "layers") if field not in fields]
    if missing:
        raise UserError(f"rand_augment is {text!r} without {missing[0]}: expected {_FORMS[family]}")
    try:
        return RandAugment(family=family, **fields)
    except UserError as error:
        raise UserError(f"rand_augment is {text!r}: {error}") from error


def rand_augment(rng: np.random.Generator, clip: np.ndarray, spec: RandAugment) -> np.ndarray:
    """Applies `spec.layers` random operations, each with one argument for all frames.

    "timm": uniform over `TIMM_OPERATIONS`, each applied with `spec.probability`, the magnitude
    normal with `spec.std` around `spec.magnitude` and clipped to [0, 10], signs drawn. "scenic":
    uniform over `SCENIC_OPERATIONS` and doing nothing, always applied, fixed magnitude.

    Args:
        rng: source of all draws.
        clip: uint8 [t, h, w, 3], RGB; is not written to.
        spec: of `parse_rand_augment`.

    Returns:
        uint8 [t, h, w, 3].

    Raises:
        UserError: another dtype, number of axes or of channels.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise UserError(
            f"a clip is {clip.dtype} {list(clip.shape)}, expected uint8 [t, h, w, 3]: RandAugment "
            "changes colours and needs RGB frames; set augment.rand_augment to None for others"
        )
    for _ in range(spec.layers):
        if spec.family == "scenic":
            index = rng.integers(len(SCENIC_OPERATIONS) + 1)
            if index < len(SCENIC_OPERATIONS):
                clip = _apply_scenic(rng, clip, SCENIC_OPERATIONS[index], spec.magnitude)
            continue
        name = TIMM_OPERATIONS[rng.integers(len(TIMM_OPERATIONS))]
        if rng.random() < spec.probability:
            level = float(np.clip(rng.normal(spec.magnitude, spec.std), 0, 10))
            sign = 1 if rng.random() < 0.5 else -1
            clip = apply(clip, name, timm_argument(name, level, sign, spec.increasing))
    return clip


def timm_argument(name: str, level: float, sign: int, increasing: bool) -> float | int | None:
    """The argument of one of `TIMM_OPERATIONS` at a level of 0 to 10, None where it takes none.

    Degrees, bits that are kept, thresholds and levels to add, a factor, or a share of the side.
    sign: +1 or -1, for those that have a direction.
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
    return None


def scenic_argument(name: str, magnitude: float) -> float | int | None:
    """The argument of one of `SCENIC_OPERATIONS`; beyond a magnitude of 10 it goes on growing.

    Solarize's threshold and what Posterize shifts by are then no byte any more, see
    `apply_scenic`.
    """
    share = magnitude / 10
    if name in _ENHANCE:
        return 0.1 + share * 1.8
    most = {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110, "Cutout": 40}.get(name)
    return None if most is None else int(share * most)


def _apply_scenic(
    rng: np.random.Generator, clip: np.ndarray, name: str, magnitude: float
) -> np.ndarray:
    argument = scenic_argument(name, magnitude)
    if name == "Cutout":
        return _cutout(rng, clip, argument)
    return apply_scenic(clip, name, argument)


def apply_scenic(clip: np.ndarray, name: str, argument: float | int | None) -> np.ndarray:
    """Applies one of `SCENIC_OPERATIONS` but Cutout, with an argument of `scenic_argument`.

    All frames are one tall image, as in scenic: AutoContrast, Equalize and Contrast have one curve
    for the clip, and Sharpness mixes the last row of a frame with the first of the next. Values are
    those of scenic's TensorFlow code, which cuts off fractions where Pillow rounds, and whose bytes
    wrap: Solarize's threshold counts modulo 256, 384 as 128 and 256 and 512 as 0, which inverts
    all; Posterize shifts by at most 7 and by 7 where it would shift by less than nothing.

    Source: scenic, dataset_lib/video_ops.py, and the RandAugment of the TensorFlow model garden
    that it calls, run in TensorFlow 2.21.
    """
    levels = np.arange(256)
    match name:
        case "Posterize":
            shift = min((8 - argument) % 256, 7)
            return _look_up(clip, levels >> shift << shift)
        case "Solarize":
            return apply(clip, name, argument % 256)
        case "AutoContrast":
            return _stretched(clip)
        case "Equalize":
            return apply(_tall(clip)[None], name, argument).reshape(clip.shape)
        case "Color":
            return _blended(_grey(clip)[..., None], clip, argument)
        case "Contrast":
            # Scenic's grey level is a sum of counts over 256, not the mean level that Pillow takes:
            # white for every clip of more than 65,280 pixels. Its models were trained with that.
            grey = min(clip[..., 0].size // 256, 255)
            return _blended(np.uint8(grey), levels.astype(np.uint8), argument).take(clip)
        case "Sharpness":
            tall = _tall(clip)
            return _blended(_smoothed(tall), tall, argument).reshape(clip.shape)
    return apply(clip, name, argument)  # Invert, SolarizeAdd and Brightness


def _tall(clip: np.ndarray) -> np.ndarray:
    """The frames of a clip [t, h, w, c] below each other, [t * h, w, c]."""
    return clip.reshape(-1, *clip.shape[2:])


def _blended(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """From the bytes of `start` towards those of `end` and beyond, fractions cut off."""
    start, factor = start.astype(np.float32), np.float32(factor)
    return (start + factor * (end - start)).clip(0, 255).astype(np.uint8)


def _grey(clip: np.ndarray) -> np.ndarray:
    """TensorFlow's grey of RGB bytes [..., 3]: weights that sum up to 0.9999, float32, cut off."""
    unit = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    red, green, blue = (
        (unit * np.float32(weight)).take(clip[..., channel])
        for channel, weight in enumerate((0.2989, 0.5870, 0.1140))
    )
    return ((red + green + blue) * np.float32(255.5)).astype(np.uint8)


def _stretched(clip: np.ndarray) -> np.ndarray:
    """Each channel by itself from its lowest and highest byte to 0 and 255."""
    stretched = np.empty_like(clip)
    for channel in range(clip.shape[-1]):
        plane = clip[..., channel]
        table = levels = np.arange(256, dtype=np.float32)
        low, high = levels[plane.min()], levels[plane.max()]
        if high > low:
            scale = np.float32(255) / (high - low)
            table = levels * scale - low * scale
        stretched[..., channel] = _look_up(plane, table)
    return stretched


def _smoothed(image: np.ndarray) -> np.ndarray:
    """Each byte of [h, w, c] as the mean over 3x3, itself five times; those of the border stay.

    The fraction is cut off. Scenic adds thirteenths in float32, by which a sum that is a whole
    level may come out as the level below, on some processors and not on others.
    """
    if min(image.shape[:2]) < 3:
        return image
    wide = image.astype(np.int16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    smoothed = image.copy()
    smoothed[1:-1, 1:-1] = sums // 13
    return smoothed


def _cutout(rng: np.random.Generator, clip: np.ndarray, half: int) -> np.ndarray:
    """Blackens a square of side 2 * `half` around any pixel, cut off at the frames' edges."""
    y, x = rng.integers(clip.shape[1]), rng.integers(clip.shape[2])
    clip = clip.copy()
    clip[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
    return clip


def apply(clip: np.ndarray, name: str, argument: float | int | None) -> np.ndarray:
    """Applies one of `TIMM_OPERATIONS` to each frame, with an argument of `timm_argument`."""
    from PIL import Image, ImageEnhance, ImageOps

    levels = np.arange(256)
    match name:
        case "Invert":
            return 255 - clip
        case "Posterize":
            return _look_up(clip, levels & (0xFF << max(8 - argument, 0)))
        case "Solarize":
            return _look_up(clip, np.where(levels < argument, levels, 255 - levels))
        case "SolarizeAdd":
            return _look_up(clip, np.where(levels < 128, levels + argument, levels))
        case "Brightness":
            return _look_up(clip, levels.astype(np.float32) * argument)  # as precise as Pillow
        case "AutoContrast":
            return _each_frame(clip, ImageOps.autocontrast)
        case "Equalize":
            return _each_frame(clip, ImageOps.equalize)
        case "Color" | "Contrast" | "Sharpness":
            enhance = getattr(ImageEnhance, name)
            return _each_frame(clip, lambda frame: enhance(frame).enhance(argument))
    height, width = clip.shape[1:3]
    settings = {"resample": Image.Resampling.BICUBIC, "fillcolor": _FILL}
    if name == "Rotate":
        return _each_frame(clip, lambda frame: frame.rotate(argument, **settings))
    # Where in the frame each pixel comes from: a, b, c, d, e, f of x' = ax + by + c, y' = ...
    places = {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * height),
    }[name]
    affine = Image.Transform.AFFINE
    return _each_frame(
        clip, lambda frame: frame.transform((width, height), affine, places, **settings)
    )


def _look_up(clip: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replaces each level by its entry in `table` [256], cut to 0 to 255 and rounded down."""
    return table.clip(0, 255).astype(np.uint8).take(clip)


def _each_frame(clip: np.ndarray, change: Callable) -> np.ndarray:
    from PIL import Image

    changed = np.empty_like(clip)
    for frame, out in zip(clip, changed, strict=True):
        out[:] = np.asarray(change(Image.fromarray(frame)))
    return changed

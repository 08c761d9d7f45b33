# SPDX-License-Identifier: Apache-2.0
"""The image operations of RandAugment: Pillow's, as timm applies them, and scenic's.

`vivit_jax.data.transforms.randaugment` draws the operations and computes their arguments.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped, UInt8

from vivit_jax.data.transforms.geometric_ops import geometric

Clip = UInt8[np.ndarray, "t h w c"]
Frame = UInt8[np.ndarray, "h w c"]


def apply_scenic(clip: Clip, name: str, argument: float) -> Clip:
    """Applies one of `SCENIC_OPERATIONS` except Cutout, with an argument of `scenic_argument`.

    As in scenic, all frames form one tall image: AutoContrast, Equalize and Contrast have one curve
    for the clip, and Sharpness mixes the last row of a frame with the first of the next. Values are
    those of scenic's TensorFlow code, which truncates where Pillow rounds, and whose bytes wrap:
    Solarize's threshold counts modulo 256 (384 is 128; 256 and 512 are 0, which inverts all);
    Posterize shifts by at most 7, and by 7 for negative shifts.

    Source: scenic, dataset_lib/video_ops.py, and the RandAugment of the TensorFlow model garden
    that it calls, run in TensorFlow 2.21.
    """
    levels = np.arange(256)
    match name:
        case "Posterize":
            shift = min((8 - int(argument)) % 256, 7)
            return _look_up(clip, levels >> shift << shift)
        case "Solarize":
            return apply_timm(clip, name, argument % 256)
        case "AutoContrast":
            return _stretched(clip)
        case "Equalize":
            return apply_timm(_tall(clip)[None], name, argument).reshape(clip.shape)
        case "Color":
            return _blended(_grey(clip)[..., None], clip, argument)
        case "Contrast":
            # Scenic's grey level is the number of pixels over 256, not Pillow's mean level: white
            # for every clip of at least 65,280 pixels. Its models were trained with that.
            grey = np.asarray(min(clip[..., 0].size // 256, 255), np.uint8)
            return _blended(grey, levels.astype(np.uint8), argument).take(clip)
        case "Sharpness":
            tall = _tall(clip)
            return _blended(_smoothed(tall), tall, argument).reshape(clip.shape)
    return apply_timm(clip, name, argument)  # Invert, SolarizeAdd and Brightness


def _tall(clip: Clip) -> UInt8[np.ndarray, "th w c"]:
    """The frames of a clip below each other, [t * h, w, c]."""
    return clip.reshape(-1, *clip.shape[2:])


def _blended(
    start: UInt8[np.ndarray, "..."], end: UInt8[np.ndarray, "..."], factor: float
) -> UInt8[np.ndarray, "..."]:
    """From the bytes of `start` towards those of `end` and beyond, truncated."""
    first = start.astype(np.float32)
    return (first + np.float32(factor) * (end - first)).clip(0, 255).astype(np.uint8)


def _grey(clip: UInt8[np.ndarray, "*d 3"]) -> UInt8[np.ndarray, "*d"]:
    """TensorFlow's grey of RGB bytes: weights that add up to 0.9999, in float32, truncated."""
    unit = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    red, green, blue = (
        (unit * np.float32(weight)).take(clip[..., channel])
        for channel, weight in enumerate((0.2989, 0.5870, 0.1140))
    )
    return ((red + green + blue) * np.float32(255.5)).astype(np.uint8)


def _stretched(clip: Clip) -> Clip:
    """Each channel stretched by itself from its lowest and highest byte to 0 and 255."""
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


def _smoothed(image: Frame) -> Frame:
    """The mean over 3x3 with the centre counted five times, truncated; the border is unchanged.

    Scenic adds thirteenths in float32, so on some processors a sum that is a whole level becomes
    the level below.
    """
    if min(image.shape[:2]) < 3:
        return image
    wide = image.astype(np.int16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    smoothed = image.copy()
    smoothed[1:-1, 1:-1] = sums // 13
    return smoothed


def apply_timm(clip: Clip, name: str, argument: float) -> Clip:
    """Applies one of `TIMM_OPERATIONS` to each frame, with an argument of `timm_argument`."""
    from PIL import ImageEnhance, ImageOps

    levels = np.arange(256)
    match name:
        case "Invert":
            return 255 - clip
        case "Posterize":
            return _look_up(clip, levels & (0xFF << max(8 - int(argument), 0)))
        case "Solarize":
            return _look_up(clip, np.where(levels < argument, levels, 255 - levels))
        case "SolarizeAdd":
            return _look_up(clip, np.where(levels < 128, levels + argument, levels))
        case "Brightness":
            return _look_up(clip, levels.astype(np.float32) * argument)  # float32, as in Pillow
        case "AutoContrast":
            return _each_frame(clip, ImageOps.autocontrast)
        case "Equalize":
            return _each_frame(clip, ImageOps.equalize)
        case "Color" | "Contrast" | "Sharpness":
            enhance = getattr(ImageEnhance, name)
            return _each_frame(clip, lambda frame: enhance(frame).enhance(argument))
    return geometric(clip, name, argument, (0, 0, *clip.shape[1:3]))


def _look_up(
    clip: UInt8[np.ndarray, "*d"], table: Shaped[np.ndarray, "256"]
) -> UInt8[np.ndarray, "*d"]:
    """Replaces each level by its entry in `table`, clipped to 0 to 255 and rounded down."""
    return table.clip(0, 255).astype(np.uint8).take(clip)


def _each_frame(clip: Clip, change: Callable) -> Clip:
    from PIL import Image

    changed = np.empty_like(clip)
    for frame, out in zip(clip, changed, strict=True):
        out[:] = np.asarray(change(Image.fromarray(frame)))
    return changed

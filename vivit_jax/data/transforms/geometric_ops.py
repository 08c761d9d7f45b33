# SPDX-License-Identifier: Apache-2.0
"""The geometric operations of timm's RandAugment: Pillow's bicubic ones, of a part of the frames.

A shear or a translation moves each row along itself, or each column, so it is a filter of four
neighbours with one weight for all frames: a third of Pillow's time for the same bytes. Rotations
are Pillow's own.
"""

import math

import numpy as np
from jaxtyping import Float64, Int, UInt8

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
Box = tuple[int, int, int, int]  # top, left, height, width
# The source of each pixel: a, b, c, d, e, f of x' = ax + by + c, y' = dx + ey + f.
Places = tuple[float, float, float, float, float, float]
_FILL = 128  # of what comes from outside the frame


def geometric(
    clip: UInt8[np.ndarray, "t _ _ 3"], name: str, argument: float, box: Box
) -> UInt8[np.ndarray, "t h w 3"]:
    """What `box` shows after one of GEOMETRIC with an argument of `timm_argument`.

    The bytes are those of Pillow's operation on whole frames.
    """
    height, width = clip.shape[1:3]
    if name == "Rotate":
        return _rotated(clip, argument, box)
    places: Places = {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * height),
    }[name]
    moved = _moved(clip, places, box, axis=2 if name.endswith("X") else 1)
    return _by_pillow(clip, places, box) if moved is None else moved


def _moved(
    clip: UInt8[np.ndarray, "t _ _ 3"], places: Places, box: Box, axis: int
) -> UInt8[np.ndarray, "t h w 3"] | None:
    """The clip moved along an axis, 1 or 2; None if rounding makes a step between two pixels."""
    a, b, c, d, e, f = places
    height, width = clip.shape[1:3]
    top, left, tall, wide = box
    rows, columns = np.arange(top, top + tall)[:, None], np.arange(left, left + wide)
    x = a * (columns + 0.5) + b * (rows + 0.5) + c
    y = d * (columns + 0.5) + e * (rows + 0.5) + f
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    source, own = (x - 0.5, columns) if axis == 2 else (y - 0.5, rows)
    first = np.floor(source)
    # All pixels of a row (axis 2) or column (axis 1) come from as many pixels away.
    away = (first - own).astype(np.intp)
    away, same = (away[:, :1], away == away[:, :1]) if axis == 2 else (away[:1], away == away[:1])
    if not same.all():
        return None
    if axis == 2:
        near = np.arange(left - 1, left + wide + 2) + away
        flat = rows * width + near.clip(0, width - 1)
    else:
        near = np.arange(top - 1, top + tall + 2)[:, None] + away
        flat = near.clip(0, height - 1) * width + columns
    return _filtered(clip, flat, np.asarray(source - first), outside, axis - 1)


def _filtered(
    clip: UInt8[np.ndarray, "t _ _ 3"],
    flat: Int[np.ndarray, "_ _"],
    part: Float64[np.ndarray, "h w"],
    outside: np.ndarray,
    axis: int,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Pillow's cubic through four neighbours along an axis, truncated.

    `flat` numbers the neighbours within a frame, with one more before and two after along the axis;
    `part` is how far a pixel's source lies from the second of its four to the third.
    """
    tall, wide = part.shape
    steps = 3 * np.arange(4) if axis else np.arange(4)
    count = 3 * wide if axis else tall
    flat = (3 * flat[..., None] + np.arange(3)).reshape(len(flat), -1)
    part = np.repeat(part, 3, axis=1)
    moved = np.empty((len(clip), tall, 3 * wide), np.uint8)
    near, values = np.empty(flat.shape, np.uint8), np.empty(part.shape, np.float64)
    for frame, out in zip(clip, moved, strict=True):
        np.ravel(frame).take(flat, out=near, mode="clip")
        wider = near.astype(np.int16)
        v1, v2, v3, v4 = (
            wider[:, step : step + count] if axis else wider[step : step + count] for step in steps
        )
        down, up = v1 - v2, v3 - v4
        both = down + up
        # v2 + d (p2 + d (p3 + d p4)), with the sums of Pillow in whole numbers.
        np.multiply(both, -part, out=values)
        values += both + down
        values *= part
        values += v3 - v1
        values *= part
        values += v2
        np.clip(values, 0, 255, out=values)
        out[:] = values
    moved = moved.reshape(len(clip), tall, wide, 3)
    moved[:, outside] = _FILL
    return moved


def _rotated(
    clip: UInt8[np.ndarray, "t _ _ 3"], degrees: float, box: Box
) -> UInt8[np.ndarray, "t h w 3"]:
    """Rotated about the centre, against the clock."""
    from PIL import Image

    height, width = clip.shape[1:3]
    if degrees % 90 == 0:  # Pillow copies pixels where it can
        bicubic, fill = Image.Resampling.BICUBIC, (_FILL,) * 3
        frames = [Image.fromarray(frame).rotate(degrees, bicubic, fillcolor=fill) for frame in clip]
        return _cut(np.stack([np.asarray(frame) for frame in frames]), box)
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    places = cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y
    if height % 2 and width % 2:  # an offset would round the middle pixel's source otherwise
        return _by_pillow(clip, places, box)
    a, b, c, d, e, f = places
    top, left, tall, wide = box
    here = a, b, a * left + b * top + c, d, e, d * left + e * top + f
    return _by_pillow(clip, here, (0, 0, tall, wide))


def _by_pillow(
    clip: UInt8[np.ndarray, "t _ _ 3"], places: Places, box: Box
) -> UInt8[np.ndarray, "t h w 3"]:
    """Computed from the first row and column on."""
    from PIL import Image

    top, left, tall, wide = box
    moved = np.empty((len(clip), tall, wide, 3), np.uint8)
    for frame, out in zip(clip, moved, strict=True):
        image = Image.fromarray(frame).transform(
            (left + wide, top + tall),
            Image.Transform.AFFINE,
            places,
            resample=Image.Resampling.BICUBIC,
            fillcolor=(_FILL,) * 3,
        )
        out[:] = np.asarray(image)[top:, left:]
    return moved


def _cut(clip: UInt8[np.ndarray, "t _ _ 3"], box: Box) -> UInt8[np.ndarray, "t h w 3"]:
    top, left, height, width = box
    return clip[:, top : top + height, left : left + width]

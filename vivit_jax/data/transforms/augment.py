# SPDX-License-Identifier: Apache-2.0
"""Geometry of training and test clips: resize, crop and flip, the same for all frames of a clip.

Clips are uint8 [t, h, w, c] with any number of channels, which are never mixed; sizes are (height,
width) in pixels. Random values are drawn from `rng`, once per clip.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8

from vivit_jax.data.settings import AugmentSettings
from vivit_jax.data.transforms import frame_ops
from vivit_jax.data.transforms.randaugment import (
    RandAugment,
    apply_operations,
    check_colours,
    draw_operations,
    parse_rand_augment,
    rand_augment,
)
from vivit_jax.errors import UserError, VideoError

Size = tuple[int, int]  # height, width
# From a decoded clip, uint8 [t, h, w, c], to a training clip.
Transform = Callable[[np.random.Generator, np.ndarray], np.ndarray]
CROPS = ("multi_scale", "random_resized", "random", "center")
_PIL_BILINEAR = 2
_SCALES = (1, 0.875, 0.75, 0.66)
# Quarters of the free room: corners, middles of the edges, centre, and the points between.
_QUARTERS = tuple((y, x) for y in range(5) for x in range(5) if y % 2 == x % 2)


def train_transform(settings: AugmentSettings, size: Size) -> Transform:
    """Returns the function that turns a decoded clip into a training clip.

    It resizes, jitters the scale, crops and flips. RandAugment comes after the resize in the
    "timm" family (VideoMAE: full frames) and last in the "scenic" family (ViViT: cropped frames).
    Colour jitter, erasing and mixing act on pixel values, on the device.

    Args:
        settings: `resize`, `jitter_scale`, `crop*`, `flip` and `rand_augment` are used.
        size: (height, width) of the result.

    Returns:
        A function (rng, uint8 [t, h, w, c]) -> uint8 [t, *size, c] that can be pickled.

    Raises:
        UserError: a setting is out of range; from the function, for a clip that is not uint8
            [t, h, w, c], is smaller than its crop, or lacks the 3 channels of RandAugment.
    """
    _check_settings(settings)
    spec = None if settings.rand_augment is None else parse_rand_augment(settings.rand_augment)
    return functools.partial(_train_clip, settings, size, spec)


def _train_clip(
    settings: AugmentSettings,
    size: Size,
    spec: RandAugment | None,
    rng: np.random.Generator,
    clip: UInt8[np.ndarray, "t _ _ c"],
) -> UInt8[np.ndarray, "t h w c"]:
    _check_clip(clip)
    wanted = _frame_size(clip)  # of whole frames; the next step that needs them resizes
    if settings.resize is not None:
        wanted = _shortest(wanted, settings.resize)
    operations, boxed = [], settings.crop == "random_resized" and settings.jitter_scale is None
    if spec is not None and spec.family == "timm":
        check_colours(clip)
        operations = draw_operations(rng, spec)
    if operations and not boxed:
        clip = apply_operations(resize(clip, *wanted), operations, (0, 0, *wanted))
    if settings.jitter_scale is not None:
        clip = resize(clip, *wanted)
        wanted = _jittered(rng, wanted, settings.jitter_scale)
    if settings.crop == "random":
        clip = _resize_part(clip, wanted, _random_corner(rng, wanted, size), size)
    elif settings.crop == "center":
        clip = _resize_part(clip, wanted, _center_corner(wanted, size), size)
    elif settings.crop == "multi_scale":
        clip = multi_scale_crop(rng, resize(clip, *wanted), size)
    else:
        box = _box(rng, wanted, settings.crop_scale, settings.crop_ratio)
        clip = resize(clip, *wanted)
        if operations and boxed:  # the same pixels as operations on whole frames
            clip = apply_operations(clip, operations, box)
        else:
            clip = _cut(clip, *box[:2], box[2:])
        clip = resize(clip, *size)
    clip = flip(rng, clip, settings.flip)
    if spec is not None and spec.family == "scenic":
        clip = rand_augment(rng, clip, spec)
    return np.ascontiguousarray(clip)


def resize(
    clip: UInt8[np.ndarray, "t _ _ c"], height: int, width: int
) -> UInt8[np.ndarray, "t h w c"]:
    """Resizes bilinearly, without Pillow's antialiasing.

    Equal to torch's `interpolate(mode="bilinear", align_corners=False)` and TensorFlow's
    `image.resize`, rounded to the nearest level; VideoMAE keeps floats and scenic rounds down.
    """
    _check_clip(clip)
    return _resize_part(clip, (height, width), (0, 0), (height, width))


def _resize_part(
    clip: UInt8[np.ndarray, "t _ _ c"], whole: Size, corner: Size, size: Size
) -> UInt8[np.ndarray, "t h w c"]:
    """Cuts `size` at `corner` (top, left) out of the clip resized to `whole`, computing no more."""
    if _frame_size(clip) == whole:
        return _cut(clip, *corner, size)
    height, width = size
    tops, bottoms, down = _neighbours(clip.shape[1], whole[0], corner[0], height)
    lefts, rights, across = _neighbours(clip.shape[2], whole[1], corner[1], width)
    clip = clip[:, tops[0] : bottoms[-1] + 1, lefts[0] : rights[-1] + 1]
    tops, bottoms = tops - tops[0], bottoms - tops[0]
    lefts, rights = lefts - lefts[0], rights - lefts[0]
    t, h, w, c = clip.shape
    down = down[:, None]
    # Rows as flat runs of channels: numpy copies single numbers faster than runs of three.
    lefts, rights = ((x[:, None] * c + np.arange(c)).ravel() for x in (lefts, rights))
    across = np.repeat(across, c)
    # One frame at a time, in buffers that stay in the processor's cache.
    source = np.empty((h, w * c), np.float32)
    upper, lower = np.empty((2, height, w * c), np.float32)
    left, right = np.empty((2, height, width * c), np.float32)
    resized = np.empty((t, height, width * c), np.uint8)
    for frame, out in zip(clip.reshape(t, h, w * c), resized, strict=True):
        source[:] = frame
        source.take(tops, axis=0, out=upper, mode="clip")
        source.take(bottoms, axis=0, out=lower, mode="clip")
        lower -= upper
        lower *= down
        lower += upper
        lower.take(lefts, axis=1, out=left, mode="clip")
        lower.take(rights, axis=1, out=right, mode="clip")
        right -= left
        right *= across
        right += left
        right += 0.5  # the conversion to uint8 rounds down
        out[:] = right
    return resized.reshape(t, height, width, c)


def _neighbours(
    length: int, wanted: int, start: int, count: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """For `count` of `wanted` pixels: their two neighbours among `length`, the second's weight.

    Positions are pixel centres; beyond the first and last centre the edge pixel is repeated.
    """
    place = (np.arange(start, start + count) + 0.5) * (length / wanted) - 0.5
    place = place.clip(0, length - 1)
    first = place.astype(np.intp)
    return first, np.minimum(first + 1, length - 1), (place - first).astype(np.float32)


def resize_shortest(clip: UInt8[np.ndarray, "t _ _ c"], side: int) -> UInt8[np.ndarray, "t h w c"]:
    """Resizes with `resize` so that the shorter side is `side`; the longer is rounded down.

    Raises VideoError if the result would exceed the limit on a decoded frame.
    """
    frame = _frame_size(clip)
    target = _shortest(frame, side)
    frame_ops.check_resized(*frame, target, {"shortest_edge": side})
    return resize(clip, *target)


def _frame_size(clip: np.ndarray) -> Size:
    return clip.shape[1], clip.shape[2]


def _shortest(frame: Size, side: int) -> Size:
    h, w = frame
    return h * side // min(h, w), w * side // min(h, w)


def jitter_scale(
    rng: np.random.Generator, clip: UInt8[np.ndarray, "t _ _ c"], bounds: tuple[float, float]
) -> UInt8[np.ndarray, "t h w c"]:
    """Resizes height and width by two independent factors, each uniform in `bounds` (scenic)."""
    return resize(clip, *_jittered(rng, _frame_size(clip), bounds))


def _jittered(rng: np.random.Generator, frame: Size, bounds: tuple[float, float]) -> Size:
    h, w = frame
    return max(1, int(h * rng.uniform(*bounds))), max(1, int(w * rng.uniform(*bounds)))


def multi_scale_crop(
    rng: np.random.Generator, clip: UInt8[np.ndarray, "t _ _ c"], size: Size
) -> UInt8[np.ndarray, "t h w c"]:
    """Cuts one of 10 shapes at one of 13 places and resizes it to `size` with Pillow's bilinear.

    The shapes' sides are 1, 0.875, 0.75 and 0.66 of the frames' shorter side (a side within 2
    pixels of `size` becomes that), at most one step apart; the places are the corners, the middles
    of the edges, the centre and the points halfway between it and the corners. From TSN (Wang et
    al. 2016, arXiv:1608.00859); it is VideoMAE's only augmentation in pre-training.
    """
    h, w = _frame_size(clip)
    if int(min(h, w) * min(_SCALES)) < 1:
        raise VideoError(f"frames of {h} x {w} pixels (h x w) are too small to crop")
    heights, widths = (_sides(min(h, w), target) for target in size)
    shapes = [
        (height, width)
        for i, height in enumerate(heights)
        for j, width in enumerate(widths)
        if abs(i - j) <= 1
    ]
    height, width = shapes[rng.integers(len(shapes))]
    down, across = _QUARTERS[rng.integers(len(_QUARTERS))]
    cut = _cut(clip, down * ((h - height) // 4), across * ((w - width) // 4), (height, width))
    target = {"height": size[0], "width": size[1]}
    resized = [frame_ops.resize(frame, target, _PIL_BILINEAR, True) for frame in cut]
    return np.stack(resized).reshape(len(clip), *size, clip.shape[3])


def _sides(shorter: int, target: int) -> list[int]:
    sides = [int(shorter * scale) for scale in _SCALES]
    return [target if abs(side - target) < 3 and target <= shorter else side for side in sides]


def random_resized_crop(
    rng: np.random.Generator,
    clip: UInt8[np.ndarray, "t _ _ c"],
    size: Size,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "t h w c"]:
    """Cuts a box of random area and shape at a random place and resizes it to `size`.

    The share of the area is uniform in `scale`, width / height log-uniform in `ratio`. If 10 boxes
    do not fit, the largest central box with a shape in `ratio` is used. From Inception (Szegedy et
    al. 2015, arXiv:1409.4842); VideoMAE fine-tunes with it.
    """
    top, left, height, width = _box(rng, _frame_size(clip), scale, ratio)
    return resize(_cut(clip, top, left, (height, width)), *size)


def _box(
    rng: np.random.Generator,
    frame: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Returns top, left, height and width."""
    (h, w), (low, high) = frame, ratio
    for _ in range(10):
        area = h * w * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(low), math.log(high)))
        height, width = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < height <= h and 0 < width <= w:
            top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
            return int(top), int(left), height, width
    height, width = min(h, round(w / low)), min(w, round(h * high))
    return (h - height) // 2, (w - width) // 2, height, width


def random_crop(
    rng: np.random.Generator, clip: UInt8[np.ndarray, "t _ _ c"], size: Size
) -> UInt8[np.ndarray, "t h w c"]:
    """Cuts `size` at a uniformly random place; a view."""
    return _cut(clip, *_random_corner(rng, _frame_size(clip), size), size)


def _random_corner(rng: np.random.Generator, frame: Size, size: Size) -> Size:
    down, across = _room(frame, size)
    return int(rng.integers(down + 1)), int(rng.integers(across + 1))


def center_crop(clip: UInt8[np.ndarray, "t _ _ c"], size: Size) -> UInt8[np.ndarray, "t h w c"]:
    """Cuts `size` out of the middle, offsets rounded down; a view."""
    return _cut(clip, *_center_corner(_frame_size(clip), size), size)


def _center_corner(frame: Size, size: Size) -> Size:
    down, across = _room(frame, size)
    return down // 2, across // 2


def three_crops(
    clip: Shaped[np.ndarray, "t _ _ c"],
    size: Size,
    count: int = 3,
    rounding: Literal["floor", "ceil"] = "floor",
) -> Shaped[np.ndarray, "count t h w c"]:
    """Cuts `count` evenly spread crops along the longer side, centred in the other.

    A single crop is the central one. Fractional offsets are rounded down in VideoMAE ("floor") and
    up in scenic ("ceil"). Square frames are cut along their width.

    Returns [count, t, *size, c]. Raises `VideoError` for frames smaller than `size`.
    """
    if count < 1:
        raise UserError(f"count is {count}, expected at least 1 crop")
    if rounding not in ("floor", "ceil"):
        raise UserError(f"rounding is {rounding!r}, expected 'floor' or 'ceil'")
    whole = math.floor if rounding == "floor" else math.ceil
    rooms = _room(_frame_size(clip), size)
    spread = 0 if clip.shape[1] > clip.shape[2] else 1
    crops = []
    for index in range(count):
        corner = [whole(room / 2) for room in rooms]
        if count > 1:
            corner[spread] = whole(index * rooms[spread] / (count - 1))
        crops.append(_cut(clip, corner[0], corner[1], size))
    return np.stack(crops)


def flip(
    rng: np.random.Generator, clip: UInt8[np.ndarray, "t h w c"], probability: float = 0.5
) -> UInt8[np.ndarray, "t h w c"]:
    """Mirrors left to right with this probability, in a new array; else the clip itself."""
    if rng.random() >= probability:
        return clip
    mirrored = np.empty(clip.shape, clip.dtype)
    # numpy copies runs of three numbers, as a reversed view holds, at a quarter of the speed.
    for channel in range(clip.shape[3]):
        mirrored[..., channel] = clip[:, :, ::-1, channel]
    return mirrored


def _cut(
    clip: Shaped[np.ndarray, "t _ _ c"], top: int, left: int, size: Size
) -> Shaped[np.ndarray, "t h w c"]:
    return clip[:, top : top + size[0], left : left + size[1]]


def _room(frame: Size, size: Size) -> Size:
    """Pixels that a crop leaves free in height and in width."""
    room = (frame[0] - size[0], frame[1] - size[1])
    if min(room) < 0:
        raise VideoError(
            f"frames of {frame[0]} x {frame[1]} pixels (h x w) are smaller than the crop "
            f"of {size[0]} x {size[1]}: raise resize (augment.resize in training, "
            "evaluation.resize in tests) or the lower bound of augment.jitter_scale, or crop with "
            "'random_resized', which enlarges"
        )
    return room


def _check_clip(clip: np.ndarray) -> None:
    if clip.dtype != np.uint8 or clip.ndim != 4 or not clip.size:
        raise UserError(
            f"a clip is {clip.dtype} {list(clip.shape)}, expected uint8 [t, h, w, c], not empty: "
            "augmentation works on decoded frames"
        )


def _check_settings(settings: AugmentSettings) -> None:
    if settings.crop not in CROPS:
        raise UserError(f"augment.crop is {settings.crop!r}, expected one of {CROPS}")
    if settings.resize is not None and settings.resize < 1:
        raise UserError(f"augment.resize is {settings.resize}, expected pixels or None")
    if not 0 <= settings.flip <= 1:
        raise UserError(f"augment.flip is {settings.flip}, expected a probability, 0 to 1")
    for name, most in (("crop_scale", 1), ("crop_ratio", math.inf), ("jitter_scale", math.inf)):
        bounds = getattr(settings, name)
        if name == "jitter_scale" and bounds is None:
            continue
        if bounds is None or len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= most:
            raise UserError(
                f"augment.{name} is {bounds}, expected a lower and an upper bound above 0"
                + (f" and at most {most}" if most < math.inf else "")
            )

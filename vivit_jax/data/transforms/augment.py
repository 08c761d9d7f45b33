# SPDX-License-Identifier: Apache-2.0
"""Geometry of training and test clips: resize, crop and flip, alike in all frames of a clip.

Clips are uint8 [t, h, w, c] with any number of channels, which nothing here mixes; sizes are
(height, width) in pixels. What is random is drawn from the `rng` that is passed, once per clip.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from vivit_jax.data.settings import AugmentSettings
from vivit_jax.data.transforms import frame_ops
from vivit_jax.data.transforms.randaugment import RandAugment, parse_rand_augment, rand_augment
from vivit_jax.errors import UserError, VideoError

CROPS = ("multi_scale", "random_resized", "random", "center")
_PIL_BILINEAR = 2
_SCALES = (1, 0.875, 0.75, 0.66)
# Quarters of the room that is left: corners, middles of the edges, centre, and the points between.
_QUARTERS = tuple((y, x) for y in range(5) for x in range(5) if y % 2 == x % 2)


def train_transform(
    settings: AugmentSettings, size: tuple[int, int]
) -> Callable[[np.random.Generator, np.ndarray], np.ndarray]:
    """The function that makes a training clip of a clip as it is read.

    It resizes, jitters the scale, crops and flips. RandAugment comes after the resize in the
    "timm" family (VideoMAE: full frames) and last in the "scenic" family (ViViT: cropped frames).
    Colour jitter, erasing and mixing work on pixel values and are not done here.

    Args:
        settings: what to do; only `resize`, `jitter_scale`, `crop*`, `flip` and `rand_augment`.
        size: (height, width) of the result.

    Returns:
        A function (rng, uint8 [t, h, w, c]) -> uint8 [t, *size, c] that can be pickled.

    Raises:
        UserError: a setting is outside its range; from the function, for a clip that is no uint8
            [t, h, w, c], too small for its crop, or not of 3 channels for RandAugment.
    """
    _check_settings(settings)
    spec = None if settings.rand_augment is None else parse_rand_augment(settings.rand_augment)
    return functools.partial(_train_clip, settings, size, spec)


def _train_clip(
    settings: AugmentSettings,
    size: tuple[int, int],
    spec: RandAugment | None,
    rng: np.random.Generator,
    clip: np.ndarray,
) -> np.ndarray:
    _check_clip(clip)
    wanted = clip.shape[1:3]  # of whole frames, up to the next step that needs them
    if settings.resize is not None:
        wanted = _shortest(wanted, settings.resize)
    if spec is not None and spec.family == "timm":
        clip = rand_augment(rng, resize(clip, *wanted), spec)
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
        scale, ratio = settings.crop_scale, settings.crop_ratio
        clip = random_resized_crop(rng, resize(clip, *wanted), size, scale, ratio)
    clip = flip(rng, clip, settings.flip)
    if spec is not None and spec.family == "scenic":
        clip = rand_augment(rng, clip, spec)
    return np.ascontiguousarray(clip)


def resize(clip: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes bilinearly, without the smoothing that Pillow does when it shrinks.

    The same as torch's `interpolate(mode="bilinear", align_corners=False)` and TensorFlow's
    `image.resize`, rounded to the nearest level where VideoMAE keeps floats and scenic rounds down.
    """
    _check_clip(clip)
    return _resize_part(clip, (height, width), (0, 0), (height, width))


def _resize_part(
    clip: np.ndarray, whole: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Cuts `size` at `corner` (top, left) out of the clip resized to `whole`, computing no more."""
    if clip.shape[1:3] == whole:
        return _cut(clip, *corner, size)
    height, width = size
    tops, bottoms, down = _neighbours(clip.shape[1], whole[0], corner[0], height)
    lefts, rights, across = _neighbours(clip.shape[2], whole[1], corner[1], width)
    clip = clip[:, tops[0] : bottoms[-1] + 1, lefts[0] : rights[-1] + 1]
    tops, bottoms = tops - tops[0], bottoms - tops[0]
    lefts, rights = lefts - lefts[0], rights - lefts[0]
    t, h, w, c = clip.shape
    down = down[:, None]
    # Rows as flat runs of channels: numpy copies single numbers faster than short runs of them.
    lefts, rights = ((x[:, None] * c + np.arange(c)).ravel() for x in (lefts, rights))
    across = np.repeat(across, c)
    # One frame at a time in buffers that stay in the processor's cache.
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
        right += 0.5  # the conversion rounds down
        out[:] = right
    return resized.reshape(t, height, width, c)


def _neighbours(
    length: int, wanted: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `count` of `wanted` pixels: the two of `length` each lies between, the second's weight.

    Positions are those of pixel centres; beyond the first and last centre the edge pixel counts.
    """
    place = (np.arange(start, start + count) + 0.5) * (length / wanted) - 0.5
    place = place.clip(0, length - 1)
    first = place.astype(np.intp)
    return first, np.minimum(first + 1, length - 1), (place - first).astype(np.float32)


def resize_shortest(clip: np.ndarray, side: int) -> np.ndarray:
    """Resizes with `resize` so that the shorter side is `side`; the longer is rounded down.

    Raises VideoError where the frames would become larger than frames may be that are read.
    """
    target = _shortest(clip.shape[1:3], side)
    frame_ops.check_resized(*clip.shape[1:3], target, {"shortest_edge": side})
    return resize(clip, *target)


def _shortest(frame: tuple[int, int], side: int) -> tuple[int, int]:
    h, w = frame
    return h * side // min(h, w), w * side // min(h, w)


def jitter_scale(
    rng: np.random.Generator, clip: np.ndarray, bounds: tuple[float, float]
) -> np.ndarray:
    """Resizes height and width by two independent factors, each uniform in `bounds` (scenic)."""
    return resize(clip, *_jittered(rng, clip.shape[1:3], bounds))


def _jittered(
    rng: np.random.Generator, frame: tuple[int, int], bounds: tuple[float, float]
) -> tuple[int, int]:
    h, w = frame
    return max(1, int(h * rng.uniform(*bounds))), max(1, int(w * rng.uniform(*bounds)))


def multi_scale_crop(
    rng: np.random.Generator, clip: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Cuts one of 10 shapes at one of 13 places and resizes it to `size` with Pillow's bilinear.

    The shapes' sides are 1, 0.875, 0.75 and 0.66 of the frames' shorter side (a side within 2
    pixels of `size` becomes that), at most one step apart; the places are the corners, the middles
    of the edges, the centre and the points halfway between it and the corners. From TSN (Wang et
    al. 2016, arXiv:1608.00859); VideoMAE pre-trains with it and nothing else.
    """
    h, w = clip.shape[1:3]
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
    clip: np.ndarray,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Cuts a box of random area and shape at a random place and resizes it to `size`.

    The share of the area is uniform in `scale`, width / height log-uniform in `ratio`. After 10
    boxes that do not fit, the largest box in the middle whose shape is in `ratio`. From Inception
    (Szegedy et al. 2015, arXiv:1409.4842); VideoMAE fine-tunes with it.
    """
    top, left, height, width = _box(rng, *clip.shape[1:3], scale, ratio)
    return resize(_cut(clip, top, left, (height, width)), *size)


def _box(
    rng: np.random.Generator,
    h: int,
    w: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Returns top, left, height and width."""
    low, high = ratio
    for _ in range(10):
        area = h * w * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(low), math.log(high)))
        height, width = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < height <= h and 0 < width <= w:
            top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
            return int(top), int(left), height, width
    height, width = min(h, round(w / low)), min(w, round(h * high))
    return (h - height) // 2, (w - width) // 2, height, width


def random_crop(rng: np.random.Generator, clip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cuts `size` at a place that is uniform over all; a view."""
    return _cut(clip, *_random_corner(rng, clip.shape[1:3], size), size)


def _random_corner(
    rng: np.random.Generator, frame: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int]:
    down, across = _room(frame, size)
    return int(rng.integers(down + 1)), int(rng.integers(across + 1))


def center_crop(clip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cuts `size` out of the middle, offsets rounded down; a view."""
    return _cut(clip, *_center_corner(clip.shape[1:3], size), size)


def _center_corner(frame: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    down, across = _room(frame, size)
    return down // 2, across // 2


def three_crops(
    clip: np.ndarray,
    size: tuple[int, int],
    count: int = 3,
    rounding: Literal["floor", "ceil"] = "floor",
) -> np.ndarray:
    """Cuts `count` evenly spread crops along the longer side, centred in the other.

    One crop is the one in the middle. Offsets that are not whole are rounded down in VideoMAE
    ("floor") and up in scenic ("ceil"). Square frames are cut along their width.

    Returns uint8 [count, t, *size, c]. Raises `VideoError` for frames smaller than `size`.
    """
    if count < 1:
        raise UserError(f"count is {count}, expected at least 1 crop")
    if rounding not in ("floor", "ceil"):
        raise UserError(f"rounding is {rounding!r}, expected 'floor' or 'ceil'")
    whole = math.floor if rounding == "floor" else math.ceil
    rooms = _room(clip.shape[1:3], size)
    spread = 0 if clip.shape[1] > clip.shape[2] else 1
    crops = []
    for index in range(count):
        offsets = [whole(room / 2) for room in rooms]
        if count > 1:
            offsets[spread] = whole(index * rooms[spread] / (count - 1))
        crops.append(_cut(clip, *offsets, size))
    return np.stack(crops)


def flip(rng: np.random.Generator, clip: np.ndarray, probability: float = 0.5) -> np.ndarray:
    """Mirrors left to right with this probability; a view."""
    return clip[:, :, ::-1] if rng.random() < probability else clip


def _cut(clip: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    return clip[:, top : top + size[0], left : left + size[1]]


def _room(frame: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Pixels that a crop leaves in height and in width."""
    room = (frame[0] - size[0], frame[1] - size[1])
    if min(room) < 0:
        raise VideoError(
            f"frames of {frame[0]} x {frame[1]} pixels (h x w) are smaller than the crop "
            f"of {size[0]} x {size[1]}: set resize (augment.resize in training, evaluation.resize "
            "in tests) to more, raise the lower bound of augment.jitter_scale, or crop by "
            "'random_resized', which enlarges"
        )
    return room


def _check_clip(clip: np.ndarray) -> None:
    if clip.dtype != np.uint8 or clip.ndim != 4 or not clip.size:
        raise UserError(
            f"a clip is {clip.dtype} {list(clip.shape)}, expected uint8 [t, h, w, c], none of them "
            "0: augmentation works on frames as they are decoded"
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
        if bounds is None and name == "jitter_scale":
            continue
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= most:
            raise UserError(
                f"augment.{name} is {bounds}, expected a lower and an upper bound above 0"
                + (f" and at most {most}" if most < math.inf else "")
            )

# SPDX-License-Identifier: Apache-2.0
"""A `VideoProcessor` as a function that jax compiles, bit for bit.

Pillow resizes bytes along one axis, then along the other; each pass adds a few neighbours with
integer weights of 22 bits, shifts and clips (libImaging/Resample.c; its nearest filter is in
libImaging/Geometry.c). That is int32 arithmetic, the same on every device. Which axis comes first
depends on Pillow's version and on the sizes, so both are tried on noise. The steps after the crop
have 256 possible results per channel, so they are looked up.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, UInt8

from vivit_jax.data.transforms.frame_ops import center_crop, resize
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError

_BITS = 22
_ONE = 1 << _BITS
Frames = UInt8[Array | np.ndarray, "b t _ _ c"]


def pixels_inside(
    processor: VideoProcessor,
    frame_size: tuple[int, int],
    channels: int,
    input_size: tuple[int, int] | None = None,
) -> Callable[[Frames], jax.Array]:
    """A function uint8 [b, t, h, w, c] -> float32 [b, t, *frame_size, c], the processor's bits.

    With `input_size` (height, width) it resizes, crops and normalises frames of that size; without
    it the frames already have the model's `frame_size` and are only normalised. A function that
    resizes is compared with `processor` on noise before it is returned. Raises UserError if the
    bits differ, if the processor's output is not of `frame_size`, and for 2 and 4 channels that are
    resized with the last as alpha.
    """
    table = _lookup(processor, channels)
    if input_size is None or (not processor.do_resize and not processor.do_center_crop):
        if input_size not in (None, frame_size):
            raise UserError(
                f"the processor neither resizes nor crops, so frames of {_text(input_size)} keep "
                f"their size; the model takes {_text(frame_size)}"
            )
        return lambda clips: _looked_up(table, clips)
    if processor.do_resize and channels in (2, 4) and not processor.independent_channels:
        raise UserError(
            f"the processor resizes {channels} channels with the last as alpha, which cannot be "
            'compiled; if it is data, set "independent_channels": true in '
            "preprocessor_config.json, otherwise resize before the model and export without an "
            "input size"
        )
    rows, columns = _geometry(processor, input_size)
    size = len(rows[0]), len(columns[0])
    if size != tuple(frame_size):
        raise UserError(
            f"the processor turns frames of {_text(input_size)} into {_text(size)}, the model "
            f"takes {_text(frame_size)}; the processor's size and crop_size are "
            f"{dict(processor.size)} and {dict(processor.crop_size)}"
        )

    noise = np.random.default_rng(0).integers(0, 256, (1, 1, *input_size, channels), np.uint8)
    expected = processor(noise, input_data_format="channels_last")
    for passes in (((3, columns), (2, rows)), ((2, rows), (3, columns))):
        pixels = functools.partial(_resized, table, passes)
        if np.array_equal(pixels(noise), expected):
            return pixels
    import PIL

    raise UserError(
        f"Pillow {PIL.__version__} does not resize {_text(input_size)} in two integer passes, so "
        "its bits cannot be compiled; resize before the model, and export without an input size"
    )


# For n output pixels the k input pixels to add, and their weights in 1 / 2**22: both [n, k].
Taps = tuple[Int[np.ndarray, "_ _"], Int[np.ndarray, "_ _"]]


def pillow_taps(size: int, wanted: int, resample: int) -> Taps:
    """What Pillow adds up for each of `wanted` pixels of a line of `size`; by filter number."""
    if size == wanted:
        return np.arange(size)[:, None], np.full((size, 1), _ONE)
    scale = size / wanted
    if resample == 0:  # positions are accumulated, as in Pillow, then truncated
        places = np.cumsum(np.r_[scale * 0.5, np.full(wanted - 1, scale)])
        return np.minimum(places.astype(int), size - 1)[:, None], np.full((wanted, 1), _ONE)
    support, curve = _FILTERS[resample]
    stretch = max(scale, 1.0)
    reach = support * stretch
    count = math.ceil(reach) * 2 + 1
    places, weights = np.zeros((wanted, count), int), np.zeros((wanted, count), int)
    for i in range(wanted):
        centre = (i + 0.5) * scale
        first = max(int(centre - reach + 0.5), 0)
        last = min(int(centre + reach + 0.5), size)
        found = [curve((x - centre + 0.5) * (1 / stretch)) for x in range(first, last)]
        total = sum(found)
        for j, value in enumerate(found):
            exact = value / total * _ONE
            places[i, j], weights[i, j] = first + j, int(exact + math.copysign(0.5, exact))
    used = weights.any(axis=0)
    return places[:, used], weights[:, used]


def _box(x: float) -> float:
    return float(-0.5 < x <= 0.5)


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


_HAMMING = float(np.float32(0.54)), float(np.float32(0.46))  # C's 0.54f and 0.46f


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0:
        return 1.0
    if x >= 1:
        return 0.0
    x *= math.pi
    return math.sin(x) / x * (_HAMMING[0] + _HAMMING[1] * math.cos(x))


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


# By Pillow's number: the filter's support in output pixels, and its curve.
_FILTERS = {
    1: (3.0, _lanczos),
    2: (1.0, _bilinear),
    3: (2.0, _bicubic),
    4: (0.5, _box),
    5: (1.0, _hamming),
}


def _geometry(processor: VideoProcessor, input_size: tuple[int, int]) -> tuple[Taps, Taps]:
    """Taps of the rows and the columns that remain after resize and crop."""
    resized = input_size
    if processor.do_resize:
        blank = np.zeros((*input_size, 1), np.uint8)
        resized = resize(blank, processor.size, processor.resample).shape[:2]
    taps = [
        pillow_taps(old, new, processor.resample)
        for old, new in zip(input_size, resized, strict=True)
    ]
    if not processor.do_center_crop:
        return taps[0], taps[1]
    # Rows and columns are numbered from 1; the crop pads with 0.
    numbers = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in resized), indexing="ij"), -1)
    crop = processor.crop_size
    numbers = center_crop(numbers, crop["height"], crop["width"])
    kept = numbers[..., 0].max(axis=1), numbers[..., 1].max(axis=0)
    rows, columns = (
        (places[at - 1], weights[at - 1] * (at > 0)[:, None])
        for (places, weights), at in zip(taps, kept, strict=True)
    )
    return rows, columns


def _resized(
    table: np.ndarray, passes: Sequence[tuple[int, Taps]], clips: Frames
) -> Float32[Array, "b t _ _ c"]:
    for axis, taps in passes:
        clips = _weighted(clips, taps, axis)
    return _looked_up(table, clips)


def _weighted(clips: Frames, taps: Taps, axis: int) -> Frames:
    """One of Pillow's passes along an axis of uint8 clips."""
    places, weights = taps
    if places.shape[1] == 1 and weights.min() == _ONE:
        if np.array_equal(places[:, 0], np.arange(clips.shape[axis])):
            return clips
        return jnp.take(clips, places[:, 0], axis=axis)
    total = jnp.int32(_ONE // 2)
    line = (1,) * axis + (-1,) + (1,) * (clips.ndim - axis - 1)
    for at, weight in zip(places.T, weights.T.astype(np.int32), strict=True):
        taken = jnp.take(clips, at, axis=axis).astype(jnp.int32)
        total = total + taken * weight.reshape(line)
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)


def _lookup(processor: VideoProcessor, channels: int) -> Float32[np.ndarray, "256 channels"]:
    """The processor's result for each byte, without resize and crop."""
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], channels, axis=2)
    pixels = processor(
        values, input_data_format="channels_last", do_resize=False, do_center_crop=False
    )
    return pixels.reshape(256, channels)


def _looked_up(table: Float32[np.ndarray, "256 c"], clips: Frames) -> Float32[Array, "b t _ _ c"]:
    channels = table.shape[1]
    places = np.arange(channels).reshape((1,) * (clips.ndim - 1) + (channels,))
    if (table == table[:, :1]).all():
        return jnp.take(jnp.asarray(table[:, 0]), clips.astype(jnp.int32), axis=0)
    return jnp.take(jnp.asarray(table.ravel()), clips.astype(jnp.int32) * channels + places, axis=0)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

# SPDX-License-Identifier: Apache-2.0
"""Frames in the forms that users pass, and the operations that Pillow defines: resize and crop.

Every function gives the same bytes as transformers' PIL path, see `VideoProcessor`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from vivit_jax.errors import UserError, VideoError
from vivit_jax.files.limits import check_unpacked


def as_clips(videos: Any, input_format: str | None = None) -> list[list]:
    """Returns a frame, a video or a batch as a list of videos, each a list of frames.

    Frames are Pillow images or numpy arrays of two or three axes, not copied.
    input_format: None, "channels_last", "channels_first" or "none" (frames [h, w]).
    Raises `UserError` for anything else.
    """
    if input_format not in (None, "channels_last", "channels_first", "none"):
        raise UserError(
            f"input_data_format is {input_format!r}, expected 'channels_last', 'channels_first' or "
            "'none' (frames [h, w])"
        )
    depth, nested = _nested_frames(videos, 2 if input_format == "none" else 3)
    if depth > 2:
        raise UserError(
            f"videos are nested {depth} levels above a frame, expected a frame, a video (1 level) "
            "or a batch of videos (2 levels)"
        )
    for _ in range(2 - depth):
        nested = [nested]
    return nested


def _nested_frames(item: Any, frame_ndim: int) -> tuple[int, Any]:
    """Returns the number of levels above the frames, and the frames in lists of that depth."""
    from PIL import Image

    if isinstance(item, Image.Image):
        if item.mode not in ("L", "LA", "RGB", "RGBA"):
            raise UserError(
                f"a frame is a Pillow image of mode {item.mode}, expected L, LA, RGB or RGBA: "
                "convert it, e.g. frame.convert('RGB')"
            )
        return 0, item
    if not isinstance(item, list | tuple):
        return _array_frames(item, frame_ndim)
    if not item:
        raise UserError("videos hold an empty list, expected at least one frame in every video")
    parts = [_nested_frames(part, frame_ndim) for part in item]
    depths = {depth for depth, _ in parts}
    if len(depths) > 1:
        raise UserError(
            "a list mixes frames, videos or batches: expected all entries of a list to be of one "
            "kind"
        )
    return depths.pop() + 1, [frames for _, frames in parts]


def _array_frames(item: Any, frame_ndim: int) -> tuple[int, Any]:
    if not hasattr(item, "__array__"):
        raise UserError(f"a frame is a {type(item).__name__}, expected an array or a Pillow image")
    try:
        array = np.asarray(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"a {type(item).__name__} cannot be read as a numpy array ({error}): pass uint8 or "
            "float32 data on the CPU, without gradients"
        ) from error
    if array.dtype.kind not in "buif":
        raise UserError(f"frames have dtype {array.dtype}, expected uint8 (or other numbers)")
    # A frame of two axes is grey, whatever format was declared.
    depth = 0 if array.ndim == 2 else array.ndim - frame_ndim
    if not 0 <= depth <= 2 or array.size == 0:
        raise UserError(
            f"an array has shape {array.shape}, expected non-empty [h, w, c], [t, h, w, c] or "
            "[b, t, h, w, c] (channels first: [c, h, w], [t, c, h, w], [b, t, c, h, w])"
        )
    if depth == 0:
        return 0, array
    return depth, list(array) if depth == 1 else [list(video) for video in array]


def channels_last(
    frame: Shaped[np.ndarray, "..."], input_format: str | None, channels: int | None
) -> Shaped[np.ndarray, "h w c"]:
    """Returns a view [h, w, c] of a frame [h, w, c], [c, h, w] or [h, w].

    Without an `input_format` the channel axis is the one of 1, 3 or 4 entries, the first if both
    are, else the one of `channels` entries. Raises `UserError` if there is none.
    """
    if frame.ndim == 2:
        return frame[..., None]
    if input_format is None:
        for known in ((1, 3, 4), (channels,)):
            if frame.shape[0] in known:
                input_format = "channels_first"
                break
            if frame.shape[2] in known:
                input_format = "channels_last"
                break
        else:
            raise UserError(
                f"a frame has shape {frame.shape}, in which no axis is clearly the channels "
                f"(1, 3, 4{f' or {channels}' if channels else ''}): pass input_data_format="
                "'channels_last' or 'channels_first'; a video is [t, h, w, c] or [t, c, h, w]"
            )
    return frame.transpose(1, 2, 0) if input_format == "channels_first" else frame


def to_rgb(frame: Any) -> Shaped[np.ndarray, "h w c"]:
    """Returns a Pillow image or an array [h, w, c] as RGB: grey repeated, alpha over white.

    Arrays of neither 1 nor 4 channels are returned unchanged. Raises `UserError` for floats
    outside [0, 1] with alpha, for which white is undefined.
    """
    from PIL import Image

    if isinstance(frame, Image.Image):
        if "A" in frame.getbands():
            frame = frame.convert("RGBA")
            frame = Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame)
        return np.asarray(frame.convert("RGB"))
    if frame.shape[2] == 1:
        return np.repeat(frame, 3, axis=2)
    if frame.shape[2] != 4:
        return frame
    floats = frame.dtype.kind == "f"
    if floats and not (frame.min() >= 0 and frame.max() <= 1):
        raise UserError(
            f"frames of {frame.dtype} with alpha are in [{frame.min():.6g}, {frame.max():.6g}], "
            "expected [0, 1]: pass uint8 frames, or RGB ones"
        )
    white = 1.0 if floats else 255
    alpha = frame[..., 3:] / white
    mixed = alpha * frame[..., :3] + (1 - alpha) * white
    return (mixed if floats else np.round(mixed)).astype(frame.dtype)


def resized_to(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """The height and width to which a frame is resized.

    size: {"height", "width"}, {"max_height", "max_width"}, or {"shortest_edge"} with or without
    "longest_edge", in pixels. Fractions are truncated, as in transformers.
    Raises `VideoError` if a side would have no pixel, or if the result, at eight bytes per pixel as
    for decoded frames, would exceed the limit on memory.
    """
    short, long = min(height, width), max(height, width)
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        target = int(height * scale), int(width * scale)
    else:
        edge = exact = size["shortest_edge"]
        bounded = "longest_edge" in size
        if bounded and long / short * edge > size["longest_edge"]:
            exact = size["longest_edge"] * float(short) / long
            edge = round(exact)
        # With a bound, a frame whose short side fits is not resized, whatever its long side.
        other = long if bounded and short == edge else int(exact * long / short)
        target = (other, edge) if width <= height else (edge, other)
    check_resized(height, width, target, size)
    return target


def check_resized(
    height: int, width: int, target: tuple[int, int], size: Mapping[str, int]
) -> None:
    """VideoError if a frame cannot be resized to `target`, which `size` gives; see `resized_to`."""
    case = f"a frame of {height}x{width} would be resized to {target[0]}x{target[1]} by size {size}"
    if min(target) < 1:
        raise VideoError(f"{case}: no pixel would be left")
    check_unpacked(f"{case}, which", 8 * target[0] * target[1], error=VideoError)


def resize(
    frame: Any, size: Mapping[str, int], resample: int, independent_channels: bool = False
) -> Shaped[np.ndarray, "h w *c"]:
    """Resizes a Pillow image or an array [h, w, c] in uint8; one channel comes back as [h, w].

    size: as in `resized_to`; resample: the number of a Pillow filter.
    The last of 2 or 4 channels is alpha, which weights the others, unless `independent_channels`.
    Floats in [0, 1] pass through uint8 and come back as float32 in [0, 1].
    Raises `UserError` for values that do not fit in 8 bits.
    """
    from PIL import Image

    is_array = isinstance(frame, np.ndarray)
    height, width = frame.shape[:2] if is_array else (frame.height, frame.width)
    tall, wide = resized_to(size, height, width)
    target = wide, tall
    unit_floats = False
    if is_array:
        frame, unit_floats = _as_bytes(frame)
    if target == (width, height):
        resized = np.asarray(frame)
    elif not is_array:
        resized = np.asarray(frame.resize(target, resample))
    elif frame.shape[2] in ((1, 3) if independent_channels else (1, 2, 3, 4)):
        image = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
        resized = np.asarray(image.resize(target, resample))
    else:
        planes = (Image.fromarray(plane) for plane in np.moveaxis(frame, -1, 0))
        resized = np.stack([np.asarray(p.resize(target, resample)) for p in planes], axis=-1)
    if unit_floats:
        resized = (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
    return resized


def _as_bytes(frame: np.ndarray) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """Returns the frame in uint8, and whether its floats were multiplied by 255 for that."""
    if frame.dtype == np.uint8:
        return frame, False
    if frame.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            integers = np.allclose(frame, frame.astype(np.int64))
    else:
        integers = True
    low, high = frame.min(), frame.max()
    if integers and low >= 0 and high <= 255:
        return frame.astype(np.uint8), False
    if not integers and low >= 0 and high <= 1:
        return (frame.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True
    raise UserError(
        f"frames of {frame.dtype} in [{low:.6g}, {high:.6g}] cannot be resized, which is done in 8 "
        "bits: expected integers in 0 to 255 or floats in [0, 1]; pass uint8 frames, or "
        "do_resize=False for frames that are already resized"
    )


def center_crop(
    frame: Shaped[np.ndarray, "_ _ c"], height: int, width: int
) -> Shaped[np.ndarray, "height width c"]:
    """Cuts the middle out of a frame; a side that is too short is padded with zeros."""
    source, target = [], []
    for length, wanted in zip(frame.shape[:2], (height, width), strict=True):
        start = max(0, (length - wanted) // 2)
        source.append(slice(start, start + min(length, wanted)))
        # An odd amount of padding puts the larger half first.
        start = max(0, math.ceil((wanted - length) / 2))
        target.append(slice(start, start + min(length, wanted)))
    middle = frame[tuple(source)]
    if middle.shape[:2] == (height, width):
        return middle
    padded = np.zeros((height, width, frame.shape[2]), frame.dtype)
    padded[tuple(target)] = middle
    return padded

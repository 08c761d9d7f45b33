# SPDX-License-Identifier: Apache-2.0
"""Pictures and animated WebP files, read by Pillow.

Animated WebP is read here because FFmpeg below version 9 cannot decode it. Frame k is the k-th
complete picture that Pillow shows, as RGB without alpha; its time is the sum of the durations
before it, which are in milliseconds.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from vivit_jax.data.video.formats import most_pixels, too_large
from vivit_jax.data.video.log import file_state
from vivit_jax.errors import VideoError, first_line
from vivit_jax.files.inputs import check_file
from vivit_jax.files.limits import VARIABLE
from vivit_jax.files.parts import in_ranges
from vivit_jax.files.reading import opened

logger = logging.getLogger(__name__)

_WEBP_HEAD = 21  # bytes, up to the flags of the extended form
_ANIMATED = 0x02


def read_picture(path: str, content: bytes | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a picture as RGB: a file, or its `content`, which messages call `path`.

    Raises VideoError for a file that is not a picture, for more pixels than `most_pixels` allows,
    for more than 8 bits per channel, and for an animation.
    """
    if content is None:
        check_file(path, VideoError)
    try:
        with _opened(path, content) as image:
            if image.format == "WEBP" and image.is_animated:
                raise ValueError(f"an animation of {image.n_frames} frames, expected one picture")
            if image.mode[0] in "IF":  # Pillow would clip these
                raise ValueError(f"pixels of mode {image.mode}, expected 8 bits a channel")
            return np.asarray(image.convert("RGB"))
    except VideoError:
        raise
    except Exception as error:  # each format raises exceptions of its own
        raise VideoError(f"{path}: not a readable image: {first_line(error)}") from None


@contextlib.contextmanager
def _opened(path: str, content: bytes | None = None) -> Iterator[Any]:
    from PIL import Image

    most, own = most_pixels(path), Image.MAX_IMAGE_PIXELS
    if own is not None and most > 2 * own:  # Pillow refuses more
        if VARIABLE in os.environ:
            Image.MAX_IMAGE_PIXELS = most
        else:
            most = 2 * own
    file: Any = opened(path) if in_ranges(path) else path
    file = file if content is None else io.BytesIO(content)
    try:
        image = Image.open(file)
    except Image.DecompressionBombError:
        raise too_large(path, most) from None
    with image:
        if image.width * image.height > most:
            raise too_large(path, most, image.width, image.height)
        yield image


def is_webp(path: str | os.PathLike, animated: bool = False) -> bool:
    """Whether a file begins like a WebP, or like an animated one; False if it cannot be opened."""
    if in_ranges(path):
        if not os.fspath(path).lower().endswith(".webp"):  # each look takes a request
            return False
    elif not os.path.isfile(path):
        return False  # a FIFO is not opened
    try:
        with opened(path) as file:
            head = file.read(_WEBP_HEAD)
    except OSError:
        return False
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return False
    return not animated or (head[12:16] == b"VP8X" and bool(head[20:] and head[20] & _ANIMATED))


@dataclasses.dataclass(frozen=True)
class Animation:
    """The properties of an animated WebP.

    Attributes:
        name: path of the file.
        announced: frames that its header counts; fewer may be decodable.
        seconds: when each decodable frame is shown, from frame 0.
        duration: seconds, of all frames.
        height: pixels.
        width: pixels.
        mode: Pillow's name for the stored pixels, "RGB" or "RGBA".
    """

    name: str
    announced: int
    seconds: Float64[np.ndarray, " frames"]
    duration: float
    height: int
    width: int
    mode: str

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def fps(self) -> float:
        """Average frames per second, nan for a still picture."""
        return len(self) / self.duration if self.duration else float("nan")

    def shortage(self) -> str:
        """The end of the message about too few frames, if damage is the cause; else empty."""
        if len(self) == self.announced:
            return ""
        return (
            f" (the file announces {self.announced} frames, decoding stops after {len(self)}: it "
            "is damaged or truncated, get it again)"
        )

    def frames(self, last: int | None = None) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Each frame up to `last`, one at a time."""
        wanted = len(self) if last is None else last + 1
        for _, image in zip(range(wanted), _decoded(self.name), strict=False):
            yield np.asarray(image.convert("RGB"))

    def read(self, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """Frames in any order."""
        wanted = {int(k) for k in indices}
        decoded = enumerate(self.frames(max(wanted)))
        found = {k: image for k, image in decoded if k in wanted}
        return np.stack([found[int(k)] for k in indices])


def animation(name: str) -> Animation:
    """The properties of an animated WebP; it is decoded whole, once while the file is unchanged.

    Raises VideoError for one without frames, and logs a warning for one that is damaged.
    """
    return _scanned(name, file_state(name))


@functools.lru_cache(maxsize=64)
def _scanned(name: str, state: tuple) -> Animation:
    durations, width, height, mode, announced = [], 0, 0, "", 0
    for image in _decoded(name):
        (width, height), mode, announced = image.size, image.mode, image.n_frames
        durations.append(image.info.get("duration", 0))
    if not durations:
        raise VideoError(f"{name}: none of its frames can be decoded: get the file again")
    starts = np.cumsum([0, *durations], dtype=np.int64) / 1000
    found = Animation(name, announced, starts[:-1], float(starts[-1]), height, width, mode)
    if len(found) < announced:
        logger.warning("%s: %d of %d frames can be decoded", name, len(found), announced)
    return found


def _decoded(name: str) -> Iterator:
    """Pillow's image at each frame, up to the first that cannot be decoded."""
    try:
        with _opened(name) as image:
            for k in range(image.n_frames):
                image.seek(k)
                try:
                    image.load()
                except (EOFError, OSError, ValueError):
                    return
                yield image
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{name}: not a readable image: {first_line(error)}") from None


class AnimationStream:
    """The frames of an animated WebP in order, with the attributes of a `FrameStream`."""

    def __init__(self, name: str):
        self.name, self._animation = name, animation(name)
        self.announced, self.fps = self._animation.announced, self._animation.fps

    def __iter__(self) -> Iterator["AnimatedFrame"]:
        times = self._animation.seconds.tolist()
        for index, (seconds, image) in enumerate(zip(times, self._animation.frames(), strict=True)):
            yield AnimatedFrame(index, seconds, image)

    def shortage(self, total: int) -> str:
        """The end of the message about too few frames, if damage is the cause; else empty."""
        return self._animation.shortage()


@dataclasses.dataclass(frozen=True)
class AnimatedFrame:
    """A frame of an `AnimationStream`, with the attributes of a `StreamedFrame`."""

    index: int
    seconds: float
    pixels: UInt8[np.ndarray, "h w 3"]

    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, RGB."""
        return self.pixels

# SPDX-License-Identifier: Apache-2.0
"""Windows of frames that slide over a video, which is decoded once."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Generator, Iterator
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from vivit_jax.config import Config
from vivit_jax.config_base import positive_int
from vivit_jax.data.video.frame_stream import StreamedFrame
from vivit_jax.data.video.images import AnimatedFrame
from vivit_jax.errors import UserError, VideoError

Pad = Literal["drop", "repeat_last"]
_SECONDS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)s")
# Matroska's times are whole milliseconds; a little more, for rounding in sums of floats.
_SAME_TIME = 1.01e-3


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where windows lie: the window that begins at frame s has the frames s + j * frame_stride.

    A window begins at frame 0 and then every `stride` frames. If `in_seconds`, one begins at the
    first frame shown at or after each multiple of `stride` seconds, whatever the frame rate (with a
    millisecond of slack, to which containers round), and at most one begins at any frame.

    Only windows with all of their frames are given. With `pad` "repeat_last" one more follows if
    the others leave frames over that it reaches; past the end it repeats the video's last frame.
    """

    num_frames: int
    frame_stride: int
    stride: float
    pad: Pad = "drop"
    in_seconds: bool = False

    @property
    def span(self) -> int:
        """Number of frames from a window's first to its last."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def frames(self, start: int) -> Int64[np.ndarray, " t"]:
        """Frame indices of the window that begins at `start`, without padding."""
        return start + np.arange(self.num_frames, dtype=np.int64) * self.frame_stride

    def place(self, frame: StreamedFrame | AnimatedFrame) -> float:
        """Where a frame lies, in the unit of `stride`."""
        return frame.seconds + _SAME_TIME if self.in_seconds else frame.index


class Stream(Protocol):
    """The frames of a video in order, as of a `FrameStream`."""

    name: str
    announced: int

    def __iter__(self) -> Iterator[StreamedFrame | AnimatedFrame]: ...

    def shortage(self, total: int) -> str:
        """The end of the message about too few frames."""
        ...


@dataclasses.dataclass(frozen=True)
class Window:
    """One window's frames and where they lie."""

    clip: Shaped[np.ndarray, "t h w c"]  # as `prepare` made them
    indices: Int64[np.ndarray, " t"]
    seconds: Float64[np.ndarray, " t"]  # from the video's first frame


def plan_windows(
    config: Config, frame_stride: int | None, window_stride: str | int | None, pad: str
) -> Windows:
    """The windows for a model's clips; raises UserError for wrong arguments.

    Defaults are the model's frame stride, and windows that do not overlap.
    """
    if pad not in ("drop", "repeat_last"):
        raise UserError(f"pad must be drop or repeat_last (--pad), got {pad!r}")
    frame_stride = config.frame_stride if frame_stride is None else frame_stride
    if not positive_int(frame_stride):
        raise UserError(
            f"frame_stride must be an int of at least 1 (--frame-stride), got {frame_stride!r}"
        )
    text = str(config.num_frames * frame_stride if window_stride is None else window_stride)
    seconds = _SECONDS.fullmatch(text)
    whole = text.isascii() and text.isdecimal() and len(text) < 16
    stride = float(seconds[1]) if seconds else int(text) if whole else 0
    if not 0 < stride < math.inf:
        raise UserError(
            "window_stride must be frames, at least 1, or seconds such as 0.5s (--window-stride), "
            f"got {window_stride!r}"
        )
    return Windows(config.num_frames, frame_stride, stride, pad, in_seconds=bool(seconds))


def slide(
    stream: Stream,
    windows: Windows,
    prepare: Callable[[np.ndarray], np.ndarray],
    on_progress: Callable[[int], None] = lambda frames: None,
) -> Generator[Window, None, None]:
    """The windows of a video; each frame is prepared once, and held while it is needed.

    `on_progress` is called with the number of frames decoded so far. Raises VideoError if there is
    no window, if a frame of one cannot be shown, and if windows in seconds have no times to go by.
    """
    held: dict[int, tuple[np.ndarray | VideoError, float]] = {}
    begun: collections.deque[int] = collections.deque()  # first frames of incomplete windows
    upcoming, covered, frame = 0, 0, None  # `upcoming` numbers the next window

    def hold(frame: StreamedFrame | AnimatedFrame) -> None:
        try:
            image = prepare(frame.image())
        except VideoError as error:
            image = error  # raised only if a window has the frame
        held[frame.index] = image, frame.seconds

    def cut(indices: np.ndarray) -> Window:
        images, seconds = zip(*(held[int(k)] for k in indices), strict=True)
        for image in images:
            if isinstance(image, VideoError):
                raise image
        return Window(np.stack(images), indices, np.array(seconds, np.float64))

    for frame in stream:
        on_progress(frame.index + 1)
        place = windows.place(frame)
        if math.isnan(place) and frame.index == 0:  # then no frame has a time
            raise VideoError(
                f"{stream.name}: states neither times nor a frame rate; give --window-stride in "
                "frames"
            )
        if place >= upcoming * windows.stride:
            begun.append(frame.index)
            upcoming = max(upcoming, int(place / windows.stride)) + 1
        if any((frame.index - start) % windows.frame_stride == 0 for start in begun):
            hold(frame)
        if begun and frame.index == begun[0] + windows.span - 1:
            yield cut(windows.frames(begun.popleft()))
            covered = frame.index + 1
            for k in [k for k in held if not begun or k < begun[0]]:
                del held[k]
    assert frame is not None, "a stream without frames raises VideoError"
    total = frame.index + 1
    if windows.pad == "repeat_last" and begun and covered < total:
        if total - 1 not in held:
            hold(frame)
        yield cut(np.minimum(windows.frames(begun[0]), total - 1))
    elif not covered:
        raise VideoError(
            f"{stream.name}: {total} frames, fewer than the {windows.span} of a window "
            f"({windows.num_frames} frames, {windows.frame_stride} apart): use a smaller "
            f"--frame-stride, or --pad repeat_last{stream.shortage(total)}"
        )

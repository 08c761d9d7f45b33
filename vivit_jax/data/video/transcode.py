# SPDX-License-Identifier: Apache-2.0
"""Encodes a video again in a smaller size, so that a few frames of it are read with few bytes.

Frame k is what `vivit_jax.data.video.decode` gives for frame k of the source, upright and scaled,
and is shown at the same time. Keyframes are close, since a training clip is a part of a video.
"""

import math
import os
import tempfile
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

from vivit_jax.data.video.decode import VideoInfo, probe_video
from vivit_jax.data.video.frame_stream import StreamedFrame, open_stream
from vivit_jax.data.video.images import AnimatedFrame
from vivit_jax.data.video.pictures import oriented
from vivit_jax.errors import UserError
from vivit_jax.files.atomic import writing_here

# Frames from one keyframe to the next. Clips of 16 frames, 4 apart, of a video of 390 frames scaled
# to 240 took 14.4, 13.4, 14.0, 14.0 and 18.9 ms for 8, 16, 32, 64 and 250, in files of 594, 434,
# 347, 295 and 252 kB.
KEYFRAMES = 32
QUALITY = 23  # x264's constant rate factor, its default
_CLOCK = 90_000  # ticks a second
_RATE = 25  # frames a second of a video that states no times
_COLOURS = ("color_range", "colorspace", "color_primaries", "color_trc")
_LIMITED, _BT601 = 1, 6  # FFmpeg's numbers of a range and of a matrix


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """The height and width with this short side, both even; those given if that is not smaller."""
    least = min(height, width)
    if least <= short_side:
        return height, width

    def scaled(side: int) -> int:
        return max(2, 2 * round(side * short_side / least / 2))

    return scaled(height), scaled(width)


def check_short_side(short_side: int, name: str) -> None:
    """UserError for a size that no video can be encoded in."""
    if short_side < 16 or short_side % 2:
        raise UserError(f"{name} is {short_side}; expected an even number of pixels, at least 16")


def transcoded(path: str, short_side: int, keyframes: int = KEYFRAMES) -> bytes | None:
    """The video as H.264 in an .mp4 with this short side; None if it is not larger than that.

    The bytes depend on the video, the arguments and the versions of PyAV and x264 only. There is no
    sound. Raises VideoError as `open_stream` does, and for damaged frames; WriteError if the
    temporary directory is full.
    """
    info = probe_video(path)
    height, width = scaled_size(info.height, info.width, short_side)
    if (height, width) == (info.height, info.width):
        return None
    with tempfile.TemporaryDirectory(prefix="vivit-jax-") as directory:
        file = os.path.join(directory, "video.mp4")
        with writing_here(path):
            _encode(path, file, (height, width), info, keyframes)
        with open(file, "rb") as made:
            return made.read()


def _encode(path: str, file: str, size: tuple[int, int], info: VideoInfo, keyframes: int) -> None:
    import av
    from av.codec import codecs_available
    from av.video.frame import PictureType

    if "libx264" not in codecs_available:
        raise UserError(
            f"{path}: this build of PyAV has no encoder libx264, which resizing needs; install the "
            "wheel of PyAV, or pack the videos as they are"
        )
    rate = info.fps if math.isfinite(info.fps) else _RATE
    # Without the names and versions of who writes it.
    muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
    options = {
        "preset": "medium",
        # No arithmetic coding, no deblocking: a seventh more bytes, an eighth less time of a clip.
        "tune": "fastdecode",
        "crf": str(QUALITY),
        # mbtree gave other bytes in one of a hundred encodings of the same frames.
        "x264-params": f"keyint={keyframes}:min-keyint={keyframes}:scenecut=0:open-gop=0:mbtree=0",
    }
    with av.open(file, "w", options=muxing) as container:
        rounded = Fraction(rate).limit_denominator(1001)
        stream: Any = container.add_stream("libx264", rate=rounded, options=options)
        context = stream.codec_context
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        context.thread_count = 1  # another number of threads gives other bytes
        context.time_base = stream.time_base = Fraction(1, _CLOCK)
        if info.pixel_aspect != 1:
            context.sample_aspect_ratio = Fraction(info.pixel_aspect).limit_denominator(255)
        tick = -1
        for streamed in open_stream(path):
            frame = _scaled(streamed, size)
            # x264 would make the frames of the source's kinds, with its keyframes.
            frame.pict_type = PictureType.NONE
            if tick < 0:
                for name in _COLOURS:
                    setattr(context, name, getattr(frame, name))
            seconds = streamed.seconds
            wanted = streamed.index / _RATE if math.isnan(seconds) else seconds
            tick = max(tick + 1, round(wanted * _CLOCK))
            frame.pts, frame.time_base = tick, Fraction(1, _CLOCK)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _scaled(streamed: StreamedFrame | AnimatedFrame, size: tuple[int, int]) -> Any:
    """The frame in this height and width, upright, with the colours of the source."""
    import av

    height, width = size
    how: Any = {"format": "yuv420p", "interpolation": "LANCZOS", "dst_color_range": _LIMITED}
    if isinstance(streamed, StreamedFrame):
        frame, turn = streamed.stored()
        if not frame.format.is_rgb and frame.format.name != "pal8":
            turned = turn[0, 0] == 0
            across, down = (height, width) if turned else (width, height)
            scaled = frame.reformat(width=across, height=down, **how)
            scaled.color_range = _LIMITED
            return scaled if (turn == np.eye(2)).all() else _turned(scaled, turn)
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(streamed.image()), format="rgb24")
    scaled = rgb.reformat(width=width, height=height, dst_colorspace="ITU601", **how)
    scaled.color_range, scaled.colorspace = _LIMITED, _BT601
    return scaled


def _turned(frame: Any, turn: Int[np.ndarray, "2 2"]) -> Any:
    """A frame of yuv420p as it is displayed: each of its planes is turned."""
    import av

    rows, luma = frame.to_ndarray(), frame.height * frame.width
    values = rows.reshape(-1)
    planes = [rows[: frame.height]]
    for start in (luma, luma + luma // 4):
        plane = values[start : start + luma // 4]
        planes.append(plane.reshape(frame.height // 2, frame.width // 2))
    planes = [oriented(plane[..., None], turn)[..., 0] for plane in planes]
    height, width = planes[0].shape
    packed = np.concatenate([plane.reshape(-1) for plane in planes]).reshape(-1, width)
    found = av.VideoFrame.from_ndarray(packed, format="yuv420p")
    assert (found.height, found.width) == (height, width)
    for name in _COLOURS:
        setattr(found, name, getattr(frame, name))
    return found

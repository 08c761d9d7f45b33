# SPDX-License-Identifier: Apache-2.0
"""Reads exact frames from video files with PyAV.

Frame k is the k-th frame of a decode of the whole file. `read_video` returns the pixels of that
decode bit for bit (`frame.to_ndarray(format="rgb24")`, then turned as the file's display matrix
says), the same in every call.

A few frames of a long video are read without decoding the rest: the packets' presentation times
number the frames (`vivit_jax.data.video.packets`), and decoding starts at the keyframe before each
wanted frame. If that numbering is not known to be exact, everything is decoded from the start and
the frames are counted, which is slower and gives the same frames. These cases are:

- containers other than mp4/mov and Matroska/WebM, and codecs other than h264, hevc, vp9 and av1
  (mpeg4 and vp8 packets may show no picture);
- a packet without a presentation time, two with the same one, or one marked as damaged or as to be
  discarded (edit lists that cut into the stream);
- a stream that does not begin with a keyframe shown first, or whose keyframes are out of order;
- vp9 packets that show no picture.

Even if the packets number the frames, they are decoded from the start, with the numbers of their
packets' times, if a decoded run has other times than its packets, does not begin with a keyframe,
has a frame marked as damaged, or raises a decoding error. Then an undecodable frame repeats the one
before it, as in a player, whatever else is read; clips for a model are refused if most of their
frames are such (`lost="few"`). The reason is logged at DEBUG level. WebP files are read by
`vivit_jax.data.video.images` instead.

A damaged file is readable up to where it is cut off, or where the container becomes unreadable;
decoding continues after a packet that cannot be decoded. One warning per file says what was lost.
A wanted frame in which the decoder reports errors that it concealed (`frame.is_corrupt`) is
refused, except in transport and program streams, which are made to lose packets; if such a frame is
only decoded on the way to a wanted one, a warning says so. Two limits: damage goes unnoticed where
nothing is decoded (in a stretch without a wanted frame, or in a frame that no other is predicted
from); and damage that the decoder does not report, or that a frame inherits from its references,
shows in the pixels only.

A decoder runs several threads only for codecs that report all damage whose decoding depends on the
threads' timing (`decoder.THREADED_CODECS`); if damage is reported, one thread decodes again. Frames
that begin at different keyframes are decoded at the same time, by one thread each.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, UInt8

from vivit_jax.data.sampling import clip_indices, pad_indices
from vivit_jax.data.video.clock import Clock
from vivit_jax.data.video.images import Animation, animation, is_webp
from vivit_jax.data.video.opened import (
    checked_path,
    open_video,
    packet_table,
    pixel_aspect,
    video_stream,
)
from vivit_jax.data.video.packets import Table, codec_name, reason_of
from vivit_jax.data.video.pictures import displayed, orientation, rgb, rotation, stacked
from vivit_jax.data.video.sequence import (
    decode_from_start,
    decode_sparse,
    refuse_damaged,
    refuse_lost,
    shortage,
)
from vivit_jax.errors import UserError, VideoError

logger = logging.getLogger(__name__)

# The share of undecodable frames that `lost` allows.
LOST_SHARES = {"repeat": 1, "few": 0.5, "error": 0}
# A total that no index reaches.
_ENDLESS = 2**62
Convert = Callable[[Any], UInt8[np.ndarray, "_ _ 3"]]  # of a decoded frame


@dataclass(frozen=True)
class VideoInfo:
    """The properties of a video file, as `read_video` returns its frames.

    Attributes:
        announced_frames: frames that the container claims, None if it claims nothing (mkv, webm,
            ts). It may be wrong: avi counts ticks, also those without a frame.
        num_frames: frames that `read_video` returns.
        fps: average frames per second, `num_frames / duration`.
        duration: seconds from the first frame's start to the last frame's end, by the frames' times
            if the container has them, else by the frame rate it states; nan if it has neither.
        height: pixels, as displayed (after rotation).
        width: pixels, as displayed (after rotation).
        rotation: degrees clockwise by which the stored picture is turned: 0, 90, 180 or 270.
        mirrored: whether it is also flipped left to right after turning.
        codec: e.g. "h264".
        pixel_format: of the stored picture, e.g. "yuv420p10le".
        container: FFmpeg's name for the format, e.g. "matroska,webm".
        pixel_aspect: a displayed pixel's width over its height (FFmpeg's sample aspect ratio, after
            rotation), 1 if the file does not say.
        stream: index of the video stream that is read, among all streams of the file: the one
            marked as default, else the one with the largest picture.
    """

    announced_frames: int | None
    num_frames: int
    fps: float
    duration: float
    height: int
    width: int
    rotation: int
    mirrored: bool
    codec: str
    pixel_format: str
    container: str
    pixel_aspect: float = 1.0
    stream: int = 0


def probe_video(path) -> VideoInfo:
    """Describes a video file, without decoding it if its packets number its frames exactly.

    Otherwise (see the module's list) the whole file is decoded to count its frames.

    Args:
        path: str, bytes or os.PathLike of a file.

    Raises:
        VideoError: the path is not a readable video file with at least one frame.
        UserError: `path` is not a path.
    """
    name = checked_path(path)
    if is_webp(name):
        return _webp_info(animation(name))
    table = packet_table(name)
    with open_video(name) as (container, stream):
        announced, index = stream.frames or None, stream.index
        codec, container_format = codec_name(stream), container.format.name
        clock, aspect = Clock(table, stream), pixel_aspect(stream)
    first, total, duration = None, table.packets, float("nan")
    if clock.known:
        first = decode_sparse(name, table, np.array([0]), lambda frame: frame).get(0)
        clock.seconds(total - 1, first)
        duration = clock.end()
    if first is None:
        run = decode_from_start(name, table, lambda frame: frame, {0})
        first, total, duration = run.frames[0], run.total, run.duration
    degrees, mirrored, turned = rotation(orientation(name, first))
    height, width = (first.width, first.height) if turned else (first.height, first.width)
    return VideoInfo(
        announced_frames=announced,
        num_frames=total,
        fps=total / duration if duration else float("nan"),
        duration=duration,
        height=height,
        width=width,
        rotation=degrees,
        mirrored=mirrored,
        codec=codec,
        pixel_format=first.format.name,
        container=container_format,
        pixel_aspect=float(1 / aspect if turned else aspect),
        stream=index,
    )


def count_video(path) -> int:
    """`probe_video(path).num_frames`, without decoding if the packets number the frames."""
    name = checked_path(path)
    if not is_webp(name):
        table = packet_table(name)
        if table.distrust is None:
            return table.packets
    return probe_video(name).num_frames


def _webp_info(held: Animation) -> VideoInfo:
    return VideoInfo(
        announced_frames=held.announced,
        num_frames=len(held),
        fps=held.fps,
        duration=held.duration,
        height=held.height,
        width=held.width,
        rotation=0,
        mirrored=False,
        codec="webp",
        pixel_format=held.mode.lower(),
        container="webp",
    )


def frame_times(path, indices: Sequence[int] | np.ndarray) -> Float64[np.ndarray, " n"]:
    """Seconds at which frames of a file are shown, counted from frame 0.

    They come from `vivit_jax.data.video.clock`, so they follow a variable frame rate. They are nan
    if the file states neither times nor a rate.

    Raises VideoError if the path is not a readable video file or has no such frame.
    """
    name = checked_path(path)
    places = pad_indices(indices, _ENDLESS)

    def check(total: int) -> None:
        try:
            pad_indices(places, total)
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from None

    if is_webp(name):
        held = animation(name)
        check(len(held))
        return held.seconds[places]
    table = packet_table(name)
    with open_video(name) as (_, stream):
        clock = Clock(table, stream)
    run = None
    if not clock.known:
        run = decode_from_start(name, table, lambda frame: None, set(), int(places.max()))
    check(run.total if run else table.packets)
    return np.array([run.seconds[k] if run else clock.seconds(int(k)) for k in places])


def read_video(
    path,
    *,
    num_frames: int | None = None,
    stride: int = 1,
    start: str | int = "center",
    indices: Sequence[int] | np.ndarray | None = None,
    pad: str = "error",
    seed: int | Sequence[int] | None = None,
    square_pixels: bool = False,
    lost: str = "repeat",
) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads a clip (`num_frames`), given frames (`indices`), or, with neither, every frame.

    Args:
        path: str, bytes or os.PathLike of a file.
        num_frames: frames in the clip.
        stride: distance between neighbouring frames of the clip, in frames of the video.
        start: where the clip lies: "begin", "center", "end", "random" (needs `seed`), or the index
            of its first frame. `clip_indices` defines each.
        indices: frame indices instead of a clip, from 0, in any order, repeats allowed; the result
            keeps their order.
        pad: for frames past the end of the video: "error", "repeat_last" (the video's last frame)
            or "loop" (from frame 0 again, `index % total`). A clip that does not fit starts at
            frame 0, or at `start` if that is an index.
        seed: for `start="random"`: the clip is a function of it and of the number of frames.
        square_pixels: whether to scale the width (bicubic, as FFmpeg's `scale=iw*sar:ih`) if the
            file says that its pixels are not square. False returns them as stored, with
            `VideoInfo.height` and `width`.
        lost: for a frame whose packet cannot be decoded, in a file whose packets number its frames:
            "repeat" (the frame before it), "few" (the same, but an error if more than half of the
            frames asked are such) or "error".

    Returns:
        uint8 [t, h, w, 3], RGB, rotated and mirrored as the file's metadata says. Only these frames
        are held in memory.

    Raises:
        VideoError: the path is not a readable video file, has fewer frames than asked and `pad` is
            "error", has damaged frames, more undecodable ones than `lost` allows or frames of
            different sizes among those asked, or is to be displayed at an angle that is not a
            multiple of 90 degrees.
        UserError: arguments contradict each other or are out of range, or `path` is not a path.
    """
    name = checked_path(path)
    if indices is not None and num_frames is not None:
        raise UserError("got both num_frames and indices: pass one of them")
    if num_frames is None and (stride != 1 or start != "center"):
        raise UserError(f"stride={stride!r} and start={start!r} place a clip: pass num_frames too")
    if lost not in LOST_SHARES:
        raise UserError(f"lost is {lost!r}; expected 'repeat', 'few' or 'error'")
    if isinstance(start, str) and start == "random" and seed is None:
        raise UserError("start='random' draws the clip's place and got no seed: pass seed=<int>")

    def choose(total: int, missing: str) -> np.ndarray:
        """The frames to read of `total`; `missing` ends the message that these are too few."""
        try:
            if indices is not None:
                return pad_indices(indices, total, pad)
            if num_frames is None:
                return np.arange(total)
            rng = None if seed is None else np.random.default_rng(seed)
            return clip_indices(total, num_frames, stride, start, pad, rng)
        except VideoError as error:
            raise VideoError(f"{name}: {error}{missing}") from None

    if is_webp(name):
        held = animation(name)
        return held.read(choose(len(held), held.shortage()))
    table, aspect = packet_table(name), Fraction(1)
    if square_pixels:
        with open_video(name) as (_, stream):
            aspect = pixel_aspect(stream)
    convert = functools.partial(displayed, name, aspect=aspect)
    if table.distrust is None:
        wanted = choose(table.packets, shortage(table, table.packets, False))
        return _read_numbered(name, table, convert, wanted, LOST_SHARES[lost])
    placed = num_frames is None or start in ("center", "end", "random")
    return _read_counted(name, table, convert, choose, fixed=indices is not None or not placed)


def _read_numbered(
    name: str, table: Table, convert: Convert, wanted: Int[np.ndarray, " n"], lost_share: float
) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads frames of a file whose packets number them."""
    frames = decode_sparse(name, table, np.unique(wanted), convert)
    if not frames:
        last = int(wanted.max()) if wanted.max() < table.packets - 1 else None
        run = decode_from_start(name, table, convert, set(wanted.tolist()), last)
        refuse_damaged(name, run.damaged, wanted, table.lossy)
        refuse_lost(name, run.filled, wanted, lost_share)
        frames = run.frames
    return stacked(name, frames, wanted)


def _read_counted(
    name: str,
    table: Table,
    convert: Convert,
    choose: Callable[[int, str], np.ndarray],
    fixed: bool,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads frames of a file whose frames are counted as they are decoded.

    `fixed` says that the frames chosen do not depend on the video's length: decoding stops at the
    last of them, without counting the rest.
    """
    total = _ENDLESS if fixed else table.packets - table.discarded
    try:
        wanted = choose(total, "")
    except VideoError:
        # Too few packets, but a packet may hold several frames: their number decides below.
        wanted = np.arange(0)
    last = int(wanted.max()) if fixed else None
    run = decode_from_start(name, table, convert, set(wanted.tolist()), last)
    if last not in run.frames:
        wanted = choose(run.total, shortage(table, run.total, run.cut))
        if not run.frames.keys() >= set(wanted.tolist()):
            last = int(wanted.max())
            run = decode_from_start(name, table, convert, set(wanted.tolist()), last)
    refuse_damaged(name, run.damaged, wanted, table.lossy)
    return stacked(name, run.frames, wanted)


def read_video_pyav(container, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
    """Decodes frames of an open PyAV container, as the function of this name in the HF docs does.

    One frame per distinct index, in increasing order, whatever the order and repeats of `indices`;
    the display matrix is not applied. `read_video` keeps order and repeats, rotates, and is faster.

    Args:
        container: av.container.InputContainer.
        indices: frame indices, from 0.

    Returns:
        uint8 [distinct indices, h, w, 3], RGB, as stored.

    Raises:
        VideoError: an index is past the last decodable frame, a wanted frame is damaged, the
            container has no video, or the frames differ in size.
        UserError: no indices, or one that is negative or not an int.
    """
    from av.error import FFmpegError

    name = container.name
    wanted = set(pad_indices(indices, _ENDLESS).tolist())
    last, total, frames, damaged = max(wanted), 0, {}, []
    try:
        stream = video_stream(name, container)
        container.seek(0)
        for k, frame in enumerate(container.decode(stream)):
            total = k + 1
            if frame.is_corrupt:
                damaged.append(k)
            if k in wanted:
                frames[k] = rgb(frame)
            if k == last:
                break
    except FFmpegError as error:
        logger.warning("%s: decoding stops after %d frames: %s", name, total, reason_of(error))
    if len(frames) < len(wanted):
        try:
            pad_indices(sorted(wanted), total)
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from None
    refuse_damaged(name, damaged, sorted(wanted))
    return stacked(name, frames, sorted(wanted))

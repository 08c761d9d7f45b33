# SPDX-License-Identifier: Apache-2.0
"""Reads exact frames from video files with PyAV.

Frame k is the k-th frame that decoding the whole file from its start yields. `read_video` returns
the pixels of that decode bit for bit (`frame.to_ndarray(format="rgb24")`, then turned as the file's
display matrix says), the same ones in every call.

A few frames of a long video are read without decoding the rest: the packets' presentation times
number the frames (`vivit_jax.data.video.packets`), and decoding starts at the keyframe before each
wanted frame. Where that numbering is not known to be exact, everything is decoded from the start
and the frames are counted, which is slower and gives the same frames:

- containers other than mp4/mov and Matroska/WebM, and codecs other than h264, hevc, vp9 and av1
  (mpeg4 and vp8 packets may hold no picture that is shown);
- a packet without a presentation time, two with the same, or one marked as damaged, or as to be
  discarded (edit lists that cut into the stream);
- a stream that does not begin with a keyframe shown first, or whose keyframes are out of order;
- vp9 packets that show no picture.

Where the packets do number the frames, they are decoded from the start all the same, and keep the
numbers that their packets' times give them, if a decoded run has times other than its packets',
does not begin with a keyframe, has a frame marked as damaged, or raises a decoding error.
Then a frame that cannot be decoded shows the one before it, as a player does, whatever is asked
with it; clips for a model are refused where most of their frames are such (`lost="few"`). The
reason is logged at DEBUG level. WebP files are read by `vivit_jax.data.video.images` instead.

A damaged file is readable up to where it is cut off, or where the container cannot be read on;
decoding goes on after a packet that cannot be decoded. One warning a file says what was lost.
A wanted frame in which the decoder reports errors that it concealed (`frame.is_corrupt`) is
refused, except in transport and program streams, which lose packets on their way as a matter of
course; where such a frame is only decoded on the way to a wanted one, a warning says so. Two
limits: damage in a stretch that holds no wanted frame, or in a frame that no other is predicted
from, goes unnoticed, as it is not decoded; and damage that the decoder does not report, or that a
frame inherits from one it is predicted from, shows in the pixels only.

A decoder runs several threads only for the codecs whose decoders report all damage in which threads
show (`packets.THREADED_CODECS`), and what they decoded is decoded again by one where damage is
reported: what is seen of a damaged frame otherwise depends on their timing. Frames that begin at
other keyframes are decoded at the same time, by one thread each.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

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
from vivit_jax.data.video.packets import codec_name, reason_of
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

# What `lost` allows of the frames asked.
LOST_SHARES = {"repeat": 1, "few": 0.5, "error": 0}
# A total that no index reaches.
_ENDLESS = 2**62


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, as `read_video` will return it.

    Attributes:
        announced_frames: frames the container claims, None if it claims nothing (mkv, webm, ts).
            It is a claim: avi counts ticks, also those without a frame.
        num_frames: frames that `read_video` returns.
        fps: average frames per second, `num_frames / duration`.
        duration: seconds from the first frame's start to the last frame's end, by the frames' times
            where the container has them, else by the frame rate it states; nan if it has neither.
        height: pixels, as displayed (after rotation).
        width: pixels, as displayed (after rotation).
        rotation: degrees clockwise by which the stored picture is turned: 0, 90, 180 or 270.
        mirrored: whether it is also flipped left to right after turning.
        codec: e.g. "h264".
        pixel_format: of the stored picture, e.g. "yuv420p10le".
        container: FFmpeg's name for the format, e.g. "matroska,webm".
        pixel_aspect: a displayed pixel's width over its height (FFmpeg's sample aspect ratio, after
            rotation), 1 where the file does not say.
        stream: index, among all streams of the file, of the video stream that is read: the one
            marked as default, or else the largest picture.
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
    """Describes a video file, without decoding it where its packets number its frames exactly.

    Where they do not (see the module's list) the whole file is decoded to count its frames.

    Args:
        path: str, bytes or os.PathLike of a file.

    Raises:
        VideoError: the path is not a readable video file with at least one frame.
        UserError: `path` is no path.
    """
    name = checked_path(path)
    if is_webp(name):
        return _webp_info(animation(name))
    table = packet_table(name)
    with open_video(name) as (container, stream):
        announced, index = stream.frames or None, stream.index
        codec, container_format = codec_name(stream), container.format.name
        clock, aspect = Clock(table, stream), pixel_aspect(stream)
    first, total = None, table.packets
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


def frame_times(path, indices: Sequence[int]) -> np.ndarray:
    """Seconds, float64 [n], at which frames of a file are shown, counted from frame 0.

    They come from `vivit_jax.data.video.clock`, so they follow a variable frame rate. Frames
    without a time, in a file that states no rate, are at nan.

    Raises VideoError for what is no readable video file, or has no such frame.
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
    indices: Sequence[int] | None = None,
    pad: str = "error",
    seed: int | Sequence[int] | None = None,
    square_pixels: bool = False,
    lost: str = "repeat",
) -> np.ndarray:
    """Reads a clip, the frames asked for, or (with neither `num_frames` nor `indices`) every frame.

    Args:
        path: str, bytes or os.PathLike of a file.
        num_frames: frames in the clip.
        stride: distance between neighbouring frames of the clip, in frames of the video.
        start: where the clip lies: "begin", "center", "end", "random" (needs `seed`), or the index
            of its first frame. `clip_indices` defines each.
        indices: frame indices instead of a clip, from 0, in any order, repeats allowed; the result
            is in this order.
        pad: for frames past the end of the video: "error", "repeat_last" (the video's last frame)
            or "loop" (from frame 0 again, `index % total`). A clip that does not fit starts at
            frame 0, or at `start` if that is an index.
        seed: for `start="random"`: the clip is a function of it and of the number of frames.
        square_pixels: whether the stored picture is scaled in its width (bicubic, as FFmpeg's
            `scale=iw*sar:ih`) where the file says that its pixels are not square. False returns
            them as stored, as `VideoInfo.height` and `width` say.
        lost: for a frame whose packet cannot be decoded, in a file whose packets number its frames:
            "repeat" (the frame before it), "few" (the same, unless more than half of the frames
            asked are such, which is an error) or "error".

    Returns:
        uint8 [t, h, w, 3], RGB, rotated and mirrored as the file's metadata says. Only these frames
        are held in memory.

    Raises:
        VideoError: the path is not a readable video file, has fewer frames than asked and `pad` is
            "error", has damaged frames, more undecodable ones than `lost` allows or frames of
            different sizes among those asked, or is to be displayed at an angle that is no multiple
            of 90 degrees.
        UserError: arguments that contradict each other or are out of range, or `path` is no path.
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
    everything = num_frames is None and indices is None

    def choose(total: int, cut: bool = False) -> np.ndarray:
        try:
            if everything:
                return np.arange(total)
            if indices is not None:
                return pad_indices(indices, total, pad)
            rng = None if seed is None else np.random.default_rng(seed)
            return clip_indices(total, num_frames, stride, start, pad, rng)
        except VideoError as error:
            missing = held.shortage() if held else shortage(table, total, cut)
            raise VideoError(f"{name}: {error}{missing}") from None

    held = animation(name) if is_webp(name) else None
    if held is not None:
        return held.read(choose(len(held)))
    table, aspect = packet_table(name), Fraction(1)
    if square_pixels:
        with open_video(name) as (_, stream):
            aspect = pixel_aspect(stream)
    convert = functools.partial(displayed, name, aspect=aspect)
    if table.distrust is None:
        wanted = choose(table.packets)
        frames = decode_sparse(name, table, np.unique(wanted), convert)
        if not frames:
            last = int(wanted.max()) if wanted.max() < table.packets - 1 else None
            run = decode_from_start(name, table, convert, set(wanted.tolist()), last)
            refuse_damaged(name, run.damaged, wanted, table.lossy)
            refuse_lost(name, run.filled, wanted, LOST_SHARES[lost])
            frames = run.frames
        return stacked(name, frames, wanted)

    # Frames at fixed places are chosen, and decoding stops at the last, without counting the rest.
    fixed = indices is not None or not (everything or start in ("center", "end", "random"))
    try:
        wanted = choose(_ENDLESS if fixed else table.packets - table.discarded)
    except VideoError:
        # Too few packets, but a packet may hold several frames: their number decides below.
        wanted = np.arange(0)
    last = int(wanted.max()) if fixed else None
    run = decode_from_start(name, table, convert, set(wanted.tolist()), last)
    if last not in run.frames:
        wanted = choose(run.total, run.cut)
        if not run.frames.keys() >= set(wanted.tolist()):
            last = int(wanted.max())
            run = decode_from_start(name, table, convert, set(wanted.tolist()), last)
    refuse_damaged(name, run.damaged, wanted, table.lossy)
    return stacked(name, run.frames, wanted)


def read_video_pyav(container, indices: Sequence[int]) -> np.ndarray:
    """Decodes frames of an open PyAV container as the function of this name in the HF docs does.

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
        UserError: no indices, or one that is negative or no int.
    """
    import av

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
    except av.FFmpegError as error:
        logger.warning("%s: decoding stops after %d frames: %s", name, total, reason_of(error))
    if len(frames) < len(wanted):
        try:
            pad_indices(sorted(wanted), total)
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from None
    refuse_damaged(name, damaged, sorted(wanted))
    return stacked(name, frames, sorted(wanted))

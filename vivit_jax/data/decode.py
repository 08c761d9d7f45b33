# SPDX-License-Identifier: Apache-2.0
"""Reads exact frames from video files with PyAV.

Frame k is the k-th frame that decoding the whole file from its start yields. That order is the only
definition of a frame index here; `read_video` returns the pixels of that decode bit for bit
(`frame.to_ndarray(format="rgb24")`, then turned as the file's display matrix says).

A few frames of a long video are read without decoding the rest: the packets' presentation times
number the frames (`vivit_jax.data.packets`), and decoding starts at the keyframe before each wanted
frame. Where that numbering is not known to be exact, everything is decoded from the start instead,
which is slower and gives the same frames:

- containers other than mp4/mov and Matroska/WebM (avi has no presentation times), and codecs other
  than h264, hevc, vp9 and av1 (mpeg4 and vp8 packets may hold no picture that is shown);
- a packet without a presentation time, two with the same, or one marked as damaged, or as to be
  discarded (edit lists that cut into the stream);
- a stream that does not begin with a keyframe shown first, or whose keyframes are out of order;
- vp9 packets that show no picture;
- a decoded run whose times differ from its packets' times, that does not begin with a keyframe, in
  which a wanted frame is marked as damaged, or that raises a decoding error.

The reason is logged at DEBUG level.

A damaged file is readable up to the first packet that is cut off or cannot be decoded; a warning
says how many frames that leaves. A wanted frame in which the decoder reports errors that it
concealed (`frame.is_corrupt`) is refused; where such a frame is only decoded on the way to a wanted
one, a warning says so. Two limits: damage in a stretch that holds no wanted frame, or in a frame
that no other is predicted from, goes unnoticed, as it is not decoded, and the frames after it keep
the numbers that their packets give them; and damage that the decoder does not report, or that a
frame inherits from one it is predicted from, shows in the pixels only.
"""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vivit_jax.data.packets import (
    SPARSE_CODECS,
    TIMED_CONTAINERS,
    Distrusted,
    Table,
    Undecodable,
    codec_name,
    first_packets,
    named,
    reason_of,
    scan,
    sparse_frames,
    warn_of_damage,
)
from vivit_jax.data.sampling import clip_indices, pad_indices
from vivit_jax.errors import UserError, VideoError

logger = logging.getLogger(__name__)

_EXPECTED = "expected a video file such as mp4, mkv, webm, mov or avi"
# FFmpeg draws text files as pictures with these.
_TEXT_CODECS = ("ansi", "bintext", "xbin", "idf")
# A total that no index reaches.
_ENDLESS = 2**62
# Of two slashes a Path keeps one. One letter is a drive.
_LINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, as `read_video` will return it.

    Attributes:
        announced_frames: frames the container claims, None if it claims nothing (mkv, webm).
        num_frames: frames that can be decoded.
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
    table = packet_table(name)
    with open_video(name) as (container, stream):
        announced, time_base = stream.frames or None, stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        codec, container_format = codec_name(stream), container.format.name
        first = None
        if table.distrust is None:
            with _fallback(name):
                first = dict(sparse_frames(container, stream, table, np.array([0])))[0]
                times = np.sort(table.pts).tolist()
    if first is None:
        run = _decode_from_start(name, table, lambda frame: frame, {0})
        first, times = run.frames[0], run.times
    if container_format in TIMED_CONTAINERS and len(times) > 1 and None not in times:
        duration = duration_of(times, table, time_base)
    else:
        duration = len(times) / float(rate) if rate else float("nan")
    rotation, mirrored, turned = _rotation(_orientation(name, first))
    height, width = (first.width, first.height) if turned else (first.height, first.width)
    return VideoInfo(
        announced_frames=announced,
        num_frames=len(times),
        fps=len(times) / duration if duration else float("nan"),
        duration=duration,
        height=height,
        width=width,
        rotation=rotation,
        mirrored=mirrored,
        codec=codec,
        pixel_format=first.format.name,
        container=container_format,
    )


def duration_of(times, table: Table, time_base) -> float:
    """Seconds from the first of at least two frames to the end of the last, by their times."""
    shown = int(max(times)) - int(min(times))
    return float((shown + (table.last_duration or shown / (len(times) - 1))) * time_base)


def frame_times(path, indices: Sequence[int]) -> np.ndarray:
    """Seconds, float64 [n], at which frames of a file are shown, counted from frame 0.

    They are the container's presentation times, so they follow a variable frame rate. A container
    that has none that are known to be right (all but mp4/mov and Matroska/WebM) is taken to have
    the constant rate it states. A frame without a time is at nan.

    Raises VideoError for what is no readable video file, or has no such frame.
    """
    name = checked_path(path)
    table, places = packet_table(name), pad_indices(indices, _ENDLESS)

    def check(total: int) -> None:
        try:
            pad_indices(places, total)
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from None

    with open_video(name) as (container, stream):
        time_base, rate = stream.time_base, stream.average_rate or stream.guessed_rate
        if container.format.name not in TIMED_CONTAINERS:
            return places / float(rate) if rate else np.full(len(places), np.nan)
        shown = None
        if table.distrust is None:
            check(table.packets)
            with _fallback(name):
                for _ in sparse_frames(container, stream, table, np.unique(places)):
                    pass  # that the frames are at their packets' times is only known by decoding
                shown = np.sort(table.pts).tolist()
    if shown is None:
        shown = _decode_from_start(name, table, lambda frame: None, set(), int(places.max())).times
        check(len(shown))
    ticks = [None if shown[0] is None or shown[k] is None else shown[k] - shown[0] for k in places]
    return np.array([np.nan if tick is None else float(tick * time_base) for tick in ticks])


def read_video(
    path,
    *,
    num_frames: int | None = None,
    stride: int = 1,
    start: str | int = "center",
    indices: Sequence[int] | None = None,
    pad: str = "error",
    seed: int | Sequence[int] | None = None,
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

    Returns:
        uint8 [t, h, w, 3], RGB, rotated and mirrored as the file's metadata says. Only these frames
        are held in memory.

    Raises:
        VideoError: the path is not a readable video file, has fewer frames than asked and `pad` is
            "error", has damaged frames or frames of different sizes among those asked, or is to be
            displayed at an angle that is no multiple of 90 degrees.
        UserError: arguments that contradict each other or are out of range, or `path` is no path.
    """
    name = checked_path(path)
    if indices is not None and num_frames is not None:
        raise UserError("got both num_frames and indices: pass one of them")
    if num_frames is None and (stride != 1 or start != "center"):
        raise UserError(f"stride={stride!r} and start={start!r} place a clip: pass num_frames too")
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
            raise VideoError(f"{name}: {error}{shortage(table, total, cut)}") from None

    convert = functools.partial(displayed, name)
    table = packet_table(name)
    if table.distrust is None:
        wanted = choose(table.packets)
        with open_video(name) as (container, stream), _fallback(name):
            found = sparse_frames(container, stream, table, np.unique(wanted))
            return _stacked(name, {k: convert(frame) for k, frame in found}, wanted)

    # Frames at fixed places are chosen, and decoding stops at the last, without counting the rest.
    fixed = indices is not None or not (everything or start in ("center", "end", "random"))
    try:
        wanted = choose(_ENDLESS if fixed else table.packets - table.discarded)
    except VideoError:
        # Too few packets, but a packet may hold several frames: their number decides below.
        wanted = np.arange(0)
    last = int(wanted.max()) if fixed else None
    run = _decode_from_start(name, table, convert, set(wanted.tolist()), last)
    if last not in run.frames:
        wanted = choose(len(run.times), run.cut)
        if not run.frames.keys() >= set(wanted.tolist()):
            last = int(wanted.max())
            run = _decode_from_start(name, table, convert, set(wanted.tolist()), last)
    refuse_damaged(name, run.damaged, wanted)
    return _stacked(name, run.frames, wanted)


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
        stream = _video_stream(name, container)
        container.seek(0)
        for k, frame in enumerate(container.decode(stream)):
            total = k + 1
            if frame.is_corrupt:
                damaged.append(k)
            if k in wanted:
                frames[k] = _rgb(frame)
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
    return _stacked(name, frames, sorted(wanted))


def checked_path(path) -> str:
    """The name of a file that is there and not empty; VideoError or UserError otherwise."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise UserError(
            f"path is {path!r} ({type(path).__name__}); expected the path of a video file "
            "(str, bytes or os.PathLike), not an open file or its content"
        )
    name = os.fsdecode(path)
    refuse_link(name)
    if os.path.isdir(name):
        found = "a directory"
    elif not os.path.exists(name):
        found = "no such file"
    elif not os.path.isfile(name):
        found = "not a regular file"
    elif os.path.getsize(name) == 0:
        found = "an empty file (0 bytes)"
    else:
        return name
    raise VideoError(f"{name}: {found}; {_EXPECTED}")


def refuse_link(name: str) -> None:
    """VideoError for a link such as https://x.org/a.mp4, also one that was made a Path."""
    if _LINK.match(name) and not os.path.exists(name):
        raise VideoError(f"{name}: links are not opened; download the file and give its path")


@contextlib.contextmanager
def open_video(name: str, threads: str = "AUTO") -> Iterator[tuple]:
    """(container, its video stream); what FFmpeg refuses is a VideoError."""
    import av

    try:
        with _opened(name) as container:
            stream = _video_stream(name, container)
            stream.thread_type = threads
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(
            f"{name}: no readable video ({reason_of(error)}): damaged, cut off, or another kind of "
            f"file; {_EXPECTED}"
        ) from error


def packet_table(name: str) -> Table:
    """The packets of a file; logs a warning if it ends before what it announces.

    A long video has many, and the same file is often asked again: what it holds, then a clip, then
    the next clip. So tables are kept while their file is the same one, unchanged.
    """
    file = os.stat(name)
    state = file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns
    table = scanned(name, state)
    if table.incomplete:
        logger.warning("%s: %s", name, table.incomplete)
    return table


@functools.lru_cache(maxsize=64)  # about a megabyte for an hour of video
def scanned(name: str, state: tuple[int, ...]) -> Table:
    """The packets of a file in a state, which only tells a changed file from the one it was."""
    with open_video(name) as (container, stream):
        return scan(container, stream)


def _opened(name: str):
    """The container, its packets as they are stored where the numbering by packets is at home.

    FFmpeg's parsers look into every packet otherwise, for what these containers say themselves.
    """
    import av

    # The prefix keeps a colon in a file name from being read as a network protocol.
    file, options = "file:" + name, {"fflags": "noparse"}
    with contextlib.suppress(av.FFmpegError):
        container = av.open(file, options=options, **_lenient())
        codecs = [s.codec_context and codec_name(s) for s in container.streams.video]
        if container.format.name in TIMED_CONTAINERS and set(codecs) <= set(SPARSE_CODECS):
            return container
        container.close()
    return av.open(file, **_lenient())


@functools.cache
def _lenient() -> dict[str, str]:
    """Arguments of `av.open` with which titles and comments that are no UTF-8 are no error.

    PyAV 19 has no such argument: it escapes those bytes by itself.
    """
    import av

    takes = hasattr(av.container.InputContainer, "metadata_errors")
    return {"metadata_errors": "replace"} if takes else {}


def _video_stream(name: str, container):
    from av.stream import Disposition

    # A cover picture is stored as a video stream too.
    pictures = [s for s in container.streams.video if s.disposition & Disposition.attached_pic]
    videos = [s for s in container.streams.video if s not in pictures]
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "no"
        cover = " (the video stream is a cover picture)" if pictures else ""
        raise VideoError(f"{name}: holds {kinds} streams but no video{cover}; {_EXPECTED}")
    stream = videos[0]
    if stream.codec_context is None:
        raise VideoError(f"{name}: no decoder for its video stream; {_EXPECTED}")
    if codec_name(stream) in _TEXT_CODECS:
        raise VideoError(f"{name}: a text file; {_EXPECTED}")
    return stream


@contextlib.contextmanager
def _fallback(name: str) -> Iterator[None]:
    try:
        yield
    except Distrusted as reason:
        logger.debug("%s: decoding from the start: %s", name, reason)


@dataclass(frozen=True)
class _Run:
    """Frames decoded from the start: the wanted ones, converted, by number; all frames' times."""

    frames: dict[int, object]
    times: list[int | None]
    damaged: list[int]  # numbers of the frames, wanted or not, in which the decoder reports errors
    cut: bool  # whether a decoding error ended it


class FromStart:
    """The frames of a file, numbered, decoded from its start up to the first undecodable packet.

    Where a packet raises an error, the numbers begin again at 0: the frames are decoded anew, by
    one thread, and what came before is void; damage (`is_corrupt`) is marked by chance where there
    are several. Nothing but the decoder's frames is held. `cut` says at the end whether an error
    ended it; what is missing then is logged. Raises VideoError for a file that has no frame.
    """

    def __init__(self, name: str, table: Table):
        self.name, self.table, self.cut = name, table, False

    def __iter__(self) -> Iterator[tuple]:
        name, table = self.name, self.table
        threads, limit, done = "AUTO", table.packets, 0
        while limit > 0:
            done = 0
            try:
                with open_video(name, threads) as (container, stream):
                    for frame in first_packets(container, stream, limit):
                        done += 1
                        yield done - 1, frame
                break
            except Undecodable as error:
                # With several threads the error surfaces packets later: one finds the packet.
                if threads == "NONE":
                    limit = min(error.packet, limit - 1)
                threads, damage = "NONE", str(error)
        if not limit or not done:
            raise VideoError(f"{name}: none of its frames can be decoded: get the file again")
        self.cut = limit < table.packets
        if done < table.packets - table.discarded:
            why = f"packet {limit}: {damage}" if self.cut else "packets without a picture"
            logger.warning(
                "%s: %d frames can be decoded from %d packets (%s)",
                name,
                done,
                table.packets - table.discarded,
                why,
            )


def _decode_from_start(
    name: str,
    table: Table,
    convert: Callable,
    wanted: set[int],
    last: int | None = None,
) -> _Run:
    """Decodes up to frame `last`, or all."""
    if table.distrust:
        logger.debug("%s: decoding from the start: %s", name, table.distrust)
    frames, times, damaged = {}, [], []
    decoding = FromStart(name, table)
    with contextlib.closing(iter(decoding)) as numbered:
        for k, frame in numbered:
            if k == 0:
                frames, times, damaged = {}, [], []
            if frame.is_corrupt:
                damaged.append(k)
            if k in wanted:
                frames[k] = convert(frame)
            times.append(frame.pts)
            if k == last:
                break
    return _Run(frames, times, damaged, decoding.cut)


def refuse_damaged(name: str, damaged: list[int], wanted) -> None:
    """VideoError where a wanted frame is damaged, a warning where another is."""
    refused = sorted(set(damaged) & {int(k) for k in wanted})
    if refused:
        raise VideoError(
            f"{name}: the decoder reports damage in {named(refused)} of those asked: ask for other "
            "frames, get the file again, or accept the damage by re-encoding it: "
            "ffmpeg -i IN -c:v libx264 OUT.mp4"
        )
    warn_of_damage(name, damaged)


def shortage(table: Table, total: int, cut: bool) -> str:
    """Ends the message that a video has too few frames, if that is because it is damaged."""
    expected = max(table.announced, table.packets) - table.discarded
    if not (cut or table.damage or table.packets < table.announced) or expected < total:
        return ""
    announces = f"announces {expected} frames, " if expected > total else ""
    return (
        f" (the file {announces or 'ends early: '}decoding stops after {total}: it is damaged or "
        "truncated, get it again)"
    )


def _orientation(name: str, frame) -> np.ndarray:
    """int [2, 2] matrix m with displayed (x, y) = stored (x, y) @ m up to a shift."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2, dtype=int)
    matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].astype(float)
    scaled = matrix / max(abs(matrix).max(), 1)
    turned = np.rint(scaled).astype(int)
    orthogonal = np.array_equal(turned @ turned.T, np.eye(2))
    if not orthogonal or abs(scaled - turned).max() > 1e-3:
        raise VideoError(
            f"{name}: display matrix {(matrix / 65536).tolist()} is none of the eight turns by a "
            "multiple of 90 degrees and mirrorings: rewrite the file with "
            "ffmpeg -display_rotation 0 -i IN -c copy OUT"
        )
    return turned


def displayed(name: str, frame) -> np.ndarray:
    """uint8 [h, w, 3] of a decoded frame, turned and mirrored as a player shows it."""
    return _oriented(_rgb(frame), _orientation(name, frame))


def _rgb(frame) -> np.ndarray:
    # One thread: by default each frame starts its own, for the same bits at several times the cost.
    return frame.to_ndarray(format="rgb24", threads=1)


def _oriented(image: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """[h, w, c] as displayed."""
    (a, b), (c, d) = orientation
    if a == 0:
        image, right, down = image.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return image[::down, ::right]


def _rotation(orientation: np.ndarray) -> tuple[int, bool, bool]:
    """Degrees clockwise, whether mirrored left to right after, whether height and width swap."""
    (a, b), (c, d) = orientation
    mirrored = a * d - b * c < 0
    cosine = -a if mirrored else a
    degrees = {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): 270}[int(cosine), int(b)]
    return degrees, bool(mirrored), degrees in (90, 270)


def _stacked(name: str, frames: dict[int, np.ndarray], indices) -> np.ndarray:
    refuse_sizes(name, {frames[k].shape[:2]: k for k in reversed(indices)})
    return np.stack([frames[k] for k in indices])


def refuse_sizes(name: str, shapes: dict[tuple[int, ...], int]) -> None:
    """VideoError for frames of more than one (height, width); each with a frame that has it."""
    if len(shapes) > 1:
        sizes = ", ".join(f"{w}x{h} (frame {k})" for (h, w), k in shapes.items())
        raise VideoError(
            f"{name}: frames of different sizes: {sizes}; expected one size: "
            "read the parts separately with indices=..., or re-encode the file to one size"
        )

# SPDX-License-Identifier: Apache-2.0
"""Numbers the frames of an opened stream by its packets, and decodes only what wanted frames need.

Demuxing (no decoding) gives the presentation time of every packet; sorted, these are the times of
frames 0, 1, 2... A wanted frame is decoded from the keyframe before it, without the h264 pictures
that no other is predicted from, and the decoded times must equal the table's, exactly and in order,
or the run is refused. `vivit_jax.data.video.decode` says what makes a table unfit and decodes
from the start instead.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vivit_jax.data.video import h264

logger = logging.getLogger(__name__)

TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# In these containers each of their packets holds one shown picture. mpeg4's may hold none, or two,
# and vp8's hidden reference pictures are packets of their own.
SPARSE_CODECS = ("h264", "hevc", "vp9", "av1")
# Where bytes get lost in transit and streams are joined: a packet marked as damaged lacks some, and
# decoding goes on after it, as FFmpeg's own does. Elsewhere the last such packet is cut off.
LOSSY_CONTAINERS = ("mpegts", "mpeg")
# With these, frame threads give the frames of one thread, or the decoder reports damage. Frames of
# damaged hevc, vp8, ffv1, mpeg1video and others differ from call to call with no report, and those
# of h264 and mpeg4 may be given out by another thread before they are marked as damaged.
THREADED_CODECS = ("vp9", "av1", "prores")
# Up to so many packets frame threads gain nothing.
FEW_PACKETS = 8
# Containers whose stated duration is no estimate.
_STATED_DURATION = (*TIMED_CONTAINERS, "flv")


@dataclass(frozen=True)
class Table:
    """The packets of a stream in decoding order, up to where reading fails or the file ends."""

    pts: np.ndarray  # int64 [packets], stream time units; meaningful only if `distrust` is None
    stored: np.ndarray  # int64 [packets], ascending decoding times; only of avi, which has no other
    keys: np.ndarray  # int64 [keyframes], positions in `pts`
    last_duration: int  # of the frame shown last, stream time units, 0 if unknown
    packets: int
    discarded: int
    distrust: str | None  # why the presentation times do not number the frames
    announced: int  # packets the container claims, 0 if it claims nothing
    lossy: bool  # whether the container is one of LOSSY_CONTAINERS
    damage: str | None  # why packets after these cannot be read
    flaws: str | None  # where packets lack bytes, for a warning
    incomplete: str | None  # that the file ends before what it announces, for a warning


class Distrusted(Exception):
    """Decoding contradicts the table."""


class Reported(Exception):
    """A decoder reports damage where it was to give undamaged frames or none."""


def reason_of(error) -> str:
    """FFmpeg's words for an av error."""
    return error.strerror or type(error).__name__


def codec_name(stream) -> str:
    """The codec, whatever the decoder is called: "av1", not "libdav1d"."""
    return stream.codec_context.codec.canonical_name


def videos_of(container) -> list:
    """The video streams of a container but for cover pictures, which are stored as such too."""
    from av.stream import Disposition

    attached = Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & attached]


def scan(container, stream) -> Table:
    """Demuxes all packets."""
    import av

    codec, form = codec_name(stream), container.format.name
    pts, dts, keys, flagged = [], [], [], []
    discarded = last_duration = 0
    latest = distrust = damage = None
    if form not in TIMED_CONTAINERS:
        distrust = f"container {form}"
    elif codec not in SPARSE_CODECS:
        distrust = f"codec {codec}"
    try:
        for packet in _packets(container, stream):
            if packet.is_corrupt:
                flagged.append(len(pts))
            if packet.is_discard:
                discarded += 1
                distrust = distrust or "packets marked to be discarded (edit list)"
            if packet.pts is None:
                distrust = distrust or "packets without presentation time"
            elif not packet.is_corrupt and (latest is None or packet.pts > latest):
                latest, last_duration = packet.pts, packet.duration or 0
            if codec == "vp9" and not _vp9_shows(memoryview(packet)):
                distrust = distrust or "vp9 packets that show no picture"
            if packet.is_keyframe:
                keys.append(len(pts))
            pts.append(packet.pts)
            dts.append(packet.dts)
    except av.FFmpegError as error:
        damage = f"reading fails after packet {len(pts)}: {reason_of(error)}"
    while form not in LOSSY_CONTAINERS and flagged and flagged[-1] == len(pts) - 1:
        damage = f"packet {flagged.pop()} is cut off or damaged"
        del pts[-1], dts[-1]
    if flagged:
        distrust = distrust or "packets marked as damaged"
    stored = np.array(sorted(dts) if form == "avi" and None not in dts else [], dtype=np.int64)
    # What avi counts are ticks: one may repeat the picture before it, and have no packet.
    ticks = int(stored[-1]) + least_step(stored) if len(stored) else len(pts)
    announced = len(pts) if ticks >= stream.frames > len(pts) else stream.frames
    times = np.array(pts if distrust is None else [], dtype=np.int64)
    keys = np.array([key for key in keys if key < len(pts)], dtype=np.int64)
    return Table(
        pts=times,
        stored=stored,
        keys=keys,
        last_duration=last_duration,
        packets=len(pts),
        discarded=discarded,
        distrust=distrust or damage or _disorder(times, keys),
        announced=announced,
        lossy=form in LOSSY_CONTAINERS,
        damage=damage,
        flaws=_flaws(flagged, len(pts)),
        incomplete=_incomplete(
            container, stream, len(pts), announced, damage, latest, last_duration
        ),
    )


def least_step(times: np.ndarray) -> int:
    """The smallest distance between neighbours in ascending times, 1 where there is none."""
    steps = np.diff(times)
    return int(steps[steps > 0].min()) if (steps > 0).any() else 1


def _flaws(flagged: list[int], packets: int) -> str | None:
    if not flagged:
        return None
    places = named(flagged, "packet")
    return f"bytes are missing, or another stream was joined on, at {places} of {packets}"


def _incomplete(
    container,
    stream,
    packets: int,
    announced: int,
    damage: str | None,
    latest: int | None,
    last_duration: int,
) -> str | None:
    """That a file ends before what it announces."""
    found = f"{packets} frames can be read" + (f" ({damage})" if damage else "")
    if damage or packets < announced:
        return f"incomplete: {stream.frames or 'no number of'} frames announced, {found}"
    if stream.frames or not container.duration or latest is None:
        return None
    # Of several videos the length is that of the longest.
    if container.format.name not in _STATED_DURATION or len(videos_of(container)) > 1:
        return None
    end, length = float((latest + last_duration) * stream.time_base), container.duration / 1e6
    if end >= 0.9 * length:  # an audio stream may well be a little longer
        return None
    return f"incomplete or longer in sound: {length:.2f} s announced, {found}, up to {end:.2f} s"


def _packets(container, stream) -> Iterator:
    # PyAV ends the stream with an empty packet, and avi has empty ones for "same picture again".
    # PyAV 18 may look there for streams that it does not know: they appeared after opening.
    with contextlib.suppress(IndexError):
        yield from (packet for packet in container.demux(stream) if packet.size)


def _vp9_shows(data: memoryview) -> bool:
    if data[-1] & 0xE0 == 0xC0:  # a superframe: hidden frames and one that is shown
        return True
    # Bits: marker (2), profile (2, and 1 reserved for profile 3), show_existing, not_key, show.
    shift = 1 if data[0] & 0x30 == 0x30 else 0
    show_existing, show = 0x08 >> shift, 0x02 >> shift
    return bool(data[0] & (show_existing | show))


def _disorder(pts: np.ndarray, keys: np.ndarray) -> str | None:
    order = np.argsort(pts)
    if not len(keys) or order[0] != 0 or keys[0] != 0:
        return "the stream does not begin with a keyframe that is shown first"
    if (np.diff(pts[order]) == 0).any():
        return "packets with the same presentation time"
    if (np.diff(pts[keys]) < 0).any() or (order < _run_starts(pts, keys, order)).any():
        return "keyframes out of order"
    return None


def _run_starts(pts: np.ndarray, keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """For packets at `positions`, the position of the latest keyframe that is shown no later.

    A picture stored after a keyframe and shown before it (open GOP) needs the previous keyframe.
    """
    return keys[np.searchsorted(pts[keys], pts[positions], side="right") - 1]


def count_needed(table: Table, wanted: np.ndarray) -> int:
    """How many packets `sparse_frames` decodes at most for the ascending frames `wanted`."""
    return sum(last - first + 1 for first, last in _runs(table, wanted))


def divided(table: Table, wanted: np.ndarray, parts: int) -> list[np.ndarray]:
    """The ascending frames `wanted` in at most `parts` parts of about as many packets to decode.

    Frames that are decoded from the same keyframe stay together, so none is decoded twice but those
    of an open GOP.
    """
    positions = np.argsort(table.pts)[wanted]
    starts = _run_starts(table.pts, table.keys, positions)
    firsts = np.flatnonzero(np.diff(starts, prepend=-1))  # of `wanted`, each from another keyframe
    needed = [count_needed(table, part) for part in np.split(wanted, firsts[1:])]
    behind = np.cumsum([0, *needed[:-1]])
    shares = behind * parts // max(sum(needed), 1)
    return np.split(wanted, firsts[np.flatnonzero(np.diff(shares)) + 1])


def _runs(table: Table, wanted: np.ndarray) -> list[list[int]]:
    """Inclusive [first, last] ranges of packets to decode for the ascending frames `wanted`."""
    positions = np.argsort(table.pts)[wanted]
    runs: list[list[int]] = []
    for first, last in zip(_run_starts(table.pts, table.keys, positions), positions, strict=True):
        if runs and first <= runs[-1][1] + 1:
            runs[-1][1] = max(runs[-1][1], int(last))
        else:
            runs.append([int(first), int(last)])
    return runs


def sparse_frames(container, stream, table: Table, wanted: np.ndarray) -> Iterator[tuple]:
    """Yields (k, frame) for the ascending frames `wanted`; all are void if it raises Distrusted."""
    import av

    shown = np.sort(table.pts)
    frame_at = dict(zip(shown[wanted].tolist(), wanted.tolist(), strict=True))
    position_at = {time: position for position, time in enumerate(table.pts.tolist())}
    runs = _runs(table, wanted)
    # Pictures that precede the keyframe where decoding begins (open GOP) lack others by right:
    # h264's decoder would raise for them, hevc's leaves them out.
    if codec_name(stream) != "h264" or all(
        (table.pts[a : b + 1] >= table.pts[a]).all() for a, b in runs
    ):
        _raise_for_damage(stream)
    for first, last in runs:
        times = table.pts[first : last + 1]
        start = int(times[0])
        decoded, skipped, passing = [], [], _passing(stream)

        def needless(packet, passing=passing) -> bool:
            return passing(packet) and packet.pts not in frame_at

        try:
            container.seek(start, stream=stream)
            for frame in _decode_run(
                container, stream, position_at, first, last, needless, skipped
            ):
                # Those shown before the keyframe lack what they refer to, and are not wanted here.
                if frame.pts is None or frame.pts >= start:
                    if not decoded and not frame.key_frame:
                        raise Distrusted(f"packet {first} is marked as a keyframe and is none")
                    decoded.append(frame.pts)
                    if frame.is_corrupt:
                        raise Distrusted(f"a frame of packets {first} to {last} is damaged")
                    if frame.pts in frame_at:
                        yield frame_at[frame.pts], frame
        except av.FFmpegError as error:
            raise Distrusted(f"decoding from packet {first} fails: {reason_of(error)}") from error
        if decoded != np.setdiff1d(times[times >= start], skipped).tolist():
            raise Distrusted(f"packets {first} to {last} give frames at other times than theirs")


def uses_threads(stream) -> bool:
    """Whether several frames are decoded at a time."""
    return stream.codec_context.thread_count != 1


def set_threads(stream, several: bool) -> None:
    """Lets a stream that is not decoded yet use several threads, where its frames stay the same."""
    several = several and codec_name(stream) in THREADED_CODECS
    stream.thread_type = "AUTO" if several else "NONE"
    stream.codec_context.thread_count = 0 if several else 1


def _raise_for_damage(stream) -> None:
    """Makes the decoder raise an error for what it conceals otherwise, begun in the middle."""
    context = stream.codec_context
    context.options = {**context.options, "err_detect": "explode"}


def warn_of_damage(name: str, damaged: list[int], shown: bool = False) -> None:
    """Logs that frames are damaged: those decoded on the way, or, `shown`, those returned too."""
    if damaged:
        message = "%s: damaged: the decoder reports errors in %s; %sframes after them may show it"
        warn_once(name, "damaged", message, name, named(damaged), "they and " if shown else "")


def warn_once(name: str, kind: str, message: str, *arguments) -> None:
    """Logs a warning, one of a kind for a file in its state: epochs read the same file again."""
    key = kind, name, ()
    with contextlib.suppress(OSError):
        key = kind, name, file_state(name)
    if key not in _warned:
        _warned.add(key)
        logger.warning(message, *arguments)


def file_state(name: str) -> tuple[int, ...]:
    """What tells a changed file from the one it was; OSError for one that is gone."""
    file = os.stat(name)
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns


_warned: set[tuple] = set()


def named(frames: list[int], what: str = "frame", most: int = 8) -> str:
    """E.g. "frame 3" or "frames 3, 4 and 12 more"."""
    numbers = ", ".join(map(str, frames[:most]))
    more = f" and {len(frames) - most} more" if len(frames) > most else ""
    return f"{what}{'s' if len(frames) > 1 else ''} {numbers}{more}"


def _decode_run(
    container,
    stream,
    position_at: dict,
    first: int,
    last: int,
    needless: Callable = lambda packet: False,
    skipped: list | None = None,
) -> Iterator:
    """Decodes packets `first` to `last` from wherever before `first` the container now stands.

    The times of those among them that are `needless`, and not decoded, are added to `skipped`.
    """
    previous = -1
    for packet in _packets(container, stream):
        position = position_at.get(packet.pts)
        if position is None or (position > first and position != previous + 1):
            raise Distrusted(f"seeking to packet {first} gives packet {position} after {previous}")
        previous = position
        if position >= first and needless(packet):
            skipped.append(packet.pts)
        elif position >= first:
            yield from decode_packet(stream.codec_context, packet)
        if position == last:
            break
    yield from decode_packet(stream.codec_context, None)


def refused_passing(container, stream, table: Table, begin: int, known: set[int]) -> int | None:
    """The first packet that the decoder refuses and no other needs, from keyframe `begin` on.

    Those already `known` are not decoded.
    """
    import av

    position_at = {time: position for position, time in enumerate(table.pts.tolist())}
    passing, start = _passing(stream), int(table.pts[begin])
    _raise_for_damage(stream)
    if begin:
        container.seek(start, stream=stream)
    for packet in _packets(container, stream):
        position = position_at.get(packet.pts, -1)
        if position < begin or position in known:
            continue
        passes = passing(packet)
        try:
            decode_packet(stream.codec_context, packet)
        except av.FFmpegError:
            # Those shown before the keyframe lack others where decoding begins there.
            if passes and packet.pts >= start:
                return position
    return None


def _passing(stream) -> Callable:
    """Tells of packets, one after the other from a keyframe on, whether it is known of each that
    no other needs it."""
    if codec_name(stream) != "h264":
        return lambda packet: False
    passing = h264.Passing(stream.codec_context.extradata)
    return lambda packet: passing(memoryview(packet))


def decode_packet(context, packet) -> list:
    """Frames that the decoder gives for a packet, or, given None, all it still holds.

    `probe_video` and `read_video` decode by no other way, so that tests can count the frames.
    """
    return context.decode(packet)


def frames_of_packets(
    container,
    stream,
    limit: int,
    lost: list[tuple[int, str]],
    enough: Callable = lambda: False,
    strict: bool = False,
    left_out: frozenset[int] = frozenset(),
) -> Iterator:
    """Yields the frames of the first `limit` packets, in the order in which they are shown.

    Or of fewer packets, once `enough()`, and all that the decoder has taken by then. Decoding goes
    on after a packet that raises an error, whose number and reason `lost` gets, as it does of those
    `left_out`. With several threads, or `strict`, Reported is raised instead, where the decoder
    reports any damage, or gives fewer frames than it took packets, at the latest at the end. Raises
    av.FFmpegError for unusable headers.
    """
    import av

    threaded, given, fed, held = uses_threads(stream), 0, 0, []
    strict = strict or threaded
    if strict:
        _raise_for_damage(stream)
    stream.codec_context.open(strict=False)  # headers that it refuses are no packet's error
    packets = itertools.takewhile(lambda _: not enough(), _packets(container, stream))
    for packet in itertools.chain(itertools.islice(packets, limit), [None]):
        if packet is not None and fed in left_out:
            lost.append((fed, "refused by the decoder"))
            fed += 1
            continue
        try:
            frames = decode_packet(stream.codec_context, packet)
        except av.FFmpegError as error:
            if strict:
                raise Reported(f"packet {fed} or one before it: {reason_of(error)}") from error
            lost.append((fed, reason_of(error)))
            frames = []
        fed += packet is not None and not packet.is_discard
        for frame in frames:
            given += 1
            if strict and frame.is_corrupt:
                raise Reported("a frame is marked as damaged")
            held.append(frame)
            # A b picture is predicted from the frame shown after it, which may be damaged. Of one
            # thread none is held: hevc may show in it what its buffer held before.
            if not threaded or frame.pict_type != av.video.frame.PictureType.B:
                yield from held
                held.clear()
    if strict and given < fed:  # an error gets lost where a frame comes out before it
        raise Reported(f"{given} frames of {fed} packets")
    yield from held

# SPDX-License-Identifier: Apache-2.0
"""Numbers the frames of an opened stream by its packets, and decodes only what wanted frames need.

Demuxing (no decoding) gives the presentation time of every packet; sorted, these are the times of
frames 0, 1, 2... A wanted frame is decoded from the keyframe before it, without the h264 pictures
that no other is predicted from, and the decoded times must equal the table's, exactly and in order,
or the run is refused. `vivit_jax.data.decode` says what makes a table unfit and decodes from the
start instead.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

logger = logging.getLogger(__name__)

TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# In these containers each of their packets holds one shown picture. mpeg4's may hold none, or two,
# and vp8's hidden reference pictures are packets of their own.
SPARSE_CODECS = ("h264", "hevc", "vp9", "av1")
# NAL units of h264 that leave nothing behind for other pictures if their nal_ref_idc is 0: slice,
# delimiter, filler. Messages (SEI) and parameter sets may hold for the pictures that follow.
_PASSING_UNITS = (1, 9, 12)


@dataclass(frozen=True)
class Table:
    """The packets of a stream in decoding order, up to the first unreadable one."""

    pts: np.ndarray  # int64 [packets], stream time units; meaningful only if `distrust` is None
    keys: np.ndarray  # int64 [keyframes], positions in `pts`
    last_duration: int  # of the frame shown last, stream time units, 0 if unknown
    packets: int
    discarded: int
    distrust: str | None  # why the presentation times do not number the frames
    announced: int  # frames the container claims, 0 if it claims nothing
    damage: str | None  # why packets after these cannot be read
    incomplete: str | None  # that the file ends before what it announces, for a warning


class Distrusted(Exception):
    """Decoding contradicts the table."""


class Undecodable(Exception):
    """Packet number `packet`, in decoding order, or one before it, raises a decoding error."""

    def __init__(self, packet: int, reason: str):
        super().__init__(reason)
        self.packet = packet


def reason_of(error) -> str:
    """FFmpeg's words for an av error."""
    return error.strerror or type(error).__name__


def codec_name(stream) -> str:
    """The codec, whatever the decoder is called: "av1", not "libdav1d"."""
    return stream.codec_context.codec.canonical_name


def scan(container, stream) -> Table:
    """Demuxes all packets."""
    import av

    codec, pts, keys = codec_name(stream), [], []
    discarded = last_duration = 0
    latest = distrust = damage = incomplete = None
    if container.format.name not in TIMED_CONTAINERS:
        distrust = f"container {container.format.name}"
    elif codec not in SPARSE_CODECS:
        distrust = f"codec {codec}"
    try:
        for packet in _packets(container, stream):
            if packet.is_corrupt:
                damage = f"packet {len(pts)} is cut off or damaged"
                break
            if packet.is_discard:
                discarded += 1
                distrust = distrust or "packets marked to be discarded (edit list)"
            if packet.pts is None:
                distrust = distrust or "packets without presentation time"
            elif latest is None or packet.pts > latest:
                latest, last_duration = packet.pts, packet.duration or 0
            if codec == "vp9" and not _vp9_shows(memoryview(packet)):
                distrust = distrust or "vp9 packets that show no picture"
            if packet.is_keyframe:
                keys.append(len(pts))
            pts.append(packet.pts)
    except av.FFmpegError as error:
        damage = f"reading fails after packet {len(pts)}: {reason_of(error)}"
    found = f"{len(pts)} frames can be read" + (f" ({damage})" if damage else "")
    if damage or len(pts) < stream.frames:
        announced = stream.frames or "no number of"
        incomplete = f"incomplete: {announced} frames announced, {found}"
    elif not stream.frames and container.duration and latest is not None:
        end, announced = (
            float((latest + last_duration) * stream.time_base),
            container.duration / 1e6,
        )
        if end < 0.9 * announced:  # an audio stream may well be a little longer
            incomplete = "incomplete or longer in sound: "
            incomplete += f"{announced:.2f} s announced, {found}, up to {end:.2f} s"
    times = np.array(pts if distrust is None else [], dtype=np.int64)
    keys = np.array(keys, dtype=np.int64)
    distrust = distrust or damage or _disorder(times, keys)
    return Table(
        pts=times,
        keys=keys,
        last_duration=last_duration,
        packets=len(pts),
        discarded=discarded,
        distrust=distrust,
        announced=stream.frames,
        damage=damage,
        incomplete=incomplete,
    )


def _packets(container, stream) -> Iterator:
    # PyAV ends the stream with an empty packet, and avi has empty ones for "same picture again".
    return (packet for packet in container.demux(stream) if packet.size)


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

    shown, damaged = np.sort(table.pts), []
    frame_at = dict(zip(shown[wanted].tolist(), wanted.tolist(), strict=True))
    position_at = {time: position for position, time in enumerate(table.pts.tolist())}
    length_bytes = _h264_length_bytes(stream)

    def needless(packet) -> bool:
        if packet.pts in frame_at or not length_bytes:
            return False
        return _h264_passing(memoryview(packet), length_bytes)

    for first, last in _runs(table, wanted):
        times = table.pts[first : last + 1]
        start = int(times[0])
        decoded, skipped = [], []
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
                    if frame.pts in frame_at:
                        if frame.is_corrupt:
                            raise Distrusted(f"frame {frame_at[frame.pts]} is marked as damaged")
                        yield frame_at[frame.pts], frame
                    elif frame.is_corrupt:
                        damaged.append(int(np.searchsorted(shown, frame.pts)))
        except av.FFmpegError as error:
            raise Distrusted(f"decoding from packet {first} fails: {reason_of(error)}") from error
        if decoded != np.setdiff1d(times[times >= start], skipped).tolist():
            raise Distrusted(f"packets {first} to {last} give frames at other times than theirs")
    warn_of_damage(container.name.removeprefix("file:"), damaged)


def warn_of_damage(name: str, damaged: list[int]) -> None:
    """Logs that frames decoded on the way, which are not returned, are damaged."""
    if damaged:
        message = "%s: damaged: the decoder reports errors in %s; frames after them may show it"
        logger.warning(message, name, named(damaged))


def named(frames: list[int], most: int = 8) -> str:
    """E.g. "frame 3" or "frames 3, 4 and 12 more"."""
    numbers = ", ".join(map(str, frames[:most]))
    more = f" and {len(frames) - most} more" if len(frames) > most else ""
    return f"frame{'s' if len(frames) > 1 else ''} {numbers}{more}"


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


def _h264_length_bytes(stream) -> int:
    """Bytes of the length before each NAL unit of h264 packets; 0 for other packets."""
    header = stream.codec_context.extradata
    if codec_name(stream) != "h264" or not header or len(header) < 7 or header[0] != 1:
        return 0
    return (header[4] & 3) + 1


def _h264_passing(data: memoryview, length_bytes: int) -> bool:
    """Whether decoding the pictures that follow needs nothing of this packet."""
    at = 0
    while at + length_bytes < len(data):
        unit = data[at + length_bytes]
        if unit & 0x60 or unit & 0x1F not in _PASSING_UNITS:
            return False
        at += length_bytes + int.from_bytes(data[at : at + length_bytes], "big")
    return at == len(data) > 0


def decode_packet(context, packet) -> list:
    """Frames that the decoder gives for a packet, or, given None, all it still holds.

    `probe_video` and `read_video` decode by no other way, so that tests can count the frames.
    """
    return context.decode(packet)


def first_packets(container, stream, limit: int) -> Iterator:
    """Yields the frames of the first `limit` packets; raises Undecodable at a decoding error."""
    import av

    number = 0
    try:
        for number, packet in enumerate(_packets(container, stream)):
            if number == limit:
                break
            yield from decode_packet(stream.codec_context, packet)
        yield from decode_packet(stream.codec_context, None)
    except av.FFmpegError as error:
        raise Undecodable(number, reason_of(error)) from error

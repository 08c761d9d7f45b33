# SPDX-License-Identifier: Apache-2.0
"""Numbers the frames of an opened stream by its packets.

Demuxing, without decoding, gives the presentation time of every packet; sorted, these are the times
of frames 0, 1, 2... `vivit_jax.data.video.decode` lists the cases in which they cannot be trusted.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64

from vivit_jax.data.video.log import named

MOV = "mov,mp4,m4a,3gp,3g2,mj2"
TIMED_CONTAINERS = (MOV, "matroska,webm")
# In TIMED_CONTAINERS each packet of these codecs holds one shown picture. An mpeg4 packet may hold
# none or two, and vp8's hidden reference pictures have packets of their own.
SPARSE_CODECS = ("h264", "hevc", "vp9", "av1")
INDEXED_CODECS = ("h264", "hevc", "av1")  # those whose packets `scan` does not look into
# Containers that lose bytes in transit and join streams: a packet marked as damaged lacks some, and
# decoding continues after it, as in FFmpeg. Elsewhere a damaged last packet is dropped.
LOSSY_CONTAINERS = ("mpegts", "mpeg")
# Containers whose duration is stated, not estimated.
_STATED_DURATION = (*TIMED_CONTAINERS, "flv")


@dataclass(frozen=True)
class Table:
    """The packets of a stream in decoding order, up to where reading fails or the file ends."""

    pts: Int64[np.ndarray, " packets"]  # stream time units; empty unless `distrust` is None
    stored: Int64[np.ndarray, " times"]  # ascending decoding times, only of avi, which has no other
    keys: Int64[np.ndarray, " keyframes"]  # positions in `pts`
    last_duration: int  # of the frame shown last, stream time units, 0 if unknown
    packets: int
    discarded: int
    distrust: str | None  # why the presentation times do not number the frames
    announced: int  # packets that the container claims, 0 if it claims nothing
    lossy: bool  # whether the container is one of LOSSY_CONTAINERS
    damage: str | None  # why later packets cannot be read
    flaws: str | None  # where packets lack bytes, for a warning
    incomplete: str | None  # how much less the file holds than it announces, for a warning


def reason_of(error) -> str:
    """FFmpeg's text of an av error."""
    return error.strerror or type(error).__name__


def codec_name(stream) -> str:
    """The codec's name, not the decoder's: "av1", not "libdav1d"."""
    return stream.codec_context.codec.canonical_name


def videos_of(container) -> list:
    """The video streams of a container except cover pictures."""
    from av.stream import Disposition

    attached = Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & attached]


def scan(container, stream) -> Table:
    """Demuxes all packets."""
    from av.error import FFmpegError

    codec, form = codec_name(stream), container.format.name
    pts, dts, keys, flagged = [], [], [], []
    discarded = last_duration = 0
    latest = distrust = damage = None
    if form not in TIMED_CONTAINERS:
        distrust = f"container {form}"
    elif codec not in SPARSE_CODECS:
        distrust = f"codec {codec}"
    try:
        for packet in packets_of(container, stream):
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
    except FFmpegError as error:
        damage = f"reading fails after packet {len(pts)}: {reason_of(error)}"
    while form not in LOSSY_CONTAINERS and flagged and flagged[-1] == len(pts) - 1:
        damage = f"packet {flagged.pop()} is cut off or damaged"
        del pts[-1], dts[-1]
    if flagged:
        distrust = distrust or "packets marked as damaged"
    stored = np.array(sorted(dts) if form == "avi" and None not in dts else [], dtype=np.int64)
    # avi counts ticks: one that repeats the picture before it may have no packet.
    ticks = int(stored[-1]) + least_step(stored) if len(stored) else len(pts)
    announced = len(pts) if ticks >= stream.frames > len(pts) else stream.frames
    times = np.array(pts if distrust is None else [], dtype=np.int64)
    keys = np.array([key for key in keys if key < len(pts)], dtype=np.int64)
    end = None if latest is None else latest + last_duration
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
        incomplete=_incomplete(container, stream, len(pts), announced, damage, end),
    )


def least_step(times: Int[np.ndarray, " n"]) -> int:
    """The smallest distance between neighbours in ascending times, 1 if there is none."""
    steps = np.diff(times)
    return int(steps[steps > 0].min()) if (steps > 0).any() else 1


def _flaws(flagged: list[int], packets: int) -> str | None:
    if not flagged:
        return None
    places = named(flagged, "packet")
    return f"bytes are missing, or another stream was joined on, at {places} of {packets}"


def _incomplete(
    container, stream, packets: int, announced: int, damage: str | None, end: int | None
) -> str | None:
    """Says so if a file ends before what it announces; its frames end at time `end`."""
    found = f"{packets} frames can be read" + (f" ({damage})" if damage else "")
    if damage or packets < announced:
        return f"incomplete: {stream.frames or 'no number of'} frames announced, {found}"
    if stream.frames or not container.duration or end is None:
        return None
    # The duration is that of the longest of several videos.
    if container.format.name not in _STATED_DURATION or len(videos_of(container)) > 1:
        return None
    seconds, length = float(end * stream.time_base), container.duration / 1e6
    if seconds >= 0.9 * length:  # an audio stream is often a little longer
        return None
    return (
        f"incomplete or longer in sound: {length:.2f} s announced, {found}, up to {seconds:.2f} s"
    )


def packets_of(container, stream) -> Iterator:
    """The stream's packets that hold data."""
    # PyAV ends the stream with an empty packet, and avi has empty ones for "same picture again".
    # PyAV 18 may raise IndexError here for streams that appeared after opening.
    with contextlib.suppress(IndexError):
        yield from (packet for packet in container.demux(stream) if packet.size)


def _vp9_shows(data: memoryview) -> bool:
    """Whether a vp9 packet shows a picture. If one does not, the packets cannot be numbered.

    Without these bits vp9 would be decoded from the start. Measured on 2026-11-30, one core of an
    AMD EPYC: reads of 16 frames at 150 random places of a 10 s clip, 320x240. With a keyframe every
    128 frames (libvpx's default) the median read takes 57 ms of processor time, and 88 ms from the
    start; with the first frame as the only keyframe 84 and 89 ms.
    """
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


def _run_starts(
    pts: Int64[np.ndarray, " packets"],
    keys: Int64[np.ndarray, " keyframes"],
    positions: Int[np.ndarray, " n"],
) -> Int64[np.ndarray, " n"]:
    """For packets at `positions`, the position of the latest keyframe that is shown no later.

    A picture stored after a keyframe and shown before it (open GOP) needs the previous keyframe.
    """
    return keys[np.searchsorted(pts[keys], pts[positions], side="right") - 1]


def count_needed(table: Table, wanted: Int[np.ndarray, " n"]) -> int:
    """How many packets have to be decoded, at most, for the ascending frames `wanted`."""
    return sum(last - first + 1 for first, last in runs_of(table, wanted))


def divided(table: Table, wanted: Int[np.ndarray, " n"], parts: int) -> list[Int[np.ndarray, " _"]]:
    """Divides the ascending frames `wanted` into at most `parts` parts of similar decoding work.

    Frames decoded from the same keyframe stay together, so only open GOPs are decoded twice.
    """
    positions = np.argsort(table.pts)[wanted]
    starts = _run_starts(table.pts, table.keys, positions)
    firsts = np.flatnonzero(np.diff(starts, prepend=-1))  # of `wanted`, at each new keyframe
    needed = [count_needed(table, part) for part in np.split(wanted, firsts[1:])]
    behind = np.cumsum([0, *needed[:-1]])
    part_of = behind * parts // max(sum(needed), 1)
    return np.split(wanted, firsts[np.flatnonzero(np.diff(part_of)) + 1])


def runs_of(table: Table, wanted: Int[np.ndarray, " n"]) -> list[list[int]]:
    """Inclusive [first, last] ranges of packets to decode for the ascending frames `wanted`."""
    positions = np.argsort(table.pts)[wanted]
    runs: list[list[int]] = []
    for first, last in zip(_run_starts(table.pts, table.keys, positions), positions, strict=True):
        if runs and first <= runs[-1][1] + 1:
            runs[-1][1] = max(runs[-1][1], int(last))
        else:
            runs.append([int(first), int(last)])
    return runs

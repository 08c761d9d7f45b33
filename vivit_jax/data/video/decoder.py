# SPDX-License-Identifier: Apache-2.0
"""Decodes the packets of an opened stream: those that wanted frames need, or all from the start.

A wanted frame is decoded from the keyframe before it, without the h264 pictures that no other is
predicted from. The decoded times must equal the table's, exactly and in order, or the run is
refused.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int

from vivit_jax.data.video import h264
from vivit_jax.data.video.packets import Table, codec_name, packets_of, reason_of, runs_of

# Codecs whose decoders, with frame threads, give the frames of one thread or report damage. Frames
# of damaged hevc, vp8, ffv1, mpeg1video and others differ from call to call without a report, and
# those of h264 and mpeg4 may leave another thread before they are marked as damaged.
THREADED_CODECS = ("vp9", "av1", "prores")
# Up to this many packets frame threads gain nothing.
FEW_PACKETS = 8


class Distrusted(Exception):
    """Decoding contradicts the table."""


class Reported(Exception):
    """A decoder reports damage, but was to give undamaged frames or none."""


def set_threads(stream, several: bool) -> None:
    """Sets the threads of a stream that is not decoded yet; several only if its frames allow."""
    several = several and codec_name(stream) in THREADED_CODECS
    stream.thread_type = "AUTO" if several else "NONE"
    stream.codec_context.thread_count = 0 if several else 1


def uses_threads(stream) -> bool:
    """Whether several frames are decoded at a time."""
    return stream.codec_context.thread_count != 1


def decode_packet(context, packet) -> list:
    """Frames that the decoder gives for a packet, or, given None, all that it still holds.

    `probe_video` and `read_video` decode only through this function, so tests can count frames.
    """
    return context.decode(packet)


def sparse_frames(
    container, stream, table: Table, wanted: Int[np.ndarray, " n"]
) -> Iterator[tuple]:
    """Yields (k, frame) for the ascending frames `wanted`; Distrusted makes all of them void."""
    from av.error import FFmpegError

    shown = np.sort(table.pts)
    frame_at = dict(zip(shown[wanted].tolist(), wanted.tolist(), strict=True))
    position_at = {time: position for position, time in enumerate(table.pts.tolist())}
    runs = runs_of(table, wanted)
    # Where decoding begins at the keyframe of an open GOP, the pictures before it lack their
    # references: h264's decoder would raise for them, hevc's leaves them out.
    if codec_name(stream) != "h264" or all(
        (table.pts[a : b + 1] >= table.pts[a]).all() for a, b in runs
    ):
        _raise_for_damage(stream)
    for first, last in runs:
        times = table.pts[first : last + 1]
        start = int(times[0])
        decoded, skipped, passing = [], [], _passing(stream)

        def needless(packet, passing=passing, skipped=skipped) -> bool:
            skip = passing(packet) and packet.pts not in frame_at
            if skip:
                skipped.append(packet.pts)
            return skip

        try:
            container.seek(start, stream=stream)
            for frame in _decode_run(container, stream, position_at, first, last, needless):
                # Frames shown before the keyframe lack their references, and are not wanted here.
                if frame.pts is None or frame.pts >= start:
                    if not decoded and not frame.key_frame:
                        raise Distrusted(f"packet {first} is marked as a keyframe and is none")
                    decoded.append(frame.pts)
                    if frame.is_corrupt:
                        raise Distrusted(f"a frame of packets {first} to {last} is damaged")
                    if frame.pts in frame_at:
                        yield frame_at[frame.pts], frame
        except FFmpegError as error:
            raise Distrusted(f"decoding from packet {first} fails: {reason_of(error)}") from error
        if decoded != np.setdiff1d(times[times >= start], skipped).tolist():
            raise Distrusted(f"packets {first} to {last} give frames at other times than theirs")


def _decode_run(
    container,
    stream,
    position_at: dict[int, int],
    first: int,
    last: int,
    needless: Callable[..., bool] = lambda packet: False,
) -> Iterator:
    """Decodes packets `first` to `last`, except `needless` ones, from a container before them."""
    previous = -1
    for packet in packets_of(container, stream):
        position = position_at.get(packet.pts)
        if position is None or (position > first and position != previous + 1):
            raise Distrusted(f"seeking to packet {first} gives packet {position} after {previous}")
        previous = position
        if position >= first and not needless(packet):
            yield from decode_packet(stream.codec_context, packet)
        if position == last:
            break
    yield from decode_packet(stream.codec_context, None)


def _passing(stream) -> Callable[..., bool]:
    """A function of the packets from a keyframe on, in order: whether no other is known to need it.

    It returns False if that is unknown.
    """
    if codec_name(stream) != "h264":
        return lambda packet: False
    passing = h264.Passing(stream.codec_context.extradata)
    return lambda packet: passing(memoryview(packet))


def _raise_for_damage(stream) -> None:
    """Makes the decoder raise errors that it would conceal."""
    context = stream.codec_context
    context.options = {**context.options, "err_detect": "explode"}


def refused_passing(container, stream, table: Table, begin: int, known: set[int]) -> int | None:
    """The first packet from keyframe `begin` on that the decoder refuses and no other needs.

    Packets already `known` are not decoded.
    """
    from av.error import FFmpegError

    position_at = {time: position for position, time in enumerate(table.pts.tolist())}
    passing, start = _passing(stream), int(table.pts[begin])
    _raise_for_damage(stream)
    if begin:
        container.seek(start, stream=stream)
    for packet in packets_of(container, stream):
        position = position_at.get(packet.pts, -1)
        if position < begin or position in known:
            continue
        passes = passing(packet)
        try:
            decode_packet(stream.codec_context, packet)
        except FFmpegError:
            # Frames shown before the keyframe lack references if decoding begins there.
            if passes and packet.pts >= start:
                return position
    return None


def frames_of_packets(
    container,
    stream,
    limit: int,
    lost: list[tuple[int, str]],
    enough: Callable[[], bool] = lambda: False,
    strict: bool = False,
    left_out: frozenset[int] = frozenset(),
) -> Iterator:
    """Yields the frames of the first `limit` packets, in the order in which they are shown.

    Stops early once `enough()`, after the frames that the decoder holds by then. Decoding continues
    after a packet that raises an error; `lost` gets its number and reason, as it does for packets
    `left_out`. With several threads, or if `strict`, Reported is raised instead as soon as the
    decoder reports any damage, and at the end if it gave fewer frames than it took packets. Raises
    av's FFmpegError for unusable headers.
    """
    from av.error import FFmpegError
    from av.video.frame import PictureType

    threaded, given, fed, held = uses_threads(stream), 0, 0, []
    strict = strict or threaded
    if strict:
        _raise_for_damage(stream)
    stream.codec_context.open(strict=False)  # errors in headers belong to no packet
    packets = itertools.takewhile(lambda _: not enough(), packets_of(container, stream))
    for packet in itertools.chain(itertools.islice(packets, limit), [None]):
        if packet is not None and fed in left_out:
            lost.append((fed, "refused by the decoder"))
            fed += 1
            continue
        try:
            frames = decode_packet(stream.codec_context, packet)
        except FFmpegError as error:
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
            # A B-frame is predicted from the frame shown after it, which may be damaged. A single
            # thread holds none: hevc may show in it what its buffer held before.
            if not threaded or frame.pict_type != PictureType.B:
                yield from held
                held.clear()
    if strict and given < fed:  # an error is lost if a frame is given before it
        raise Reported(f"{given} frames of {fed} packets")
    yield from held

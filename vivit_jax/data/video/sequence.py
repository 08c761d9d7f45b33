# SPDX-License-Identifier: Apache-2.0
"""Decodes frames of a file by number, a few or all from the start, and refuses damaged ones.

`vivit_jax.data.video.decode` says how frames are numbered.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

from vivit_jax.data.video.clock import Clock
from vivit_jax.data.video.decoder import (
    FEW_PACKETS,
    Distrusted,
    Reported,
    frames_of_packets,
    refused_passing,
    sparse_frames,
)
from vivit_jax.data.video.log import file_state, named, warn_of_damage, warn_once
from vivit_jax.data.video.opened import open_video, scanned
from vivit_jax.data.video.packets import Table, count_needed, divided
from vivit_jax.errors import VideoError, counted

logger = logging.getLogger(__name__)

# For fewer packets, opening the file again takes longer than decoding them.
_PACKETS_OF_A_THREAD = 32

Frame = TypeVar("Frame")  # what `convert` makes of a decoded frame


def decode_sparse(
    name: str, table: Table, wanted: Int[np.ndarray, " n"], convert: Callable[[Any], Frame]
) -> dict[int, Frame]:
    """The ascending frames `wanted`, converted, by number; empty if decoding contradicts the table.

    Frames that begin at different keyframes are decoded at the same time, by one thread each:
    unlike a decoder's own threads, these cannot change how damage shows.
    """
    needed = count_needed(table, wanted)
    parts = divided(table, wanted, min(usable_cores(), 1 + needed // _PACKETS_OF_A_THREAD))

    def decoded(part: np.ndarray) -> dict[int, Frame]:
        several_threads = len(parts) == 1 and needed > FEW_PACKETS
        with open_video(name, several_threads) as (container, stream):
            found = sparse_frames(container, stream, table, part)
            return {k: convert(frame) for k, frame in found}

    try:
        if len(parts) == 1:
            return decoded(wanted)
        with ThreadPoolExecutor(len(parts), "decode") as pool:
            found = list(pool.map(decoded, parts))
    except Distrusted as reason:
        logger.debug("%s: decoding from the start: %s", name, reason)
        return {}
    return {k: image for part in found for k, image in part.items()}


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Run(Generic[Frame]):
    """Frames decoded from the start."""

    frames: dict[int, Frame] = field(default_factory=dict)  # the wanted ones, converted, by number
    seconds: list[float] = field(default_factory=list)  # of all frames
    damaged: list[int] = field(default_factory=list)  # frames in which the decoder reports errors
    filled: list[int] = field(default_factory=list)  # frames that repeat another
    cut: bool = False  # whether undecodable packets make it shorter
    duration: float = float("nan")

    @property
    def total(self) -> int:
        return len(self.seconds)


class FromStart:
    """The frames of a file, numbered, decoded from its start, up to number `last`.

    Yields (number, frame, seconds from frame 0). With a trusted table the packets' times give the
    numbers, and an undecodable frame repeats the one before it (at the beginning, the one after)
    and is listed in `filled`; otherwise frames are counted as they come. If damage is reported by
    several threads, or with a trusted table, the numbers start again at 0: a single thread decodes
    everything anew, and the frames given before come again unchanged. Only the decoder's frames are
    held.

    With a trusted table, that second decoding leaves out a refused packet that no other needs: the
    decoder might give other frames after seeing it, and seeking does not decode it either.

    At the end `cut` says whether undecodable packets made it shorter; losses are logged. Raises
    VideoError for a file without frames.
    """

    def __init__(self, name: str, table: Table, last: int | None = None):
        self.last = math.inf if last is None else last
        self.name, self.table, self.filled = name, table, []
        self.cut, self.end = False, float("nan")

    def __iter__(self) -> Iterator[tuple]:
        trusted = self.table.distrust is None
        try:
            several_threads = self.table.packets > FEW_PACKETS
            yield from self._decoded(several_threads, strict=trusted)
        except Reported as reason:
            logger.debug("%s: decoding again, by one thread: %s", self.name, reason)
            left_out = _refused(self.name, file_state(self.name)) if trusted else frozenset()
            yield from self._decoded(False, strict=False, left_out=left_out)

    def _decoded(
        self, several_threads: bool, strict: bool, left_out: frozenset[int] = frozenset()
    ) -> Iterator[tuple]:
        table, lost, filled, done, decoded = self.table, [], [], 0, 0
        self.filled = filled
        number_of = clock = frame = None
        if table.distrust is None:
            number_of = {int(time): k for k, time in enumerate(np.sort(table.pts))}
        try:
            with open_video(self.name, several_threads) as (container, stream):
                clock = Clock(table, stream)
                new_frames = frames_of_packets(
                    container,
                    stream,
                    table.packets,
                    lost,
                    lambda: done > self.last,
                    strict,
                    left_out,
                )
                for new in new_frames:
                    number = done if number_of is None else number_of.get(new.pts, -1)
                    if done > self.last or number < done:
                        continue  # not wanted, or a second picture at one time
                    decoded += 1
                    frame = frame or new
                    for k in range(done, number):
                        filled.append(k)
                        yield k, frame, clock.seconds(k, frame)
                    frame, done = new, number + 1
                    yield number, frame, clock.seconds(number, frame, len(lost))
                if frame is None:
                    raise VideoError(
                        f"{self.name}: none of its frames can be decoded: get the file again"
                    )
                stopped = done > self.last
                for k in range(done, table.packets if number_of and not stopped else 0):
                    filled.append(k)
                    yield k, frame, clock.seconds(k, frame)
            self.end, self.cut = clock.end(), bool(lost) and number_of is None
            self._report(None if stopped else decoded, lost, clock)
        except GeneratorExit:
            self._report(None, lost, clock)
            raise

    def _report(
        self, decoded: int | None, lost: list[tuple[int, str]], clock: Clock | None
    ) -> None:
        """Logs what is lost; `decoded` is None if decoding stopped early."""
        filled, expected = self.filled, self.table.packets - self.table.discarded
        if clock and clock.joins:
            message = "%s: times go back or leap at %s: taken for streams that were joined there"
            warn_once(self.name, "joins", message, self.name, named(clock.joins))
        if not lost and not filled and (decoded is None or decoded >= expected):
            return
        causes = ", ".join(f"packet {packet}: {reason}" for packet, reason in lost[:3])
        causes += f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        found = "damaged" if decoded is None else f"{counted(decoded, 'frame')} can be decoded"
        found += f" from {counted(expected, 'packet')}" if decoded is not None else ""
        repeats = "repeats the one" if len(filled) == 1 else "repeat the ones"
        fills = f"; {named(filled)} {repeats} before" if filled else ""
        why = causes or "packets without a picture"
        warn_once(self.name, "lost", "%s: %s (%s)%s", self.name, found, why, fills)


@functools.lru_cache(maxsize=64)
def _refused(name: str, state: tuple) -> frozenset[int]:
    """Packets that the decoder refuses and no other needs, in a file whose table is trusted.

    Each is found by decoding without the ones before it, which may cause further refusals.
    """
    table, found, begin = scanned(name, state), set(), 0
    while True:
        with open_video(name, several_threads=False) as (container, stream):
            refused = refused_passing(container, stream, table, begin, found)
        if refused is None:
            return frozenset(found)
        found.add(refused)
        begin = int(table.keys[table.keys <= refused][-1])


def decode_from_start(
    name: str,
    table: Table,
    convert: Callable[[Any], Frame],
    wanted: set[int],
    last: int | None = None,
) -> Run[Frame]:
    """Decodes up to frame `last`, or all."""
    if table.distrust:
        logger.debug("%s: decoding from the start: %s", name, table.distrust)
    run: Run[Frame] = Run()
    decoding = FromStart(name, table, last)
    for k, frame, seconds in decoding:
        if k == 0:
            run = Run()
        if frame.is_corrupt:
            run.damaged.append(k)
        if k in wanted:
            run.frames[k] = convert(frame)
        run.seconds.append(seconds)
    run.cut, run.duration, run.filled = decoding.cut, decoding.end, decoding.filled
    return run


def refuse_damaged(name: str, damaged: list[int], wanted, lossy: bool = False) -> None:
    """VideoError if a wanted frame is damaged, a warning if another is.

    In a `lossy` container a warning for all: players of such streams show damaged frames.
    """
    refused = sorted(set(damaged) & {int(k) for k in wanted})
    if refused and not lossy:
        raise VideoError(
            f"{name}: the decoder reports damage in {named(refused)} of those asked: ask for other "
            "frames, get the file again, or accept the damage by re-encoding it: "
            "ffmpeg -i IN -c:v libx264 OUT.mp4"
        )
    warn_of_damage(name, damaged, returned=bool(refused))


def refuse_lost(name: str, filled: list[int], wanted, share: float) -> None:
    """VideoError if more than `share` of the wanted frames cannot be decoded."""
    asked = {int(k) for k in wanted}
    repeats = sorted(asked & set(filled))
    if len(repeats) > len(asked) * share:
        raise VideoError(
            f"{name}: {len(repeats)} of the {counted(len(asked), 'frame')} asked cannot be decoded "
            f"({named(repeats)}): ask for other frames, or get the file again"
        )


def shortage(table: Table, total: int, cut: bool) -> str:
    """The end of the message about too few frames, if damage is the cause; else empty."""
    expected = max(table.announced, table.packets) - table.discarded
    if not (cut or table.damage or table.packets < table.announced) or expected < total:
        return ""
    announces = f"announces {expected} frames, " if expected > total else ""
    return (
        f" (the file {announces or 'ends early: '}decoding stops after {total}: it is damaged or "
        "truncated, get it again)"
    )

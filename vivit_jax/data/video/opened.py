# SPDX-License-Identifier: Apache-2.0
"""Opens video files: refuses unreadable ones, picks the stream, and scans its packets."""

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from fractions import Fraction

from vivit_jax.data.video.boxes import media_of
from vivit_jax.data.video.decoder import set_threads
from vivit_jax.data.video.formats import EXPECTED, open_container
from vivit_jax.data.video.log import file_state, warn_once
from vivit_jax.data.video.packets import (
    INDEXED_CODECS,
    LOSSY_CONTAINERS,
    MOV,
    SPARSE_CODECS,
    TIMED_CONTAINERS,
    Table,
    codec_name,
    reason_of,
    scan,
    videos_of,
)
from vivit_jax.errors import UserError, VideoError
from vivit_jax.files.addresses import address_text
from vivit_jax.files.inputs import stand_in
from vivit_jax.files.parts import in_ranges
from vivit_jax.files.ranges import RangeFile
from vivit_jax.files.reading import opened, size_of


def checked_path(path) -> str:
    """The name of a file that exists and is not empty; else VideoError or UserError."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise UserError(
            f"path is {path!r} ({type(path).__name__}); expected the path of a video file "
            "(str, bytes or os.PathLike), not an open file or its content"
        )
    name = os.fsdecode(path)
    if in_ranges(name):
        return _checked_address(address_text(name))
    if os.path.isdir(name):
        found = "a directory"
    elif special := stand_in(name):
        found = special
    elif not os.path.exists(name):
        found = "no such file"
    elif not os.path.isfile(name):
        found = "not a regular file"
    elif os.path.getsize(name) == 0:
        found = "an empty file (0 bytes)"
    else:
        return name
    raise VideoError(f"{name}: {found}; {EXPECTED}")


def _checked_address(name: str) -> str:
    try:
        size = size_of(name)
    except OSError as error:
        raise VideoError(f"{name}: {error.strerror}; {EXPECTED}") from None
    if not size:
        raise VideoError(f"{name}: an empty file (0 bytes); {EXPECTED}")
    return name


@contextlib.contextmanager
def open_video(
    name: str, several_threads: bool = True, file: RangeFile | None = None
) -> Iterator[tuple]:
    """(container, its video stream). Raises VideoError for a file that FFmpeg refuses.

    `file` is the open file of an address.
    """
    from av.codec.context import Flags
    from av.error import FFmpegError

    try:
        with _opened(name, file) as container:
            stream = video_stream(name, container)
            set_threads(stream, several_threads)
            if container.format.name in LOSSY_CONTAINERS and codec_name(stream) == "hevc":
                # Unlike others, its decoder withholds frames that refer to lost pictures.
                stream.codec_context.flags |= Flags.output_corrupt
            yield container, stream
    except FFmpegError as error:
        if _is_page(name):
            raise VideoError(
                f"{name}: a web page, not a video: a link has to lead to the file itself, and web "
                f"servers list no folders; {EXPECTED}"
            ) from error
        raise VideoError(
            f"{name}: no readable video ({reason_of(error)}): damaged, cut off, or another kind of "
            f"file; {EXPECTED}"
        ) from error


def _is_page(name: str) -> bool:
    """Whether a file is HTML, as a server answers for a page about a video, or for a folder."""
    try:
        with opened(name) as file:
            begins = file.read(512).lstrip().lower()
    except OSError:
        return False
    return begins.startswith((b"<!doctype html", b"<html"))


def packet_table(name: str) -> Table:
    """The packets of a file; logs a warning if it is shorter than it announces.

    A long video has many, and the same file is often read again: for its properties, a clip, the
    next clip. So tables are cached while the file is unchanged.
    """
    table = scanned(name, file_state(name))
    if table.incomplete:
        warn_once(name, "incomplete", "%s: %s", name, table.incomplete)
    if table.flaws:
        warn_once(name, "flaws", "%s: %s", name, table.flaws)
    return table


@functools.lru_cache(maxsize=64)  # about a megabyte for an hour of video
def scanned(name: str, state: tuple) -> Table:
    """The packets of a file; `state` is part of the cache's key, so a changed file is scanned."""
    if not in_ranges(name):
        with open_video(name) as (container, stream):
            return scan(container, stream)
    with RangeFile(name) as file, open_video(name, file=file) as (container, stream):
        if container.format.name == MOV and codec_name(stream) in INDEXED_CODECS:
            with contextlib.closing(RangeFile(name)) as boxes:
                file.blank(media_of(io.BufferedReader(boxes)))
        return scan(container, stream)


def _opened(name: str, file: RangeFile | None):
    """The container, without FFmpeg's parsers if its packets number the frames.

    The parsers look into every packet for what these containers state themselves.
    """
    from av.error import FFmpegError

    with contextlib.suppress(FFmpegError):
        container = open_container(name, {"fflags": "noparse"}, file)
        codecs = [s.codec_context and codec_name(s) for s in container.streams.video]
        if container.format.name in TIMED_CONTAINERS and set(codecs) <= set(SPARSE_CODECS):
            return container
        container.close()
    return open_container(name, file=file)


def video_stream(name: str, container):
    """The video stream that is read: the default one, else the largest; logs a choice of several.

    Raises VideoError if there is none, or none that can be decoded.
    """
    from av.stream import Disposition

    videos = videos_of(container)
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "no"
        cover = " (the video stream is a cover picture)" if container.streams.video else ""
        raise VideoError(f"{name}: holds {kinds} streams but no video{cover}; {EXPECTED}")

    def rank(stream) -> tuple[bool, bool, int]:
        default, context = bool(stream.disposition & Disposition.default), stream.codec_context
        return context is not None, default, context.width * context.height if context else 0

    stream = max(videos, key=rank)  # the first of equals
    if len(videos) > 1:
        kinds = [
            f"stream {s.index} ({s.codec_context.width}x{s.codec_context.height}"
            f"{', default' if s.disposition & Disposition.default else ''})"
            if s.codec_context
            else f"stream {s.index} (no decoder)"
            for s in (stream, *(s for s in videos if s is not stream))
        ]
        message = "%s: %d video streams: reading %s, not %s"
        warn_once(name, "streams", message, name, len(videos), kinds[0], ", ".join(kinds[1:]))
    if stream.codec_context is None:
        raise VideoError(f"{name}: no decoder for its video stream; {EXPECTED}")
    return stream


def pixel_aspect(stream) -> Fraction:
    """A stored pixel's width over its height, 1 if unknown."""
    stated = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    return Fraction(stated.numerator, stated.denominator) if stated else Fraction(1)

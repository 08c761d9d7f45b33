# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax pack`: many clips in a few large shards."""

import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from vivit_jax.cli.options import SourceOptions
from vivit_jax.console import FLAT, PlaceOption, stopped_by
from vivit_jax.data.datasets.packs import Manifest
from vivit_jax.data.packing.pack import Container, Packing, pack
from vivit_jax.data.settings import MOST_READERS
from vivit_jax.data.video.sequence import usable_cores
from vivit_jax.data.video.transcode import check_short_side
from vivit_jax.errors import UserError, counted, printable, quoted
from vivit_jax.files.addresses import Place
from vivit_jax.files.parts import SHARDS
from vivit_jax.progress import live_line

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LEAST = 2**20  # bytes of a shard
_NAMED = 3  # clips that could not be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipOptions(SourceOptions):
    """The clips to pack.

    Attributes:
        labels: Labels in each line of a list. Default: as many as it has; 0 packs none.
    """

    labels: int | None = None


def pack_command(
    data: Annotated[PlaceOption, tyro.conf.Positional],
    out: Annotated[PlaceOption, tyro.conf.Positional],
    /,
    *,
    source: Annotated[ClipOptions, FLAT] = ClipOptions(),
    shard_size: str = "256MiB",
    resize: int | None = None,
    format: Container = "tar",
    threads: int | None = None,
    max_bad_share: float = 0.05,
) -> int:
    """Write the clips of a data set to a few large files, for storage.

    The shards are tar files as WebDataset has them, with a list of the place of each clip beside
    them, so that any clip is read without the others, in the order of the seed as before. Clips
    are the files as they are, or with --resize smaller videos. Commands that read
    clips take the directory, or shards of it such as 'gs://b/k400/k400-{000000..000099}.tar'. A
    pack that was interrupted goes on when the same command runs again, and one that is complete is
    checked; check-data --checksums compares single clips.

    Args:
        data: A list file with a path and a label in each line, a directory with a folder for each
            class, or a directory of clips.
        out: Directory of the shards; here, or at gs:// or s3://.
        shard_size: Bytes of a shard, such as 256MiB or 1GB; a larger clip gets one to itself.
        resize: Pixels of the short side to which larger videos are encoded again (H.264, a keyframe
            every 32 frames). Arrays and folders of pictures stay as they are.
        format: Kind of the shards. ArrayRecord's hold the clips alone, and their labels are in the
            index.
        threads: Threads that read and encode clips. Default: one for each core.
        max_bad_share: Share of clips that cannot be read, of the first 20 or more, that is an
            error. Fewer are left out and named.
    """
    how = Packing(
        shard_bytes=parse_size(shard_size),
        resize=resize,
        container=format,
        threads=usable_cores() if threads is None else threads,
        max_bad_share=max_bad_share,
    )
    if resize is not None:
        check_short_side(resize, "--resize")
    if not 1 <= how.threads <= MOST_READERS:
        raise UserError(f"--threads is {threads}; expected 1 to {MOST_READERS}")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"--max-bad-share is {max_bad_share:g}; expected a share from 0 to 1")
    _check_apart(data, out)
    if out.name.lower().endswith(SHARDS):  # readers would take it for a shard
        raise UserError(f"OUT {out} ends in {out.suffix}; expected the name of a directory")
    dataset = source.listed(data, source.labels)
    try:
        with live_line("clips") as progress, _clean_when_terminated():
            manifest = pack(dataset, out, how, progress)
    except KeyboardInterrupt as stop:
        print("finished shards are kept; the same command goes on with the next", file=sys.stderr)
        if isinstance(stop, _Terminated):
            return stopped_by(signal.Signals(stop.args[0]).name)
        raise
    _report(manifest, out)
    return 0


class _Terminated(KeyboardInterrupt):
    """A signal that asks the process to end came; its number."""


@contextlib.contextmanager
def _clean_when_terminated() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: they would leave half a shard."""

    def end(number: int, frame: object) -> None:
        raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    names = ("SIGTERM", "SIGHUP") if os.name != "nt" else ("SIGTERM",)
    before = {name: signal.signal(signal.Signals[name], end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)


def parse_size(text: str) -> int:
    """A number of bytes such as 256MiB. Raises UserError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or (size := int(float(found[1]) * unit)) < _LEAST:
        raise UserError(
            f"--shard-size is {quoted(text)}; expected bytes, such as 256MiB or 1GB, at least 1MiB"
        )
    return size


def _check_apart(data: Place, out: Place) -> None:
    """UserError if the shards would lie among the clips, where they would be taken for some."""
    if isinstance(data, Path) and isinstance(out, Path):
        inner, outer = Path(os.path.realpath(out)), Path(os.path.realpath(data))
    else:
        inner, outer = Path(str(out)), Path(str(data))
    if inner.is_relative_to(outer):
        raise UserError(f"OUT {out} lies in DATA {data}; choose a directory outside it")


def _report(manifest: Manifest, out: Place) -> None:
    size = sum(shard.bytes for shard in manifest.shards)
    for name, why in list(manifest.left_out.items())[:_NAMED]:
        print(printable(f"left out: {why if name in why else f'{name}: {why}'}"), file=sys.stderr)
    more = len(manifest.left_out) - _NAMED
    if more > 0:
        print(f"left out: {more} more, which {out}/manifest.json names", file=sys.stderr)
    shards, clips = len(manifest.shards), manifest.clips
    print(
        printable(
            f"{out}: {counted(clips, 'clip')} in {counted(shards, 'shard')}, {size / 1e6:,.1f} MB"
        )
    )

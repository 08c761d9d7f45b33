# SPDX-License-Identifier: Apache-2.0
"""Packs a data set: shard after shard, so that a pack which was interrupted goes on.

Beside each finished shard lies a file SHARD.json with the places of its clips, until the index of
all of them and the manifest are written.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from vivit_jax.data.datasets.check import Progress
from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.data.datasets.packs import (
    INDEX,
    MANIFEST,
    Index,
    Manifest,
    Shard,
    read_index,
    read_manifest,
)
from vivit_jax.data.packing.array_shard import ArrayShard
from vivit_jax.data.packing.members import Member, members
from vivit_jax.data.packing.tar_shard import ChangedError, TarShard
from vivit_jax.data.settings import FEW_CLIPS
from vivit_jax.errors import UserError, counted
from vivit_jax.files.addresses import Address, Place
from vivit_jax.files.alone import alone
from vivit_jax.files.atomic import check_directory, whole_file, write_json
from vivit_jax.files.reading import content, names_in, sha256_of, size_of
from vivit_jax.files.staging import made_parents
from vivit_jax.files.storage import remove

Container = Literal["tar", "arrayrecord"]
WRITERS = {"tar": TarShard, "arrayrecord": ArrayShard}
_DIGITS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How a data set is packed.

    Attributes:
        shard_bytes: a shard is full when the next clip would exceed this; it has at least one.
        container: the kind of the shards.
        resize: pixels of the short side to which larger videos are encoded again; None: as they
            are.
        threads: that read and encode.
        max_bad_share: of clips that cannot be read, from 20 clips on, that ends the packing.
    """

    shard_bytes: int = 256 * 2**20
    container: Container = "tar"
    resize: int | None = None
    threads: int = 2
    max_bad_share: float = 0.05

    @property
    def settings(self) -> dict[str, Any]:
        """What the bytes of the shards depend on."""
        return {
            "shard_bytes": self.shard_bytes,
            "container": self.container,
            "resize": self.resize,
        }


class _Place(NamedTuple):
    """Where a clip is in a shard, as `vivit_jax.data.datasets.packs.Index` has it."""

    clip: int
    name: str
    start: int
    length: int
    crc32: int
    first: int
    frames: int


@dataclasses.dataclass
class _Begun:
    """A finished shard, as the file beside it says."""

    key: str  # of the pack it belongs to
    name: str
    bytes: int
    sha256: str
    next: int  # the first clip that is not in it
    places: list[_Place]
    left_out: dict[str, str]


def pack(dataset: Dataset, out: Place, how: Packing, progress: Progress | None = None) -> Manifest:
    """Write a data set's clips to shards in the directory `out`; or go on where that was ended.

    `progress` is called with the number of clips that are done, and of all.
    Finished shards are kept if they have the size that the file beside them says and, on this
    machine, the same content. A pack that is complete already is checked in the same way.

    Raises UserError for a directory that holds anything else, too many clips that cannot be read,
    for a pack of another data set or with other settings, and where another process on this machine
    is packing.
    """
    check_directory(out, [MANIFEST])
    if isinstance(out, Address):
        return _packed(dataset, out, how, progress)
    with made_parents(out / MANIFEST), alone(out) as is_alone:
        if not is_alone:
            raise UserError(
                f"--out {out}: another process is packing into it; wait for its end, or choose "
                "another directory"
            )
        return _packed(dataset, out, how, progress)


def _packed(dataset: Dataset, out: Place, how: Packing, progress: Progress | None) -> Manifest:
    source = dataset.fingerprint
    key = hashlib.sha256(json.dumps([source, how.settings], sort_keys=True).encode()).hexdigest()
    there = set(names_in(out)) if out.is_dir() else set()
    there = {name for name in there if not name.startswith(".")}
    if MANIFEST in there:
        return _checked_whole(out, source, how)
    begun = list(_kept(out, there, key, how))
    known = {each.name for each in begun}
    known |= {f"{each.name}.json" for each in begun} | {INDEX}
    known |= {name for name in there if _is_shard(out, name.removesuffix(".json"), how)}
    others = sorted(there - known)
    if others:
        raise UserError(
            f"--out {out} holds {counted(len(others), 'other file')}, such as {others[0]}; "
            "expected a new or empty directory, or a pack that was begun"
        )
    for shard in _written(dataset, out, key, how, begun, progress or (lambda done, total: None)):
        begun.append(shard)
    return _finished(dataset, out, source, how, begun)


def _shard_name(out: Place, number: int, how: Packing) -> str:
    return f"{out.name}-{number:0{_DIGITS}}{WRITERS[how.container].SUFFIX}"


def _is_shard(out: Place, name: str, how: Packing) -> bool:
    number = name.removeprefix(f"{out.name}-").removesuffix(WRITERS[how.container].SUFFIX)
    return number.isdecimal() and name == _shard_name(out, int(number), how)


def _kept(out: Place, there: set[str], key: str, how: Packing) -> Iterator[_Begun]:
    """The shards of this pack that are finished, from the first on."""
    for number in range(len(there)):
        name = _shard_name(out, number, how)
        if f"{name}.json" not in there:
            return
        try:
            found = _Begun(**json.loads(content(out / f"{name}.json")))
        except (ValueError, TypeError):
            raise UserError(
                f"{out / name}.json is no note of a pack that was begun; remove it, or choose "
                "another directory"
            ) from None
        if found.key != key:
            raise UserError(
                f"--out {out} holds a pack that was begun of other clips or with other settings; "
                "choose another directory, or remove it"
            )
        if name not in there or not _is_whole(out, found.name, found.bytes, found.sha256):
            return
        yield found


def _is_whole(out: Place, name: str, size: int, sha256: str) -> bool:
    """Whether a shard is as it was written; in storage by its size alone."""
    path = out / name
    if size_of(path) != size:
        return False
    return isinstance(path, Address) or sha256_of(path) == sha256


def _checked_whole(out: Place, source: str, how: Packing) -> Manifest:
    """The manifest of a pack that is complete, if it is this one and undamaged."""
    manifest = read_manifest(str(out))
    if (manifest.source, manifest.settings) != (source, how.settings):
        raise UserError(
            f"--out {out} holds a pack of other clips or with other settings; choose another "
            "directory, or remove it"
        )
    read_index(str(out), manifest)
    for shard in manifest.shards:
        try:
            whole = _is_whole(out, shard.name, shard.bytes, shard.sha256)
        except OSError as error:
            raise UserError(f"{out / shard.name}: {error.strerror}; remove {MANIFEST}") from None
        if not whole:
            raise UserError(
                f"{out / shard.name} is damaged: its content is not what {MANIFEST} says; remove "
                f"{MANIFEST} and the shard, and pack again"
            )
    return manifest


class _Remaining:
    """The clips that are not packed yet.

    Attributes:
        member: the next one that can be read; None at the end.
        done: how many clips lie before it.
        left_out: those that could not be read, and why, until somebody takes them from here.
    """

    def __init__(self, dataset: Dataset, how: Packing, begun: list[_Begun], progress: Progress):
        self._dataset, self._how, self._progress = dataset, how, progress
        self._bad = sum(len(each.left_out) for each in begun)
        self.done, self.left_out = begun[-1].next if begun else 0, dict[str, str]()
        self._clips = members(dataset, self.done, how.resize, how.threads)
        self.member: Member | None = None
        self.advance()

    def advance(self) -> None:
        """Go to the next. Raises UserError if too many cannot be read."""
        if self.member is not None:
            self._pass(self.member.index)
        for index, made in self._clips:
            if isinstance(made, Member):
                self.member = made
                return
            self.left_out[self._dataset.examples[index].path] = str(made)
            self._bad += 1
            self._pass(index)
        self.member = None

    def close(self) -> None:
        self._clips.close()

    def _pass(self, index: int) -> None:
        self.done, total, most = index + 1, len(self._dataset), self._how.max_bad_share
        self._progress(self.done, total)
        enough = self.done >= FEW_CLIPS or self.done == total
        if enough and self._bad > most * self.done:
            last = next(reversed(self.left_out.values()), "")
            raise UserError(
                f"{self._bad} of {counted(self.done, 'clip')} cannot be read, more than "
                f"--max-bad-share {most:g}{last and f'; the last: {last}'}"
            )


def _written(
    dataset: Dataset, out: Place, key: str, how: Packing, begun: list[_Begun], progress: Progress
) -> Iterator[_Begun]:
    """Write the shards that are not there yet."""
    with contextlib.closing(_Remaining(dataset, how, begun, progress)) as clips:
        for number in itertools.count(len(begun)):
            if clips.member is None:
                break
            name, places = _shard_name(out, number, how), []
            with whole_file(out / name) as partial:
                shard = WRITERS[how.container](partial)
                while (member := clips.member) is not None:
                    if places and shard.size + member.size > how.shard_bytes:
                        break
                    places.append(_added(shard, dataset, member))
                    clips.advance()
                starts, size, sha256 = shard.close()
            both = zip(places, starts, strict=True)
            placed = [each._replace(start=start) for each, start in both]
            found = _Begun(key, name, size, sha256, clips.done, placed, clips.left_out)
            clips.left_out = {}
            write_json(out / f"{name}.json", dataclasses.asdict(found))
            yield found
        if clips.left_out and not begun:
            raise UserError(f"{dataset.source}: none of its {clips.done:,} clips can be read")
        if clips.left_out:  # nothing came after them that would make a shard
            begun[-1].left_out |= clips.left_out
            begun[-1].next = clips.done
            write_json(out / f"{begun[-1].name}.json", dataclasses.asdict(begun[-1]))


def _added(shard: TarShard | ArrayShard, dataset: Dataset, member: Member) -> _Place:
    """Add a clip and its labels; its place, whose start is known when the shard is closed."""
    example, stem = dataset.examples[member.index], f"{member.index:09}"
    name = f"{stem}{member.ending}"
    try:
        with _opened(member) as file:
            crc = shard.add(name, member.size, file)
    except ChangedError as error:
        raise UserError(
            f"{example.path} changed while it was packed: {error}; the same command goes on, with "
            "the file as it is then"
        ) from None
    base = os.path.join(dataset.root, "") if dataset.root else ""
    about: dict[str, Any] = {"path": example.path.removeprefix(base)}
    if isinstance(example.label, int):
        about["label"] = example.label
        if dataset.classes:
            about["class"] = dataset.classes[example.label]
        shard.add_text(f"{stem}.cls", str(example.label))
    elif example.label is not None:
        about["labels"] = list(example.label)
    shard.add_text(f"{stem}.json", json.dumps(about, sort_keys=True))
    return _Place(member.index, name, -1, member.size, crc, *(member.extent or (-1, -1)))


def _opened(member: Member) -> BinaryIO:
    try:
        return member.opened()
    except OSError as error:
        raise ChangedError(error.strerror) from None


def _finished(
    dataset: Dataset, out: Place, source: str, how: Packing, begun: list[_Begun]
) -> Manifest:
    """Write the index and the manifest, and remove the files beside the shards."""
    rows = [(k, *place) for k, shard in enumerate(begun) for place in shard.places]
    shards, clips, names, starts, lengths, crcs, first, total = zip(*rows, strict=True)
    extents = np.array([first, total], np.int32).T
    index = Index(
        np.array(shards, np.int32),
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
        np.array(crcs, np.uint32),
        dataset.labels[np.array(clips)],
        extents if (extents != -1).any() else extents[:0],
        "".join(f"{name}\n" for name in names).encode(),
    )
    data = index.to_npz()
    with whole_file(out / INDEX) as partial:
        partial.write_bytes(data)
    manifest = Manifest(
        tuple(Shard(s.name, s.bytes, s.sha256, len(s.places)) for s in begun),
        len(rows),
        dataset.classes,
        hashlib.sha256(data).hexdigest(),
        source,
        how.settings,
        {path: why for shard in begun for path, why in shard.left_out.items()},
    )
    write_json(out / MANIFEST, manifest.to_json())
    for shard in begun:
        beside = out / f"{shard.name}.json"
        if isinstance(beside, Address):
            remove(str(beside))
        else:
            beside.unlink()
    return manifest

# SPDX-License-Identifier: Apache-2.0
"""Packs: clips in a few large shards, each read from its place in one.

`vivit-jax pack` writes shards, index.npz with the place of each clip, and manifest.json, which
comes last. The clips keep their order, so that it stays a function of the seed and the step. tar
files of others are read too, after a look at the heads of their members:
`vivit_jax.data.datasets.tar_members`.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt32

from vivit_jax.data.datasets.columns import Columns
from vivit_jax.data.datasets.folders import ending
from vivit_jax.data.datasets.tar_members import CLIPS, COMPRESSED_NAMES, IS_COMPRESSED, tar_clips
from vivit_jax.errors import UserError, counted, first_line, quoted
from vivit_jax.files import storage
from vivit_jax.files.addresses import address_text, is_address
from vivit_jax.files.parts import SHARDS, Part, part_of
from vivit_jax.files.reading import content, is_file, listed, size_of

logger = logging.getLogger(__name__)

MANIFEST, INDEX = "manifest.json", "index.npz"
FORMAT, VERSION = "vivit_jax pack", 1
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MOST = 100_000  # shards
_THREADS = 16


class Shard(NamedTuple):
    """A file of a pack.

    Attributes:
        name: its name in the pack's directory.
        bytes: its size.
        sha256: of its content.
        clips: how many are in it.
    """

    name: str
    bytes: int
    sha256: str
    clips: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says of a pack.

    Attributes:
        shards: its files, in order.
        clips: how many there are.
        classes: names by label, if the packed clips have them.
        index_sha256: of index.npz.
        source: the fingerprint of the data set that was packed.
        settings: how it was packed.
        left_out: clips that could not be read, and why.
    """

    shards: tuple[Shard, ...]
    clips: int
    classes: tuple[str, ...] | None
    index_sha256: str
    source: str
    settings: dict[str, Any]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        values = dataclasses.asdict(self) | {"shards": [each._asdict() for each in self.shards]}
        return {"format": FORMAT, "version": VERSION, **values}

    @classmethod
    def from_json(cls, values: Any, name: str) -> "Manifest":
        """From the file's content. UserError for another file, or one of another version."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{name}: no manifest of a pack; expected what vivit-jax pack writes")
        if values.get("version") != VERSION:
            raise UserError(
                f"{name}: a pack of version {values.get('version')}; this release reads {VERSION}"
            )
        try:
            found = {field.name: values[field.name] for field in dataclasses.fields(cls)}
            kinds = {"clips": int, "index_sha256": str, "source": str, "settings": dict}
            _check_kinds(found, kinds | {"left_out": dict, "shards": list})
            for shard in found["shards"]:
                _check_kinds(shard, {"name": str, "bytes": int, "sha256": str, "clips": int})
            found["shards"] = tuple(Shard(**shard) for shard in found["shards"])
            found["classes"] = found["classes"] and tuple(map(str, found["classes"]))
            made = cls(**found)
        except (KeyError, TypeError) as error:
            raise UserError(f"{name}: damaged: {error}; get the pack again") from None
        names = {os.path.basename(shard.name) for shard in made.shards}
        if not names or len(names) < len(made.shards):
            raise UserError(f"{name}: damaged: no shards, or two of one name; get the pack again")
        return made


def _check_kinds(values: Any, kinds: dict[str, type]) -> None:
    """TypeError or KeyError for values that are not of these kinds."""
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} is {quoted(repr(values[key]))}, not of type {kind.__name__}")


@dataclasses.dataclass(frozen=True)
class Index:
    """The places of a pack's clips, in their order.

    Attributes:
        shards: the shard of each clip, by its number.
        starts: the first byte.
        lengths: the bytes.
        checksums: their CRC-32.
        labels: those of each clip; without columns if they are unlabelled.
        extents: first frame and number of frames, -1 where a clip is all that its file has; or
            without rows if that holds for all.
        names: the names in the shards, UTF-8, each ended by a line break.
    """

    shards: Int32[np.ndarray, " clips"]
    starts: Int64[np.ndarray, " clips"]
    lengths: Int64[np.ndarray, " clips"]
    checksums: UInt32[np.ndarray, " clips"]
    labels: Int32[np.ndarray, "clips heads"]
    extents: Int32[np.ndarray, "rows 2"]
    names: bytes

    def to_npz(self) -> bytes:
        """As the file has it."""
        arrays = vars(self) | {"names": np.frombuffer(self.names, np.uint8)}
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # without a date
            for name, array in arrays.items():
                held = io.BytesIO()
                np.save(held, array, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), held.getvalue())
        return file.getvalue()

    @classmethod
    def from_npz(cls, data: bytes) -> "Index":
        """From the file's content. Raises ValueError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {field.name: archive[field.name] for field in dataclasses.fields(cls)}
        except (KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(first_line(error)) from None
        return cls(**arrays | {"names": arrays["names"].tobytes()})

    def fits(self, manifest: Manifest) -> bool:
        """Whether it can be that of the manifest's shards: their numbers of clips, and classes."""
        clips = [shard.clips for shard in manifest.shards]
        rows = manifest.clips, self.names.count(b"\n"), sum(clips), len(self.labels)
        columns = self.shards, self.starts, self.lengths, self.checksums
        if {*rows, *map(len, columns)} != {manifest.clips} or self.shards.min(initial=0) < 0:
            return False
        if np.bincount(self.shards, minlength=len(clips)).tolist() != clips:
            return False
        if (
            len(self.extents) not in (0, manifest.clips)
            or min(self.starts.min(initial=0), self.lengths.min(initial=0)) < 0
        ):
            return False
        least, most = self.labels.min(initial=0), self.labels.max(initial=0)
        return least >= 0 and (manifest.classes is None or most < len(manifest.classes))

    def columns(self, shards: Sequence[str]) -> Columns:
        """The clips as entries of a list, whose paths are parts of the shards of these names."""
        names = self.names.decode().split("\n")[:-1]
        places = zip(
            self.shards.tolist(), self.starts.tolist(), self.lengths.tolist(), names, strict=True
        )
        paths = (f"{shards[k]}@{start}+{length}/{name}" for k, start, length, name in places)
        ends = np.zeros(len(names) + 1, np.int64)
        extents = self.extents if len(self.extents) else None
        return Columns(b"", ends, self.labels, extents).moved(paths)


class Pack(NamedTuple):
    """The clips of a pack.

    Attributes:
        columns: entries whose paths are relative to `root`.
        root: the directory of the shards.
        classes: names by label.
        checksums: the CRC-32 of each clip; None for tar files of others.
    """

    columns: Columns
    root: str
    classes: tuple[str, ...] | None
    checksums: UInt32[np.ndarray, " clips"] | None


def is_pack(path: str, names: Sequence[str] | None) -> bool:
    """Whether a path names a pack: a directory with these `names`, its manifest, or shards."""
    if names is not None:
        shards = (name for name in names if name.lower().endswith(SHARDS))
        return MANIFEST in names or any(not name.startswith(".") for name in shards)
    if os.path.basename(path) == MANIFEST:
        return True
    return path.lower().endswith((*SHARDS, *COMPRESSED_NAMES)) and part_of(path) is None


def read_pack(path: str) -> Pack:
    """The clips of a path for which `is_pack` holds.

    Raises UserError for shards that are missing, cut off or not those of the index, for damaged
    files, and for tar files of others as `tar_clips` does.
    """
    if path.lower().endswith(COMPRESSED_NAMES):
        raise UserError(f"{path}: {IS_COMPRESSED}")
    directory, wanted = _shards_of(path)
    sizes = _sizes(directory) if wanted is None or len(wanted) > 1 else None
    manifest_path = os.path.join(directory, MANIFEST)
    has_manifest = MANIFEST in sizes if sizes is not None else is_file(manifest_path)
    if wanted is None and not has_manifest:
        wanted = sorted(n for n in sizes or () if n.lower().endswith(SHARDS) and n[0] != ".")
        _tell_others(directory, len(wanted))
    if not has_manifest:
        assert wanted is not None
        _check_there(path, directory, wanted, sizes)
        columns, classes = tar_clips(directory, wanted)
        return Pack(columns, directory, classes, None)
    manifest = read_manifest(directory)
    if wanted is None:
        wanted = [shard.name for shard in manifest.shards]
    known = {shard.name: (k, shard) for k, shard in enumerate(manifest.shards)}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(
            f"{path}: {manifest_path} does not have {len(unknown)} of {len(wanted)} shards, such "
            f"as {unknown[0]}; it has {len(known)}, such as {manifest.shards[0].name}"
        )
    _check_there(path, directory, wanted, sizes)
    for name in wanted:
        size = size_of(os.path.join(directory, name)) if sizes is None else sizes[name]
        if size != known[name][1].bytes:
            raise UserError(
                f"{os.path.join(directory, name)} has {size:,} bytes; {MANIFEST} says "
                f"{known[name][1].bytes:,}: it is cut off or of another pack, get it again"
            )
    index = read_index(directory, manifest)
    _check_not_swapped(directory, manifest, index, [known[name][0] for name in wanted])
    if wanted != [shard.name for shard in manifest.shards]:
        index = _of_shards(index, [known[name][0] for name in wanted])
    columns = index.columns([shard.name for shard in manifest.shards])
    return Pack(columns, directory, manifest.classes, index.checksums)


def read_manifest(directory: str) -> Manifest:
    """The manifest in a directory. UserError for one that is damaged or another file."""
    path = os.path.join(directory, MANIFEST)
    try:
        values = json.loads(content(path))
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}; get the pack again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return Manifest.from_json(values, path)


def read_index(directory: str, manifest: Manifest) -> Index:
    """The index beside a manifest. UserError for a damaged one, or that of another pack."""
    path = os.path.join(directory, INDEX)
    try:
        data = content(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; get the pack again") from None
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise UserError(
            f"{path} is not the index of the shards in {MANIFEST}: it is damaged or of another "
            "pack; get it again"
        )
    try:
        index = Index.from_npz(data)
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; get the pack again") from None
    if not index.fits(manifest):
        raise UserError(f"{path} does not fit {MANIFEST}: one is damaged; get the pack again")
    return index


def _check_not_swapped(
    directory: str, manifest: Manifest, index: Index, numbers: Sequence[int]
) -> None:
    """UserError for a shard in the place of another whose clips begin and end at the same places.

    Of all others a swap is seen by their sizes, or by clips that cannot be read. Packs of arrays
    have such shards. Of these the first clip is read.
    """
    ends = np.searchsorted(index.shards, np.arange(len(manifest.shards) + 1))  # in their order
    alike: dict[tuple[int, bytes], list[int]] = {}
    for number in numbers:
        rows = slice(ends[number], ends[number + 1])
        layout = hashlib.sha256(index.starts[rows].tobytes() + index.lengths[rows].tobytes())
        alike.setdefault((manifest.shards[number].bytes, layout.digest()), []).append(number)
    doubtful = [number for group in alike.values() if len(group) > 1 for number in group]

    def check(number: int) -> None:
        row, path = ends[number], os.path.join(directory, manifest.shards[number].name)
        part = Part(path, int(index.starts[row]), int(index.lengths[row]), "clip")
        try:
            found = zlib.crc32(content(str(part)))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if found != index.checksums[row]:
            raise UserError(
                f"{path}: its first clip is not the one that {INDEX} says: shards were swapped, or "
                "this one is damaged; get it again"
            )

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(check, doubtful):
            pass


def _of_shards(index: Index, numbers: list[int]) -> Index:
    """The clips of some shards, in the order of these."""
    places = [np.flatnonzero(index.shards == number) for number in numbers]
    rows = np.concatenate(places) if places else np.empty(0, np.int64)
    names = index.names.split(b"\n")
    return Index(
        index.shards[rows],
        index.starts[rows],
        index.lengths[rows],
        index.checksums[rows],
        index.labels[rows],
        index.extents[rows] if len(index.extents) else index.extents,
        b"".join(names[k] + b"\n" for k in rows),
    )


def _shards_of(path: str) -> tuple[str, list[str] | None]:
    """The directory that a path names, and the names of the wanted shards; None: all."""
    if os.path.basename(path) == MANIFEST:
        return os.path.dirname(path), None
    if not path.lower().endswith(SHARDS):
        return path.rstrip("/") if is_address(path) else path, None
    if is_file(path):
        paths = [path]
    else:
        paths = [*itertools.islice(expanded(path), _MOST + 1)]
        if len(paths) > _MOST:
            raise UserError(f"{path}: more than {_MOST:,} shards")
    directories = {os.path.dirname(each) for each in paths}
    if len(directories) > 1:
        raise UserError(
            f"{path}: shards in {len(directories)} directories, such as "
            f"{' and '.join(sorted(directories)[:2])}; expected one directory"
        )
    twice = len(paths) - len({*paths})
    if twice:
        raise UserError(f"{path}: names {twice} of its shards twice")
    return directories.pop(), [os.path.basename(each) for each in paths]


def expanded(pattern: str) -> Iterator[str]:
    """The texts of a pattern such as k400-{000..511}.tar or {train,extra}-{0..9}.tar.

    A range counts up or down, with as many digits as its longer end if one of them begins with 0.
    Raises UserError for braces that are not so.
    """
    found = _BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(
                f"{pattern}: a brace without the other; expected such as k400-{{000..511}}.tar"
            )
        yield pattern
        return
    bounds = _RANGE.fullmatch(found[1])
    if bounds is None and "," not in found[1]:
        raise UserError(
            f"{pattern}: {{{found[1]}}} is no range and no list; expected such as {{000..511}} or "
            "{train,extra}"
        )
    choices: Iterator[str] | list[str]
    if bounds is None:
        choices = found[1].split(",")
    else:
        first, last = int(bounds[1]), int(bounds[2])
        padded = any(len(end) > 1 and end[0] == "0" for end in bounds.groups())
        digits = max(map(len, bounds.groups())) if padded else 0
        step = 1 if first <= last else -1
        choices = (f"{number:0{digits}}" for number in range(first, last + step, step))
    for choice in choices:
        yield from expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _sizes(directory: str) -> dict[str, int]:
    """The size of each file in a directory."""
    if is_address(directory):
        if storage.protocol_of_web(directory):  # which lists nothing
            raise UserError(f"{directory}: cannot be listed; name one shard")
        below = storage.sizes_below(address_text(directory))
        return {name: size for name, size in below.items() if "/" not in name}
    try:
        names = [entry.name for entry in listed(directory) if not entry.is_directory]
        return {name: os.path.getsize(os.path.join(directory, name)) for name in names}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def _check_there(path: str, directory: str, wanted: list[str], sizes: dict[str, int] | None):
    """UserError for shards that are missing, empty or not there at all."""
    if sizes is None:
        file = os.path.join(directory, wanted[0])
        try:
            sizes = {wanted[0]: size_of(file)}
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
    missing = [name for name in wanted if name not in sizes]
    if missing:
        which = (
            "there is no such shard"
            if len(wanted) == 1
            else (
                f"{len(missing)} of its {len(wanted)} shards are missing, such as "
                f"{os.path.join(directory, missing[0])}"
            )
        )
        raise UserError(f"{path}: {which}")
    empty = next((name for name in wanted if not sizes[name]), None)
    if empty is not None:
        raise UserError(f"{os.path.join(directory, empty)}: an empty shard (0 bytes)")


def _tell_others(directory: str, shards: int) -> None:
    """Log the clips and folders of a directory that is read by the tar files in it."""
    others = [
        entry.name
        for entry in listed(directory)
        if entry.name[0] != "."
        and entry.name != INDEX
        and (entry.is_directory or ending(entry.name) in CLIPS)
    ]
    if others:
        logger.warning(
            "%s: read by its %s; other clips and folders there are not read: %d, such as %s",
            *(directory, counted(shards, "shard"), len(others), quoted(others[0])),
        )

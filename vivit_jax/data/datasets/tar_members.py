# SPDX-License-Identifier: Apache-2.0
"""The clips in tar files of others, as WebDataset has them, found by the heads of their members.

Members whose names agree up to the first dot are one sample: KEY.mp4 with KEY.cls or KEY.json.
"""

import functools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from vivit_jax.data.datasets.columns import Builder, Columns, Entry, Label
from vivit_jax.data.datasets.folders import ARRAYS, VIDEOS, ending
from vivit_jax.data.datasets.list_files import LARGEST
from vivit_jax.errors import UserError, counted, quoted
from vivit_jax.files import block_cache
from vivit_jax.files.addresses import is_address
from vivit_jax.files.parts import Part
from vivit_jax.files.ranges import recent_state
from vivit_jax.files.reading import opened

logger = logging.getLogger(__name__)

PICTURES = ".zip"  # the pictures of a clip, in order, not compressed
CLIPS = (*VIDEOS, *ARRAYS, ".webp", PICTURES)  # endings
_LABELS = (".cls", ".json")
_KEYS = ("label", "labels", "class", "cls")  # of a sample's JSON
_META = re.compile(r"__[^/]*__($|/)")  # names of members about the shard, as WebDataset has them
_NUMBER = re.compile(r"[0-9]{1,10}")
_NO_NAME = re.compile(r"[-+0-9.,;\s]*")  # the text of a label that is neither a number nor a name
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # how such files begin
COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
IS_COMPRESSED = (
    "a compressed tar file, of which no clip can be read from its place; decompress it, such as "
    "with gunzip"
)
_LONGEST = 2**20  # bytes of such a member
_THREADS = 16
_HEADS = -1  # in the place of a block's number; another one when what is kept changes
_MOST_LINKS = 40  # from one to the next, as Linux follows them
_Found = int | str | tuple[int, ...] | None  # a label as it is written


class _Clip(NamedTuple):
    """A member, or a link to one.

    Attributes:
        name: its own.
        start: the first byte of its content.
        size: the bytes.
    """

    name: str
    start: int
    size: int


def tar_clips(directory: str, names: Sequence[str]) -> tuple[Columns, tuple[str, ...] | None]:
    """The clips of some tar files of a directory in order, and the classes if labels are names.

    A label is the text of a sample's .cls, else in its .json what is called label, labels, class or
    cls: a number from 0, several, or a name; names are numbered in their order. Paths are relative
    to the directory; a link stands for the member that it names. Samples that have a label and no
    clip are counted in the log. Raises UserError for a file that is cut off or no tar file, two
    clips of one name, a sample with two, labels of several kinds, and for no clips at all.
    """
    other = next((name for name in names if ending(name) != ".tar"), None)
    if other is not None:
        raise UserError(
            f"{os.path.join(directory, other)}: there is no manifest.json beside it; get the whole "
            "pack, or pack the clips again"
        )
    with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
        shards = [*pool.map(lambda name: _members(os.path.join(directory, name)), names)]
    samples = [
        (name, key, *sample)
        for name, shard in zip(names, shards, strict=True)
        for key, sample in shard.items()
    ]
    if not samples:
        found = os.path.join(directory, names[0])
        raise UserError(f"{found}: no clips in it; expected members with {', '.join(VIDEOS)}")
    seen: dict[str, str] = {}
    for name, key, *_ in samples:
        if key in seen:
            raise UserError(
                f"{directory}: two clips are named {quoted(key)}, in {seen[key]} and {name}; leave "
                "out one of the shards, or pack the clips again"
            )
        seen[key] = name
    labels, classes = _numbered(directory, samples)
    builder = Builder()
    for (name, key, clip, _), label in zip(samples, labels, strict=True):
        place = Part(name, clip.start, clip.size, os.path.basename(clip.name))
        builder.add(Entry(str(place), label), f"{name}, {key}")
    return builder.columns(directory), classes


def _numbered(
    directory: str, samples: Sequence[tuple[str, str, _Clip, _Found]]
) -> tuple[list[Label], tuple[str, ...] | None]:
    """The labels as numbers, and the classes if they are names."""
    named = sorted({label for *_, label in samples if isinstance(label, str)})
    numbers = {name: number for number, name in enumerate(named)}
    labels: list[Label] = []
    for name, key, _, label in samples:
        if named and not isinstance(label, str):
            raise UserError(
                f"{os.path.join(directory, name)}: clip {quoted(key)} has label {label}, others a "
                f"name such as {quoted(named[0])}; expected one kind"
            )
        labels.append(numbers[label] if isinstance(label, str) else label)
    return labels, tuple(named) or None


def _members(path: str) -> dict[str, tuple[_Clip, _Found]]:
    """The clip of each sample of a tar file, and its label.

    Of a file in storage they are kept in the cache of blocks, if there is one: small clips lie so
    close that the look at their heads reads the whole file.
    """
    if not is_address(path):
        return _scanned(path)
    try:
        tag = recent_state(path).tag
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    held = block_cache.get(path, tag, _HEADS)
    if held is not None:
        rows = json.loads(held)
        return {
            key: (_Clip(*clip), tuple(label) if isinstance(label, list) else label)
            for key, clip, label in rows
        }
    found = _scanned(path)
    rows = [(key, clip, label) for key, (clip, label) in found.items()]
    block_cache.put(path, tag, _HEADS, json.dumps(rows).encode())
    return found


def _scanned(path: str) -> dict[str, tuple[_Clip, _Found]]:
    """`_members` from the file itself."""
    members: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, dict[str, bytes]] = {}
    try:
        with opened(path) as file:
            if file.read(8).startswith(_COMPRESSED):
                raise UserError(f"{path}: {IS_COMPRESSED}")
            file.seek(0)
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (has nothing to close)
            by_name = functools.cache(
                lambda: {os.path.normpath(each.name): each for each in archive.getmembers()}
            )
            for member in archive:
                kind, folder = ending(member.name), os.path.dirname(member.name)
                base = os.path.basename(member.name)
                linked = member.islnk() or member.issym()
                if not (member.isreg() or linked) or base.startswith("."):
                    continue
                if _META.match(member.name):
                    continue
                key = os.path.normpath(os.path.join(folder, base.partition(".")[0]))
                if kind in CLIPS:
                    if key in members:
                        raise UserError(
                            f"{path}: two clips are named {quoted(key)}: {members[key].name} and "
                            f"{member.name}; expected one for each name up to the first dot"
                        )
                    members[key] = member
                elif kind in _LABELS and member.size <= _LONGEST:
                    # A link may lead to a member that comes later.
                    source = _followed(path, by_name, member) if linked else member
                    held = archive.extractfile(source)
                    assert held is not None, "a regular file"
                    labels.setdefault(key, {})[kind] = held.read()
            _check_end(path, file, archive.offset)
            targets = {key: _followed(path, by_name, each) for key, each in members.items()}
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: no uncompressed tar file, or cut off ({error}); get it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    clips = {
        key: _Clip(members[key].name, each.offset_data, each.size) for key, each in targets.items()
    }
    alone = [key for key in labels if key not in clips]
    if alone and clips:
        logger.warning(
            "%s: %s without a clip, such as %s",
            path,
            counted(len(alone), "label"),
            quoted(alone[0]),
        )
    return {key: (clip, _label(path, key, labels.get(key, {}))) for key, clip in clips.items()}


def _check_end(path: str, file: BinaryIO, place: int) -> None:
    """ReadError if no end mark is at this place; UserError if anything comes after it."""
    # tarfile takes what is no head, or half a one, for the end.
    file.seek(place)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end mark at byte {place:,}")
    while rest := file.read(2**20):
        if rest.count(0) < len(rest):
            raise UserError(
                f"{path}: more follows the end mark at byte {place:,}, where its clips end; join "
                "tar files by tar --concatenate, or name each"
            )


def _followed(
    path: str, by_name: Callable[[], dict[str, tarfile.TarInfo]], member: tarfile.TarInfo
) -> tarfile.TarInfo:
    """The member, or the one that it is a link to. Raises UserError for no regular file."""
    found: tarfile.TarInfo | None = member
    for _ in range(_MOST_LINKS):
        if found is None or not (found.islnk() or found.issym()):
            break
        # A symbolic link is relative to its folder, a hard one to the archive.
        folder = os.path.dirname(found.name) if found.issym() else ""
        found = by_name().get(os.path.normpath(os.path.join(folder, found.linkname)))
    if found is None or not found.isreg():
        raise UserError(
            f"{path}: {quoted(member.name)} is a link to {quoted(member.linkname)}, which is no "
            "file in it; write the tar file with what its links lead to (tar --dereference)"
        )
    if found.issparse():
        raise UserError(f"{path}: {quoted(found.name)} is a sparse file")
    return found


def _label(path: str, key: str, texts: dict[str, bytes]) -> _Found:
    """The label that a sample's members say."""
    where = f"{path}: {quoted(key)}"
    if ".cls" in texts:
        return _checked(texts[".cls"].decode(errors="replace").strip(), f"{where}.cls")
    if ".json" not in texts:
        return None
    try:
        values = json.loads(texts[".json"])
    except ValueError as error:
        raise UserError(f"{where}.json: no JSON: {error}") from None
    if not isinstance(values, dict):
        return None
    found = next((values[name] for name in _KEYS if name in values), None)
    return None if found is None else _checked(found, f"{where}.json")


def _checked(found: Any, where: str) -> _Found:
    # A number may be written as a text; other figures, such as -1 or 0.5, are no name.
    several = found if isinstance(found, list) else [found]
    numbers = tuple(n for n in map(_number, several) if n is not None and 0 <= n <= LARGEST)
    if several and len(numbers) == len(several):
        return numbers[0] if len(numbers) == 1 else numbers
    if isinstance(found, str) and not _NO_NAME.fullmatch(found):
        return found
    raise UserError(
        f"{where}: label {quoted(repr(found))}; expected a number from 0 to {LARGEST}, several, or "
        "a name"
    )


def _number(value: Any) -> int | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

# SPDX-License-Identifier: Apache-2.0
"""The clips in tar files of others, as WebDataset has them, found by the heads of their members.

Members whose names agree up to the first dot are one sample: KEY.mp4 with KEY.cls or KEY.json.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vivit_jax.data.datasets.columns import Builder, Columns, Entry, Label
from vivit_jax.data.datasets.folders import ARRAYS, VIDEOS, ending
from vivit_jax.data.datasets.list_files import LARGEST
from vivit_jax.errors import UserError, quoted
from vivit_jax.files.parts import Part
from vivit_jax.files.reading import opened

PICTURES = ".zip"  # the pictures of a clip, in order, not compressed
CLIPS = (*VIDEOS, *ARRAYS, ".webp", PICTURES)  # endings
_LABELS = (".cls", ".json")
_KEYS = ("label", "labels", "class", "cls")  # of a sample's JSON
_LONGEST = 2**20  # bytes of such a member
_THREADS = 16
_Found = int | str | tuple[int, ...] | None  # a label as it is written


def tar_clips(directory: str, names: Sequence[str]) -> tuple[Columns, tuple[str, ...] | None]:
    """The clips of some tar files of a directory in order, and the classes if labels are names.

    A label is the text of a sample's .cls, else in its .json what is called label, labels, class or
    cls: a number from 0, several, or a name; names are numbered in their order. Paths are relative
    to the directory. Raises UserError for a file that is cut off or no tar file, two clips of one
    name, a sample with two, labels of several kinds, and for no clips at all.
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
    for (name, key, member, _), label in zip(samples, labels, strict=True):
        place = Part(name, member.offset_data, member.size, os.path.basename(member.name))
        builder.add(Entry(str(place), label), f"{name}, {key}")
    return builder.columns(directory), classes


def _numbered(
    directory: str, samples: Sequence[tuple[str, str, tarfile.TarInfo, _Found]]
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


def _members(path: str) -> dict[str, tuple[tarfile.TarInfo, _Found]]:
    """The clip of each sample of a tar file, and its label."""
    clips: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, dict[str, bytes]] = {}
    try:
        with opened(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                kind, folder = ending(member.name), os.path.dirname(member.name)
                base = os.path.basename(member.name)
                if not member.isreg() or base.startswith("."):
                    continue
                key = os.path.join(folder, base.partition(".")[0])
                if kind in CLIPS:
                    if member.issparse():
                        raise UserError(f"{path}: {quoted(member.name)} is a sparse file")
                    if key in clips:
                        raise UserError(
                            f"{path}: two clips are named {quoted(key)}: {clips[key].name} and "
                            f"{member.name}; expected one for each name up to the first dot"
                        )
                    clips[key] = member
                elif kind in _LABELS and member.size <= _LONGEST:
                    held = archive.extractfile(member)
                    assert held is not None, "a regular file"
                    labels.setdefault(key, {})[kind] = held.read()
            # tarfile takes what is no head, or half a one, for the end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark at byte {archive.offset:,}")
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: no uncompressed tar file, or cut off ({error}); get it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return {key: (clip, _label(path, key, labels.get(key, {}))) for key, clip in clips.items()}


def _label(path: str, key: str, texts: dict[str, bytes]) -> _Found:
    """The label that a sample's members say."""
    where = f"{path}: {quoted(key)}"
    if ".cls" in texts:
        text = texts[".cls"].decode(errors="replace").strip()
        return _checked(int(text) if text.isdecimal() else text, f"{where}.cls")
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
    several = tuple(found) if isinstance(found, list) else (found,)
    numbers = [each for each in several if isinstance(each, int) and not isinstance(each, bool)]
    if several and len(numbers) == len(several) and all(0 <= n <= LARGEST for n in numbers):
        return several[0] if len(several) == 1 else several
    if isinstance(found, str) and found:
        return found
    raise UserError(
        f"{where}: label {quoted(repr(found))}; expected a number from 0 to {LARGEST}, several, or "
        "a name"
    )

# SPDX-License-Identifier: Apache-2.0
"""Clips in TFRecord files of SequenceExamples, as scenic's data sets are written by DMVR.

A record holds a clip's frames as pictures, one `image/encoded` each, and its labels,
`clip/label/index` and perhaps `clip/label/text`. Records are found by their lengths; of a clip's
frames those that are needed are decoded. The checksum of a record's length is compared, that of its
content is not: a damaged picture does not decode.
"""

import dataclasses
import functools
import os
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from jaxtyping import Int32, Int64

from vivit_jax.data.datasets.list_files import LARGEST
from vivit_jax.data.datasets.objects import ObjectClips
from vivit_jax.errors import UserError, VideoError, quoted
from vivit_jax.files.reading import is_directory, is_file, names_in, opened

FRAMES, LABELS, TEXTS = "image/encoded", "clip/label/index", "clip/label/text"
_SHARD = r"-[0-9]{5,}-of-[0-9]{5,}"
_NAME = re.compile(rf".*\.tfrecords?({_SHARD})?|.*{_SHARD}\.tfrecords?")
_SHARDED = re.compile(r"(.*\.tfrecords?)@([1-9][0-9]{0,5})")
_HEADER = struct.Struct("<QI")  # the length of a record's content, and a checksum of it
_FOOTER = 4  # a checksum of the content
_CONTEXT = 10  # the first byte of a SequenceExample that begins with its context
_FIRST = 4096  # bytes of a record that are read for its labels
_MOST = 1 << 32  # bytes of a record
_THREADS = 16  # that list shards


def is_records(path: str, names: Sequence[str] | None) -> bool:
    """Whether a path names TFRecord files: one, NAME@COUNT shards, or a directory with `names`."""
    if names is not None:
        return any(_NAME.fullmatch(name) for name in names if not name.startswith("."))
    return bool(_NAME.fullmatch(path) or _SHARDED.fullmatch(path))


@dataclasses.dataclass(frozen=True)
class Records(Sequence[bytes]):
    """The records of some files, each read when it is asked for.

    Attributes:
        paths: the files.
        files: the file of each record, as its place among `paths`.
        starts: where the content of each begins.
        lengths: its bytes.
    """

    paths: tuple[str, ...]
    files: Int32[np.ndarray, " records"]
    starts: Int64[np.ndarray, " records"]
    lengths: Int64[np.ndarray, " records"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        path, length = self.paths[self.files[index]], int(self.lengths[index])
        try:
            with opened(path) as file:
                file.seek(int(self.starts[index]))
                found = file.read(length)
        except OSError as error:
            raise VideoError(f"{path}: {error.strerror}") from None
        if len(found) < length:
            raise VideoError(f"{path}: it has become shorter since it was listed")
        return found


class RecordClips(ObjectClips):
    """The clips of `Records`."""

    def clip(self, index: int) -> list[bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The pictures of a clip's frames, encoded. Raises VideoError for a record without any."""
        name = f"{self.name}[{index}]"
        lists = _parsed(self.source[index], name).feature_lists.feature_list
        features = lists[FRAMES].feature if FRAMES in lists else ()
        frames = [value for feature in features for value in feature.bytes_list.value]
        if not frames:
            has = ", ".join(sorted({*lists} - {FRAMES})) or "nothing else"
            raise VideoError(f"{name}: no frames in the feature list {FRAMES}; it has {has}")
        return frames


def read_records(
    source: str, labels: int | None
) -> tuple[RecordClips, list[int | tuple[int, ...] | None], tuple[str, ...] | None]:
    """The clips of a path for which `is_records` holds, their labels, and the classes' names.

    `labels` is that of `vivit_jax.data.datasets.dataset.read_dataset`. Raises UserError for files
    that are missing, cut off or no TFRecords, and for records without the labels.
    """
    paths = _paths(source)
    with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
        shards = [*pool.map(lambda path: [*_scan(path, labels)], paths)]
    rows = [(k, *record) for k, shard in enumerate(shards) for record in shard]
    if not rows:
        raise UserError(f"{source}: no records in it; expected SequenceExamples of clips")
    files, starts, lengths, found, texts = zip(*rows, strict=True)
    records = Records(
        tuple(paths),
        np.array(files, np.int32),
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
    )
    clips = RecordClips(records, os.path.basename(source.rstrip("/")) or source)
    if labels == 0 or not any(found):
        return clips, [None] * len(rows), None
    counts: dict[int, int] = {}  # number of labels -> the first record with so many
    for k, each in enumerate(found):
        counts.setdefault(len(each), k)
    if len(counts) > 1 or (labels is not None and labels not in counts):
        each = ", ".join(f"{count} in record {k}" for count, k in counts.items())
        raise UserError(
            f"{source}: labels in {LABELS}: {each}; expected {labels or 'as many'} in each record"
        )
    values = [each[0] if len(each) == 1 else each for each in found]
    return clips, values, _names(source, found, texts)


def _paths(source: str) -> list[str]:
    """The files that a source names, in order."""
    sharded = _SHARDED.fullmatch(source)
    if sharded is None:
        if not is_directory(source):
            return [source]
        names = sorted(name for name in _visible(source) if _NAME.fullmatch(name))
        return [os.path.join(source, name) for name in names]
    count = int(sharded[2])
    paths = [f"{sharded[1]}-{k:05}-of-{count:05}" for k in range(count)]
    missing = [path for path in paths if not is_file(path)]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of its {count} shards are missing, such as {missing[0]}"
        )
    return paths


def _visible(directory: str) -> list[str]:
    return [name for name in names_in(directory) if not name.startswith(".")]


def _scan(
    path: str, labels: int | None
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[str, ...]]]:
    """(start, length, labels, their texts) of each record of a file."""
    try:
        with opened(path) as file:
            end = file.seek(0, os.SEEK_END)
            place = file.seek(0)
            while place < end:
                length = _length(file.read(_HEADER.size), f"{path}, byte {place:,}")
                start = place + _HEADER.size
                place = start + length + _FOOTER
                if place > end:
                    raise UserError(
                        f"{path} is cut off: its last record ends at byte {place:,} of {end:,}; "
                        "get the file again"
                    )
                where = f"{path}, byte {start:,}"
                found, texts = ((), ()) if labels == 0 else _labels(file, length, where)
                yield start, length, found, texts
                file.seek(place)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _length(header: bytes, where: str) -> int:
    if len(header) == _HEADER.size:
        length, checksum = _HEADER.unpack(header)
        if _masked_crc32c(header[:8]) == checksum and length < _MOST:
            return length
    raise UserError(f"{where}: no TFRecord begins here; expected an uncompressed TFRecord file")


def _labels(file: BinaryIO, length: int, where: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The labels of the record that begins here, and their texts."""
    first = file.read(min(length, _FIRST))
    size, begin = _varint(first, 1) if first[:1] == bytes([_CONTEXT]) else (0, 0)
    # The context is a message of its own, and nearly always the first; the frames are long.
    needed = begin + size if begin else length
    if needed > len(first):
        first += file.read(min(needed, length) - len(first))
    context = _parsed(first[:needed], where).context.feature
    kinds = [kind.name for kind, _ in context[LABELS].ListFields()] if LABELS in context else []
    if kinds not in ([], ["int64_list"]):
        raise UserError(f"{where}: {LABELS} is a {kinds[0]}; expected an int64_list")
    found = tuple(context[LABELS].int64_list.value) if LABELS in context else ()
    wrong = next((label for label in found if not 0 <= label <= LARGEST), None)
    if wrong is not None:
        raise UserError(f"{where}: label {wrong}; expected 0 to {LARGEST}")
    texts = context[TEXTS].bytes_list.value if TEXTS in context else ()
    return found, tuple(text.decode(errors="replace") for text in texts)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number that begins at a place, and the place after it."""
    value = shift = 0
    while place < len(data):
        value |= (data[place] & 127) << shift
        place, shift = place + 1, shift + 7
        if data[place - 1] < 128:
            break
    return value, place


def _names(
    source: str, labels: Sequence[tuple[int, ...]], texts: Sequence[tuple[str, ...]]
) -> tuple[str, ...] | None:
    """The classes by number, if each has one label whose text is always the same."""
    if any(len(each) != 1 for each in (*labels, *texts)):
        return None
    names: dict[int, str] = {}
    for (label,), (text,) in zip(labels, texts, strict=True):
        if names.setdefault(label, text) != text:
            raise UserError(
                f"{source}: class {label} is {quoted(names[label])} and {quoted(text)} in {TEXTS}"
            )
    whole = sorted(names) == [*range(len(names))] and len({*names.values()}) == len(names)
    return tuple(names[k] for k in range(len(names))) if whole else None


def _parsed(content: bytes, where: str) -> Any:
    try:
        return _message().FromString(content)
    except DecodeError as error:
        raise VideoError(f"{where}: not a SequenceExample: {error}") from None


@functools.cache
def _message() -> Any:
    """The class of SequenceExample messages, as tensorflow/core/example/example.proto has them."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="vivit_jax/sequence_example.proto", package="vivit_jax", syntax="proto3"
    )

    def message(name: str, *fields: tuple[str, int, Any, bool], within: Any = file) -> Any:
        add = within.message_type if within is file else within.nested_type
        made = add.add(name=name)
        for label, number, kind, repeated in fields:
            made.field.add(
                name=label,
                number=number,
                type=field.TYPE_MESSAGE if isinstance(kind, str) else kind,
                type_name=f".vivit_jax.{kind}" if isinstance(kind, str) else None,
                label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
            )
        return made

    def mapping(name: str, key: str, value: str) -> None:
        entry = f"{key.title().replace('_', '')}Entry"  # as a map's has to be called
        outer = message(name, (key, 1, f"{name}.{entry}", True))
        kinds = (("key", 1, field.TYPE_STRING, False), ("value", 2, value, False))
        message(entry, *kinds, within=outer).options.map_entry = True

    message("BytesList", ("value", 1, field.TYPE_BYTES, True))
    message("FloatList", ("value", 1, field.TYPE_FLOAT, True))
    message("Int64List", ("value", 1, field.TYPE_INT64, True))
    kinds = ("bytes_list", "float_list", "int64_list")
    lists = ("BytesList", "FloatList", "Int64List")
    each = [(n, k, t, False) for k, (n, t) in enumerate(zip(kinds, lists, strict=True), 1)]
    message("Feature", *each)
    message("FeatureList", ("feature", 1, "Feature", True))
    mapping("Features", "feature", "Feature")
    mapping("FeatureLists", "feature_list", "FeatureList")
    message(
        "SequenceExample",
        ("context", 1, "Features", False),
        ("feature_lists", 2, "FeatureLists", False),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("vivit_jax.SequenceExample")
    return message_factory.GetMessageClass(found)


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _masked_crc32c(data: bytes) -> int:
    """The checksum that TFRecords hold: CRC-32C, turned and shifted."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

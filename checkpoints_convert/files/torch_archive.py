# SPDX-License-Identifier: Apache-2.0
"""torch's zip archives, checked part by part: the directory, local headers and checksums.

torch maps such a file into memory and trusts its headers; a damaged header then gives wrong numbers
and no error. Here the directory and the headers must agree before anything is loaded, and each
tensor's bytes are compared with their checksum as they are read. Plain reads keep only that tensor
in memory.
"""

import dataclasses
import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vivit_jax.errors import CheckpointError, first_line
from vivit_jax.files.limits import check_unpacked

_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_STEP = 2**20
_SPARSE = b"ctorch._utils\n_rebuild_sparse_tensor\n"  # as pickles name a function
_STANDS_IN = b"ccheckpoints_convert\nSparseTensor\n"


class SparseTensor:
    """Stands for a sparse tensor, whose data is not read."""

    def __init__(self, *_):
        pass


@dataclasses.dataclass(frozen=True)
class Record:
    """A file of an archive: where its bytes are, and their checksum if there is one."""

    name: str
    begin: int
    end: int
    crc: int | None


class Archive:
    """An archive whose directory and headers agree; `pickle` is its main pickle's bytes.

    `outline` is what torch reads instead: the same pickle without the data of the storages.

    Raises ValueError, zipfile.BadZipFile and other errors of Python's reader for a damaged file,
    CheckpointError for a file that torch does not write: deflated entries, or another byte order
    than this machine's.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            self._records = _records(path, file, archive, self.size)
            top = next(iter(self._records)).partition("/")[0]
            for name, record in self._records.items():
                if not name.startswith(f"{top}/data/"):
                    _check(file, record)
            pickle = self._records.get(f"{top}/data.pkl")
            if pickle is None:
                raise ValueError("it holds no data.pkl")
            self.pickle = _bytes(file, pickle.begin, pickle.end).tobytes()
            order = self._records.get(f"{top}/byteorder")
            if order and bytes(_bytes(file, order.begin, order.end)) != b"little":
                raise CheckpointError(
                    f"{path} is not little-endian; rewrite it as safetensors on the machine that "
                    "wrote it"
                )
        data = (r for name, r in self._records.items() if name.startswith(f"{top}/data/"))
        self.outline, self._outlined = _outline(self.pickle, data)
        self._dtypes: dict[int, np.dtype] = {}
        self._sound: set[str] = set()

    def storage(self, place: int, size: int, dtype: np.dtype) -> Record:
        """The record of a storage, by its place in the outline; ValueError unless of that size."""
        record = self._outlined[place]
        if record.end - record.begin != size:
            raise ValueError(
                f"{record.name} has {record.end - record.begin} bytes, its pickle says {size}"
            )
        if self._dtypes.setdefault(place, dtype) != dtype:
            raise ValueError(f"{record.name} is stored as {self._dtypes[place]} and as {dtype}")
        return record

    def read(self, record: Record, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a record, uint8; CheckpointError where they have changed."""
        try:
            with self.path.open("rb") as file:
                whole = (start, stop) == (0, record.end - record.begin)
                if record.name not in self._sound and not whole:
                    _check(file, record)
                data = _bytes(file, record.begin + start, record.begin + stop)
            if record.name not in self._sound and whole:
                _compare(record, zlib.crc32(data.data))
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} is damaged ({first_line(error)}); copy or download it again"
            ) from None
        self._sound.add(record.name)
        return data


def _outline(pickle: bytes, data: Iterable[Record]) -> tuple[io.BytesIO, dict[int, Record]]:
    """An archive of the pickle with empty storages, and the record of each by its place.

    Loaded on "meta", which reads no storage, it gives for each tensor the place of its storage.
    torch never sees the file itself, so it cannot use another header than the ones that were
    compared.
    """
    file, places = io.BytesIO(), {}
    with zipfile.ZipFile(file, "w") as archive:
        # torch 2.14 reads the data of sparse tensors, which is missing here.
        archive.writestr("archive/data.pkl", pickle.replace(_SPARSE, _STANDS_IN))
        archive.writestr("archive/version", "3\n")
        for record in data:
            archive.writestr(f"archive/data/{record.name.partition('/data/')[2]}", b"")
            places[file.tell()] = record
    file.seek(0)
    return file, places


def _records(path: Path, file: BinaryIO, archive: zipfile.ZipFile, size: int) -> dict[str, Record]:
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    _check_end(file, archive, len(entries), size)
    names = {entry.filename.lower() for entry in entries}  # torch ignores case
    if not entries or len(names) != len(entries):
        raise ValueError("its directory is empty or repeats a name")
    # torch can skip checksums; they are 0 then.
    checked = any(entry.CRC for entry in entries)
    records = {}
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path}: {entry.filename} is compressed, which torch never writes; rewrite it "
                "with torch.save"
            )
        limit = following.header_offset if following else archive.start_dir
        begin = _begin(file, entry)
        end = begin + entry.file_size
        if entry.compress_size != entry.file_size or end > limit:
            raise ValueError(f"{entry.filename} overlaps what follows it")
        records[entry.filename] = Record(entry.filename, begin, end, entry.CRC if checked else None)
    if entries[0].header_offset:
        raise ValueError("its first entry is not at its beginning")
    return records


def _check_end(file: BinaryIO, archive: zipfile.ZipFile, count: int, size: int) -> None:
    """ValueError unless every reader finds the same directory: one end record, at the end."""
    file.seek(size - _END.size)
    mark, disk, first_disk, here, entries, length, start, comment = _END.unpack(
        file.read(_END.size)
    )
    narrow = [
        (entries, count, 0xFFFF),
        (here, count, 0xFFFF),
        (start, archive.start_dir, 2**32 - 1),
    ]
    sound = mark == b"PK\5\6" and not (disk or first_disk or comment)
    if not sound or not all(said in (found, wide) for said, found, wide in narrow):
        raise ValueError("its end and its directory disagree")


def _begin(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's data begins; ValueError if its header and the directory disagree."""
    file.seek(entry.header_offset)
    mark, _, flags, method, _, _, crc, packed, size, name, extra = _LOCAL.unpack(
        file.read(_LOCAL.size)
    )
    text, extra_fields = file.read(name), file.read(extra)
    # Entries written as a stream have their sizes after the data, and 0 here.
    elsewhere = (2**32 - 1, 0) if flags & 8 else (2**32 - 1,)
    same = [(crc, entry.CRC), (packed, entry.compress_size), (size, entry.file_size)]
    agree = all(said == found or said in elsewhere for said, found in same)
    agree = agree and (flags, method) == (entry.flag_bits, entry.compress_type) and not flags & 1
    agree = agree and _is_fields(extra_fields)
    if mark != b"PK\3\4" or not agree or _name(text) != entry.orig_filename:
        raise ValueError(f"the header of {entry.filename} and the directory disagree")
    return entry.header_offset + _LOCAL.size + name + extra


def _is_fields(extra: bytes) -> bool:
    """Whether an extra field is a list of two-byte ids, each with a length and its bytes."""
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def _name(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("cp437")


def _bytes(file: io.BufferedReader, begin: int, end: int) -> np.ndarray:
    data = np.empty(end - begin, np.uint8)
    file.seek(begin)
    if file.readinto(data.data) != data.size:
        raise ValueError("it has become shorter since it was opened")
    return data


def _check(file: io.BufferedReader, record: Record) -> None:
    crc = 0
    for begin in range(record.begin, record.end, _STEP):
        crc = zlib.crc32(_bytes(file, begin, min(begin + _STEP, record.end)).data, crc)
    _compare(record, crc)


def _compare(record: Record, crc: int) -> None:
    if record.crc not in (None, crc):
        raise ValueError(f"the checksum of {record.name} does not match its bytes")


@dataclasses.dataclass(frozen=True)
class ArchivedTensor:
    """Reads a dense tensor of an archive; `offset` and `strides` are torch's, in elements."""

    archive: Archive
    record: Record
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    negative: bool = False

    def __post_init__(self):
        """CheckpointError for a tensor far larger than the file, ValueError beyond its record."""
        count = int(np.prod(self.shape, dtype=object))
        what = f"{self.archive.path}: a tensor of shape {self.shape}"
        check_unpacked(what, count * self.dtype.itemsize, self.archive.size, CheckpointError)
        size = self.record.end - self.record.begin
        if count and self._stop() * self.dtype.itemsize > size:
            raise ValueError(f"a tensor of shape {self.shape} goes beyond {self.record.name}")

    def _stop(self) -> int:
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return self.offset + reach + 1

    def __call__(self) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        item = self.dtype.itemsize
        data = self.archive.read(self.record, self.offset * item, self._stop() * item)
        flat = data.view(self.dtype)
        strides = tuple(step * item for step in self.strides)
        array = np.lib.stride_tricks.as_strided(flat, self.shape, strides)
        array = np.ascontiguousarray(array).reshape(self.shape)
        return np.negative(array) if self.negative else array

# SPDX-License-Identifier: Apache-2.0
"""Writes an ArrayRecord shard: one record for each clip, not compressed.

Its readers give a record by its number. Ours takes the bytes from their place, also from storage,
where ArrayRecord's own does not read.
"""

import contextlib
import errno
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vivit_jax.data.packing.tar_shard import ChangedError
from vivit_jax.errors import UserError
from vivit_jax.files.parts import Part
from vivit_jax.files.reading import sha256_of

# The head of a chunk: a hash, the size of its data, another hash, its kind, and the size held.
_CHUNK = struct.Struct("<QQQBxxxxxxxQ")
_SIMPLE, _PLAIN = ord("r"), b"\0"  # a chunk of records, not compressed


class ArrayShard:
    """An ArrayRecord file that is being written; it holds the clips alone."""

    SUFFIX = ".arrayrecord"

    def __init__(self, path: Path):
        try:
            from array_record.python.array_record_module import ArrayRecordWriter
        except ImportError:
            raise UserError(
                "--format arrayrecord needs the package array_record, which there is for Linux and "
                "macOS; install it, or write tar shards"
            ) from None
        self._path, self._writer = path, ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._sizes: list[int] = []
        self.size = 0

    def add(self, name: str, size: int, file: BinaryIO) -> int:
        """Add a clip; its CRC-32. Raises ChangedError for a file that has another size."""
        data = file.read()
        if len(data) != size:
            raise ChangedError(f"it became {'longer' if len(data) > size else 'shorter'}")
        with self._errors():
            self._writer.write(data)
        self._sizes.append(size)
        self.size += size + _CHUNK.size
        return zlib.crc32(data)

    def add_text(self, name: str, text: str) -> None:
        """Nothing: what is known of a clip is in the index alone."""

    def close(self) -> tuple[list[int], int, str]:
        """End the file: where each clip begins, the file's bytes, and their SHA-256."""
        with self._errors():
            self._writer.close()
        sha256, size = sha256_of(self._path), self._path.stat().st_size
        with self._path.open("rb") as file:
            return [*_starts(file, self._sizes, str(self._path))], size, sha256

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Make the writer's errors, which are texts, those of `os`."""
        try:
            yield
        except RuntimeError as error:
            said = str(error)
            number = next((n for n in errno.errorcode if os.strerror(n) in said), errno.EIO)
            raise OSError(number, os.strerror(number), str(self._path)) from error


def _starts(file: BinaryIO, sizes: list[int], name: str):
    """Where the records of these sizes begin, by the heads of the chunks before them."""
    chunks = Part(name, 64, 0, "")  # after the file's signature, which is a chunk of its own
    offset = 0
    for size in sizes:
        place, end = chunks.place(offset), chunks.place(offset + _CHUNK.size + 16)
        file.seek(place)
        head = chunks.held(file.read(end - place), place)
        _, data_size, _, kind, _ = _CHUNK.unpack(head[: _CHUNK.size])
        inner = data_size - size  # a compression, and the size as a number of its own length
        first = head[_CHUNK.size : _CHUNK.size + 1]
        assert kind == _SIMPLE and first == _PLAIN and 3 <= inner <= 13, "as it was asked for"
        yield chunks.place(offset + _CHUNK.size + inner)
        offset += _CHUNK.size + data_size

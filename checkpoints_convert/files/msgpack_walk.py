# SPDX-License-Identifier: Apache-2.0
"""Walking a msgpack file object by object without reading large objects.

The msgpack package decodes the small ones, but it cannot walk: it skips an object by reading it
into memory.
"""

import os
from typing import Any, BinaryIO

from msgpack import unpackb


def _first_bytes() -> dict[int, tuple[str, int, int]]:
    """What an object's first byte says: the kind, the bytes of a length field, or the length."""
    table = {}
    for first, count, kind in ((0x80, 16, "map"), (0x90, 16, "array"), (0xA0, 32, "string")):
        table |= {first + n: (kind, 0, n) for n in range(count)}
    for first, kind, widths in (
        (0xC4, "bytes", (1, 2, 4)),
        (0xC7, "extension", (1, 2, 4)),
        (0xD9, "string", (1, 2, 4)),
        (0xDC, "array", (2, 4)),
        (0xDE, "map", (2, 4)),
    ):
        table |= {first + i: (kind, width, 0) for i, width in enumerate(widths)}
    table |= {0xD4 + i: ("extension", 0, 1 << i) for i in range(5)}
    table |= {first: ("value", 0, 0) for first in (*range(0x80), *range(0xE0, 0x100))}
    table |= {first: ("value", 0, 0) for first in (0xC0, 0xC2, 0xC3)}  # None, False, True
    sizes = (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)  # two floats, four unsigned and four signed integers
    return table | {0xCA + i: ("value", 0, size) for i, size in enumerate(sizes)}


_FIRST_BYTES = _first_bytes()


def begins_map(data: bytes) -> bool:
    """Whether these bytes start like a msgpack map."""
    return bool(data) and _FIRST_BYTES.get(data[0], ("",))[0] == "map"


class Walk:
    """A position in a msgpack file. Methods raise ValueError where the file is damaged."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    @property
    def at(self) -> int:
        """The position in bytes."""
        return self._file.tell()

    @property
    def ended(self) -> bool:
        """Whether all of the file has been walked."""
        return self.at == self._size

    def head(self) -> tuple[str, int, int]:
        """Pass an object's head: its kind, where it began, and its length.

        The length is in objects for an array, in pairs for a map, else in bytes. The type of an
        extension is one more byte after the head.
        """
        start = self.at
        first = self.take(1)[0]
        if first not in _FIRST_BYTES:
            raise ValueError(f"no object begins at byte {start}")
        kind, width, length = _FIRST_BYTES[first]
        return kind, start, int.from_bytes(self.take(width), "big") if width else length

    def expect(self, kind: str, length: int | None = None) -> int:
        """Pass the head of an object that must be of this kind and length; returns its length."""
        got, start, n = self.head()
        if got != kind or (length is not None and n != length):
            raise ValueError(f"{got} of length {n} at byte {start}, expected {kind}")
        return n

    def decoded(self, start: int, length: int) -> Any:
        """The Python value of the object whose head, begun at `start`, was passed last."""
        end = self._within(length)
        self._file.seek(start)
        return unpackb(self.take(end - start))

    def decode(self) -> Any:
        """Pass a small object other than an extension; returns its Python value."""
        _, start, length = self.head()
        return self.decoded(start, length)

    def take(self, length: int) -> bytes:
        """Pass and return the next bytes."""
        self._within(length)
        return self._file.read(length)

    def skip(self, length: int) -> None:
        """Pass the next bytes without reading them."""
        self._file.seek(self._within(length))

    def _within(self, length: int) -> int:
        end = self.at + length
        if end > self._size:
            raise ValueError(f"it ends at byte {self._size}, within an object")
        return end

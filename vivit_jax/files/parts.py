# SPDX-License-Identifier: Apache-2.0
"""Paths of parts of files: a clip within a shard, such as k400-000003.tar@1536+90112/000000012.mp4.

That is the shard, the part's first byte and its length, and a name whose ending says what it holds.
It is a path like any other wherever clips are read: absolute, relative to the root of a list, or at
an address.
"""

import os
import re
from typing import Any, NamedTuple

from vivit_jax.files.addresses import is_address

SHARDS = (".tar", ".arrayrecord", ".array_record")  # endings
# An ArrayRecord file consists of blocks, each with a head that is no part of what it holds.
_BLOCK, _HEAD = 2**16, 24  # bytes
_ENDINGS = "|".join(map(re.escape, SHARDS))
_PART = re.compile(rf"(.+?(?:{_ENDINGS}))@([0-9]+)\+([0-9]+)/(.+)", re.DOTALL | re.IGNORECASE)


class Part(NamedTuple):
    """Bytes of a file.

    Attributes:
        file: path or address.
        start: the first of the bytes.
        length: how many they are, without what the file's format puts between them.
        name: what they hold.
    """

    file: str
    start: int
    length: int
    name: str

    @property
    def in_blocks(self) -> bool:
        """Whether the file's format puts heads between the bytes."""
        return not self.file.lower().endswith(".tar")

    def place(self, offset: int) -> int:
        """Where in the file a byte of the part lies."""
        if not self.in_blocks:
            return self.start + offset
        before = self.start - _HEAD * (self.start // _BLOCK + 1)  # bytes that are held
        block, rest = divmod(before + offset, _BLOCK - _HEAD)
        return block * _BLOCK + _HEAD + rest

    def held(self, data: bytes, place: int) -> bytes:
        """What belongs to the part of `data` that was read from a place in the file."""
        if not self.in_blocks:
            return data
        heads = range(-place % _BLOCK, len(data), _BLOCK)
        starts, ends = [0, *(head + _HEAD for head in heads)], [*heads, len(data)]
        return b"".join(data[a:b] for a, b in zip(starts, ends, strict=True))

    def __str__(self) -> str:
        return f"{self.file}@{self.start}+{self.length}/{self.name}"


def part_of(path: Any) -> Part | None:
    """The part that a path names; None for the path of a whole file."""
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else b""
    if not isinstance(name, str) or "@" not in name:
        return None
    found = _PART.fullmatch(name)
    return found and Part(found[1], int(found[2]), int(found[3]), found[4])


def in_ranges(path: Any) -> bool:
    """Whether a file is read by ranges: it is at an address, or a part of another one."""
    return is_address(path) or part_of(path) is not None

# SPDX-License-Identifier: Apache-2.0
"""Files of object stores and of the web, and parts of any, read by ranges: only what is asked for.

A block is read once for all that read it at about the same time: a video is opened several times to
read one clip. `RangeFile.blank` lets an index be read without what it points to.
"""

import collections
import errno
import functools
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from vivit_jax.files import block_cache, storage
from vivit_jax.files.addresses import is_address
from vivit_jax.files.limits import unpack_limit
from vivit_jax.files.parts import part_of

BLOCK = 2**18  # bytes
_MOST_AHEAD = 16  # blocks, of a file that is read from one end to the other
_HELD = 256  # blocks in memory, for all files
_FRESH = 30.0  # seconds for which a file is taken to be unchanged
_WHOLE = "whole at "  # begins the tags of files of which there are copies
_one_place = threading.Lock()  # of all copies
_SEEK_SIZE = 0x10000  # FFmpeg's whence that asks for the size


class _Blocks:
    """The blocks that were used last, by (address, tag, number)."""

    def __init__(self):
        self._held: collections.OrderedDict[tuple[str, str, int], bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str, int]) -> bytes | None:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: tuple[str, str, int], data: bytes) -> None:
        with self._lock:
            self._held[key] = data
            while len(self._held) > _HELD:
                self._held.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._held.clear()


_blocks = _Blocks()


@functools.lru_cache(maxsize=1024)
def _state(address: str, period: int) -> storage.State:
    try:
        return storage.state(address)
    except storage.NoRanges:
        size = os.fstat(_whole(address, period).fileno()).st_size
        return storage.State(size, f"{_WHOLE}{period}")


@functools.lru_cache(maxsize=4)
def _whole(address: str, period: int) -> BinaryIO:
    """A copy of a file from a server that gives whole files only."""
    file = tempfile.TemporaryFile(prefix="vivit-jax-")  # noqa: SIM115 (the cache holds it)
    storage.copy_whole(address, file, unpack_limit())
    file.flush()
    return file


def recent_state(address: str) -> storage.State:
    """`storage.state`, asked for again after half a minute; also of a part of any file.

    Raises OSError for a part past the end of its file.
    """
    part = part_of(address)
    if part is None:
        return _state(address, int(time.monotonic() / _FRESH))
    if is_address(part.file):
        size, tag = recent_state(part.file)
    else:
        found = os.stat(part.file)
        size, tag = found.st_size, str(found.st_mtime_ns)
    end = part.place(part.length - 1) + 1 if part.length else part.start
    if end > size:
        raise OSError(errno.EIO, f"cut off: its shard has {size:,} bytes of {end:,} or more")
    return storage.State(part.length, tag)


def forget() -> None:
    """Take nothing that was read before for what is stored now."""
    _blocks.clear()
    _state.cache_clear()
    _whole.cache_clear()


class RangeFile(io.RawIOBase):
    """A seekable file of bytes at an address, or of a part of any file.

    Raises as `storage.state` does. FFmpeg and Pillow read it, several of them at the same time by
    several of these.
    """

    def __init__(self, address: str):
        self.name, self._state = address, recent_state(address)
        self._part = part_of(address)
        self._file = address if self._part is None else self._part.file
        local = not is_address(self._file)
        self._local: Any = open(self._file, "rb", buffering=0) if local else None  # noqa: SIM115
        self._place, self._ahead, self._next = 0, 1, -1
        tag = self._state.tag
        self._whole = (
            _whole(self._file, int(tag[len(_WHOLE) :])) if tag.startswith(_WHOLE) else None
        )
        self._is_blank: Callable[[int, int], bool] | None = None

    def close(self) -> None:
        """Close the file."""
        local = getattr(self, "_local", None)  # also where there was no file to open
        if local is not None:
            local.close()
        super().close()

    @property
    def size(self) -> int:
        return self._state.size

    def blank(self, is_blank: Callable[[int, int], bool] | None) -> None:
        """Give zeros for what `is_blank(start, end)`, without reading it; None ends that."""
        self._is_blank = is_blank

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == _SEEK_SIZE:
            return self.size
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence & 3]
        if base + offset < 0:
            raise OSError(f"{self.name}: a place before its start")
        self._place = base + offset
        return self._place

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        start, end = self._place, min(self._place + len(view), self.size)
        if start >= end:
            return 0
        if self._is_blank is not None and self._is_blank(start, end):
            view[: end - start] = bytes(end - start)
        elif self._local is not None:
            view[: end - start] = self._span(self._read_local, start, end)
        else:
            end = min(end, (start // BLOCK + 1) * BLOCK)  # callers ask for the rest
            block = self._block(start // BLOCK)
            view[: end - start] = block[start % BLOCK : start % BLOCK + end - start]
        self._place = end
        return end - start

    def _span(self, read: Callable[[int, int], bytes], start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, where `read` gives those of the file it lies in."""
        if self._part is None:
            return read(start, end)
        first, last = self._part.place(start), self._part.place(end - 1) + 1
        return self._part.held(read(first, last), first)

    def _read_stored(self, start: int, end: int) -> bytes:
        return storage.read_range(self._file, start, end)

    def _read_local(self, start: int, end: int) -> bytes:
        self._local.seek(start)
        data = self._local.read(end - start)
        if len(data) < end - start:
            raise OSError(errno.EIO, "cut off while it was read")
        return data

    def _read_whole(self, start: int, end: int) -> bytes:
        assert self._whole is not None, "there is a copy"
        with _one_place:
            self._whole.seek(start)
            return self._whole.read(end - start)

    def _block(self, number: int) -> bytes:
        if self._whole is not None:
            start = number * BLOCK
            return self._span(self._read_whole, start, min(self.size, start + BLOCK))
        key = self.name, self._state.tag, number
        data = _blocks.get(key)
        if data is not None:
            return data
        data = block_cache.get(*key)
        if data is not None:
            storage.TRAFFIC.add(bytes_cached=len(data))
            _blocks.put(key, data)
            return data
        # A file read in order comes in fewer and fewer requests.
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if number == self._next else 1
        count = min(self._ahead, -(-self.size // BLOCK) - number)
        self._next = number + count
        end = min(self.size, self._next * BLOCK)
        data = self._span(self._read_stored, number * BLOCK, end)
        for k in range(count):
            piece = data[k * BLOCK : (k + 1) * BLOCK]
            _blocks.put((self.name, self._state.tag, number + k), piece)
            block_cache.put(self.name, self._state.tag, number + k, piece)
        return data[:BLOCK]

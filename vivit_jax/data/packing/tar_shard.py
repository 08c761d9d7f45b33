# SPDX-License-Identifier: Apache-2.0
"""Writes a tar shard whose bytes depend on its members only."""

import hashlib
import io
import tarfile
import zlib
from typing import Any, BinaryIO

from vivit_jax.errors import UserError


class _Hashed:
    """A file that is only written to, with a hash of all that was."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest, self._done = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._digest.update(data)
        self._done += len(data)
        return len(data)

    def tell(self) -> int:
        return self._done

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class _Checked:
    """A file that is read once, with a checksum of all that was."""

    def __init__(self, file: BinaryIO):
        self._file, self.crc32 = file, 0

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self.crc32 = zlib.crc32(data, self.crc32)
        return data


class TarShard:
    """A tar file that is being written; members have no dates and no owners."""

    SUFFIX = ".tar"

    def __init__(self, file: BinaryIO):
        self._out = _Hashed(file)
        written: Any = self._out  # it is not read
        self._tar = tarfile.TarFile(fileobj=written, mode="w", format=tarfile.PAX_FORMAT)

    @property
    def size(self) -> int:
        """The bytes so far."""
        return self._out.tell()

    @property
    def sha256(self) -> str:
        """Of the closed shard."""
        return self._out.sha256

    def add(self, name: str, size: int, file: BinaryIO) -> tuple[int, int]:
        """Add a member. Its first byte's place, and its CRC-32.

        Raises UserError for a file that has become shorter than `size`.
        """
        member = tarfile.TarInfo(name)
        member.size = size
        checked: Any = _Checked(file)
        try:
            self._tar.addfile(member, checked)
        except OSError as error:
            if error.errno is not None:
                raise
            raise UserError(f"{name}: its file became shorter while it was packed") from None
        padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded, checked.crc32

    def add_bytes(self, name: str, data: bytes) -> None:
        """Add a small member."""
        self.add(name, len(data), io.BytesIO(data))

    def close(self) -> None:
        """Write the end mark."""
        self._tar.close()

# SPDX-License-Identifier: Apache-2.0
"""Writes a tar shard whose bytes depend on its members only."""

import io
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from vivit_jax.errors import UserError
from vivit_jax.files.reading import sha256_of


class ChangedError(UserError):
    """A clip's file that changed after it was checked; says how."""


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

    def __init__(self, path: Path):
        self._path, self._starts = path, []
        self._tar = tarfile.TarFile(path, mode="w", format=tarfile.PAX_FORMAT)

    @property
    def size(self) -> int:
        """The bytes so far."""
        return self._tar.offset

    def add(self, name: str, size: int, file: BinaryIO) -> int:
        """Add a clip; its CRC-32. Raises ChangedError for a file that has another size."""
        checked = self._add(name, size, file)
        padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._starts.append(self._tar.offset - padded)
        return checked.crc32

    def add_text(self, name: str, text: str) -> None:
        """Add what is known of a clip."""
        data = text.encode()
        self._add(name, len(data), io.BytesIO(data))

    def _add(self, name: str, size: int, file: BinaryIO) -> _Checked:
        member = tarfile.TarInfo(name)
        member.size = size
        checked: Any = _Checked(file)
        try:
            self._tar.addfile(member, checked)
        except OSError as error:
            if error.errno is not None:
                raise
            raise ChangedError("it became shorter") from None
        if file.read(1):
            raise ChangedError("it became longer")
        return checked

    def close(self) -> tuple[list[int], int, str]:
        """End the file: where each clip begins, the file's bytes, and their SHA-256."""
        self._tar.close()
        return self._starts, self._path.stat().st_size, sha256_of(self._path)

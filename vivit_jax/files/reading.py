# SPDX-License-Identifier: Apache-2.0
"""The one way to look at and read a file or directory, whether it is local or in storage.

Paths are texts; `vivit_jax.files.addresses` says which are addresses. Errors are those of `os`, or
StorageError for storage that cannot be reached.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from vivit_jax.files import storage
from vivit_jax.files.addresses import address_text, is_address
from vivit_jax.files.parts import in_ranges, part_of
from vivit_jax.files.ranges import RangeFile, recent_state
from vivit_jax.files.storage import Entry


def opened(path: str | os.PathLike) -> io.BufferedReader:
    """A file for reading, seekable; of storage only the parts are fetched that are read."""
    if not in_ranges(path):
        return open(path, "rb")
    file: Any = RangeFile(address_text(path))
    return io.BufferedReader(file, 2**16)


def opened_text(path: str | os.PathLike, newline: str | None = None) -> TextIO:
    """A text file for reading; bytes that are not UTF-8 are preserved."""
    how: Any = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    return io.TextIOWrapper(opened(path), **how)


def content(path: str | os.PathLike) -> bytes:
    """All bytes of a small file."""
    with opened(path) as file:
        return file.read()


def sha256_of(path: str | os.PathLike) -> str:
    """Of a file's content, in hexadecimal digits."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: str | os.PathLike) -> int:
    """The size of a file in bytes."""
    return recent_state(address_text(path)).size if in_ranges(path) else os.path.getsize(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a directory."""
    if part_of(path) is not None:
        return is_file(path)
    return storage.exists(address_text(path)) if is_address(path) else os.path.exists(path)


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a regular file."""
    if not in_ranges(path):
        return os.path.isfile(path)
    try:
        recent_state(address_text(path))
    except (FileNotFoundError, IsADirectoryError):
        return False
    return True


def is_directory(path: str | os.PathLike) -> bool:
    """Whether there is a directory."""
    if part_of(path) is not None:
        return False
    return storage.is_directory(address_text(path)) if is_address(path) else os.path.isdir(path)


def listed(path: str | os.PathLike) -> list[Entry]:
    """The names in a directory, sorted, and which of them are directories."""
    if is_address(path):
        return storage.entries(address_text(path))
    with os.scandir(path) as entries:
        return sorted(Entry(entry.name, entry.is_dir()) for entry in entries)


def names_in(path: str | os.PathLike) -> list[str]:
    """The names in a directory."""
    return [e.name for e in listed(path)] if is_address(path) else os.listdir(path)


def joined(root: str, path: str) -> str:
    """A path below a directory; an address, and a path from the root of the machine, is itself."""
    return path if is_address(path) else os.path.join(root, path)


def absolute(path: str) -> str:
    """The path from the root of the machine; an address is one already."""
    return address_text(path) if is_address(path) else os.path.abspath(path)


def _leads_up(folder: str, name: str) -> bool:
    """Whether a name in a folder is a link to the folder or to one above, an endless walk."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    target = os.path.join(os.path.realpath(path), "")
    return os.path.join(os.path.realpath(folder), "").startswith(target)


def walked(
    path: str, onerror: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` from a directory down: (folder, names of folders, names of files).

    Linked folders are walked too, but for links to a folder above.
    """
    if not is_address(path):
        for folder, names, files in os.walk(path, onerror=onerror, followlinks=True):
            names[:] = [name for name in names if not _leads_up(folder, name)]
            yield folder, names, files
        return
    try:
        found = listed(path)
    except OSError as error:
        onerror(error)
        return
    folders = [entry.name for entry in found if entry.is_directory]
    yield path, folders, [entry.name for entry in found if not entry.is_directory]
    for name in folders:
        yield from walked(f"{path.rstrip('/')}/{name}", onerror)

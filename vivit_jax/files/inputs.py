# SPDX-License-Identifier: Apache-2.0
"""Input files: whether a path is a regular file, checked before it is opened."""

import os
import stat

from vivit_jax.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER = 1024  # bytes, by git-lfs's specification
_SPECIAL = (
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def stand_in(path: str | os.PathLike) -> str | None:
    """What is there in place of a file, and the way out; None if there is no such thing.

    A FIFO, a socket or a device is not opened: that may block, or never end. A git-lfs pointer is
    the few lines that git keeps in place of a large file. Directories and missing files give None:
    every reader reports those itself.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    for is_kind, name in _SPECIAL:
        if is_kind(found.st_mode):
            return f"{name}, which is not opened; copy what it gives into a file"
    if stat.S_ISREG(found.st_mode) and len(_POINTER) < found.st_size <= _LARGEST_POINTER:
        try:
            with open(path, "rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    return "a git-lfs pointer, not the file itself; fetch that with: git lfs pull"
        except OSError:
            return None  # its reader reports it
    return None


def check_file(path: str | os.PathLike, error: type[UserError] = UserError) -> None:
    """Raise `error` for a `stand_in`; each reader calls this before it opens a path."""
    found = stand_in(path)
    if found is not None:
        raise error(f"{os.fsdecode(path)}: {found}")

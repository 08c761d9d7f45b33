# SPDX-License-Identifier: Apache-2.0
"""Written files: checked before the work, and never left half written."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vivit_jax.errors import UserError, WriteError
from vivit_jax.files.addresses import Address, Place, place
from vivit_jax.files.staging import Staging
from vivit_jax.files.storage import check_writable, remove, upload


def check_output(
    path: Place, suffixes: Sequence[str], overwrite: bool, flag: str = "--out"
) -> None:
    """UserError if a command could not or should not write `path`; call it before the work."""
    path = place(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(
            f"{flag} {path} ends in {path.suffix!r}; expected one of {', '.join(suffixes)}"
        )
    if isinstance(path, Address):
        check_writable(str(path.parent), flag)
        if path.exists() and not overwrite:
            raise UserError(f"{flag} {path} exists; choose another name, or pass --overwrite")
        return
    _check_name(path, f"{flag} {path}")
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{flag} {path} exists; choose another name, or pass --overwrite")
    if not os.path.isdir(path.parent):
        if os.path.exists(path.parent):
            raise UserError(f"{flag} {path}: {path.parent} is a file; expected a directory")
        raise UserError(f"{flag} {path}: there is no directory {path.parent}; make it first")
    _check_takes_files(path.parent, f"{flag} {path}")


def check_directory(path: Place, names: Sequence[str], flag: str = "--out") -> None:
    """UserError if a command could not create `path` or write files `names` in it."""
    path = place(path)
    if isinstance(path, Address):
        check_writable(str(path), flag)
        return
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        raise UserError(f"{flag} {path}: {there} is a file; expected a directory")
    # Names of directories that do not exist yet are tried in the one that does.
    for part in path.relative_to(there).parts:
        _check_name(there / part, f"{flag} {path}", is_file=False)
    for name in names:
        _check_name((path if there == path else there) / name, f"{flag} {path / name}")
    _check_takes_files(there, f"{flag} {path}")


def _check_name(path: Path, named: str, is_file: bool = True) -> None:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # mostly a name that is too long
        raise UserError(f"{named}: {error.strerror}; choose another name") from error
    if is_file and os.path.isdir(path):
        raise UserError(f"{named} is a directory; expected a file name")


def _check_takes_files(directory: Path, named: str) -> None:
    # Permission bits do not tell: a file system may be read-only or take no files at all.
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"{named}: no file can be made in {directory} ({error.strerror}); choose another place"
        ) from error


@contextlib.contextmanager
def whole_file(path: Place) -> Iterator[Path]:
    """A name like `path` in a hidden directory; its file moves to `path` after the block.

    For an address the directory is a temporary one, and the file is uploaded.
    """
    with whole_files(path) as (partial,):
        yield partial


@contextlib.contextmanager
def whole_files(key: Place, *others: Place, drop: Sequence[Place] = ()) -> Iterator[list[Path]]:
    """`whole_file` for several files of one directory, which move all together or not at all.

    The `key` file stands for the set: it is missing while the others change. Files to `drop` leave
    with those that are replaced. WriteError if the disk is full. In storage the key file is the
    first to leave and the last to come.
    """
    paths = [place(path) for path in (key, *others)]
    key = paths[0]
    if isinstance(key, Address):
        with tempfile.TemporaryDirectory(prefix="vivit-jax-") as directory:
            partial = [Path(directory, path.name) for path in paths]
            with writing_here(str(key)):
                yield partial
            if len(paths) > 1 or drop:
                for path in (key, *drop):
                    remove(str(path))
            for file, path in reversed([*zip(partial, paths, strict=True)]):
                if file.exists():
                    upload(file, str(path))
        return
    with writing(key), Staging(key.parent) as staging:
        yield [staging.new / path.name for path in paths]
        staging.move_in(key.name, outgoing=[path.name for path in (*paths, *drop)])


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk, in the block, into a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        found = write_error(path, error)
        if found is error:
            raise
        raise found from error


@contextlib.contextmanager
def writing_here(name: str) -> Iterator[None]:
    """Turn a full temporary directory, in the block that writes `name` there, into a WriteError."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in _NO_ROOM:
            raise
        raise WriteError(
            f"{name}: {tempfile.gettempdir()}, where it is written first, takes no more "
            f"({os.strerror(error.errno)}); make room, or name another TMPDIR"
        ) from error


def write_error(path: Path, error: OSError) -> OSError | WriteError:
    """The WriteError for a disk that is full or takes no more; any other error as it is."""
    if error.errno is None or error.errno not in _NO_ROOM:
        return error
    return WriteError(
        f"{path} cannot be written: {os.strerror(error.errno)}; make room, or choose another place"
    )


# A limit on a file or an account gives another error than a full disk; what helps is the same.
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}


def write_json(path: Place, values: dict[str, Any]) -> None:
    """Write plain values as a JSON file, completely or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

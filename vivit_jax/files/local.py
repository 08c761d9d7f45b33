# SPDX-License-Identifier: Apache-2.0
"""Local files of what is none yet: bytes, open files and links, copied for the time of a block.

Readers that open paths only get a copy of anything else in a temporary file, of at most
`limits.unpack_limit` bytes. Videos at an address need none: `vivit_jax.files.ranges`.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from vivit_jax.errors import UserError, first_line, quoted
from vivit_jax.files import storage
from vivit_jax.files.addresses import address_text
from vivit_jax.files.limits import VARIABLE, unpack_limit
from vivit_jax.files.parts import in_ranges
from vivit_jax.files.ranges import RangeFile

_ARRAY = b"\x93NUMPY"
_PIECE = 2**20


def is_link(source: Any) -> bool:
    """Whether a text is a link such as https://x.org/a.mp4, and no file of that name exists."""
    return isinstance(source, str) and in_ranges(source) and not os.path.exists(source)


def is_open_file(source: Any) -> bool:
    """Whether it can be read like an open file."""
    return callable(getattr(source, "read", None))


def shown(source: Any) -> str:
    """What messages call it: a link without its password and query, which may be secret."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source):,} bytes"
    if is_open_file(source):
        name = getattr(source, "name", None)
        return f"the open file {name}" if isinstance(name, str) else f"a {type(source).__name__}"
    if is_link(source):
        return quoted(storage.shown(source))
    return os.fsdecode(source)


@contextlib.contextmanager
def local_file(
    source: Any, error: type[UserError] = UserError, name: str | None = None, whole: bool = False
) -> Iterator[str]:
    """The path of a file with the content of `source`, for the time of the block.

    A path is itself, and so is the address of a video, which is read by ranges. Bytes, an open
    binary file (read from where it stands) and an array at an address are copied, with `whole` all
    that is not a local file; the copy is removed after the block. `error`s of the block call it
    `name`, by default as `shown` does.
    Raises `error` for more bytes than `unpack_limit`, and for what cannot be read or fetched.
    """
    content = isinstance(source, bytes | bytearray | memoryview)
    if not content and not is_open_file(source) and not is_link(source):
        yield source
        return
    name = shown(source) if name is None else name
    if is_link(source) and not whole and not _holds_array(address_text(source), name, error):
        try:
            yield address_text(source)
        except error as found:
            raise type(found)(str(found).replace(address_text(source), name)) from found
        return
    with tempfile.TemporaryDirectory(prefix="vivit-jax-") as directory:
        path = os.path.join(directory, "copy")
        with open(path, "xb") as copy:
            if content:
                _check_size(len(source), name, error)
                copy.write(source)
            elif is_open_file(source):
                _copy(source, copy, name, error)
            else:
                _fetch(address_text(source), copy, name, error)
        with open(path, "rb") as copy:  # readers of arrays go by the ending
            if copy.read(len(_ARRAY)) == _ARRAY:
                path = shutil.move(path, f"{path}.npy")
        try:
            yield path
        except error as found:
            raise type(found)(str(found).replace(path, name)) from found


def _check_size(size: int, name: str, error: type[UserError]) -> None:
    limit = unpack_limit()
    if size > limit:
        raise error(
            f"{name}: {size:,} bytes or more; expected at most {limit:,}: save it as a file, or "
            f"raise the environment's {VARIABLE}"
        )


def _holds_array(address: str, name: str, error: type[UserError]) -> bool:
    with _fetching(address, name, error), RangeFile(address) as file:
        return file.read(len(_ARRAY)) == _ARRAY


def _fetch(address: str, copy: BinaryIO, name: str, error: type[UserError]) -> None:
    """Copy what an address holds."""
    with _fetching(address, name, error), RangeFile(address) as file:
        _check_size(file.size, name, error)
        shutil.copyfileobj(file, copy, _PIECE)


@contextlib.contextmanager
def _fetching(address: str, name: str, error: type[UserError]) -> Iterator[None]:
    """Turn what goes wrong with an address into `error`."""
    try:
        yield
    except OSError as why:
        raise error(f"{name}: {why.strerror}") from None
    except UserError as why:
        raise error(str(why).replace(address, name)) from None


def _copy(file: Any, copy: BinaryIO, name: str, error: type[UserError]) -> None:
    done = 0
    while True:
        try:
            piece = file.read(_PIECE)
        except Exception as why:  # of any library
            raise error(f"{name}: reading it failed: {first_line(why)}") from why
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise error(
                f"{name}: reading it gives {type(piece).__name__}; expected bytes: open it in "
                "binary mode"
            )
        if not len(piece):
            return
        done += len(piece)
        _check_size(done, name, error)
        copy.write(piece)

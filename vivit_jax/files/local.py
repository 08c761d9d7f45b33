# SPDX-License-Identifier: Apache-2.0
"""Local files of what is none yet: bytes, open files and links, copied for the time of a block.

Readers open paths only: they check what stands there, and FFmpeg gets no protocol but `file`. So
anything else is copied into a temporary file first, at most `limits.unpack_limit` bytes of it.
Links of http and https are fetched by Python itself, and never lead to another protocol; those of
other protocols by fsspec, for which most need a package of their own. Chains of protocols
(`zip://...::s3://...`) are refused.
"""

import contextlib
import http.client
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, BinaryIO

from vivit_jax.errors import UserError, first_line, quoted
from vivit_jax.files.limits import VARIABLE, unpack_limit
from vivit_jax.version import __version__

# A single letter is a drive of Windows.
_LINK = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.")
_ARRAY = b"\x93NUMPY"
_SECONDS = 60  # of silence, after which a server is given up
_PIECE = 2**20


def is_link(source: Any) -> bool:
    """Whether a text is a link such as https://x.org/a.mp4, and no file of that name exists."""
    return isinstance(source, str) and bool(_LINK.match(source)) and not os.path.exists(source)


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
        try:
            parts = urllib.parse.urlsplit(source)
        except ValueError:
            return "a malformed link"
        host = parts.netloc.rpartition("@")[2]
        return quoted(urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", "")))
    return os.fsdecode(source)


@contextlib.contextmanager
def local_file(
    source: Any, error: type[UserError] = UserError, name: str | None = None
) -> Iterator[str]:
    """The path of a file with the content of `source`, for the time of the block.

    A path is itself. Bytes, an open binary file (read from where it stands) and a link are copied;
    the copy is removed after the block, and `error`s of the block call it `name`, by default as
    `shown` does. Raises `error` for more bytes than `unpack_limit`, and for what cannot be read or
    fetched.
    """
    content = isinstance(source, bytes | bytearray | memoryview)
    if not content and not is_open_file(source) and not is_link(source):
        yield source
        return
    name = shown(source) if name is None else name
    with tempfile.TemporaryDirectory(prefix="vivit-jax-") as directory:
        path = os.path.join(directory, "copy")
        with open(path, "xb") as copy:
            if content:
                _check_size(len(source), name, error)
                copy.write(source)
            else:
                with _opened(source, name, error) as file:
                    _copy(file, copy, name, error)
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


@contextlib.contextmanager
def _opened(source: Any, name: str, error: type[UserError]) -> Iterator[Any]:
    """An open file itself, or the open content of a link."""
    if is_open_file(source):
        yield source
        return
    found = _LINK.match(source)
    assert found is not None  # is_link
    protocol = found[1].lower()
    opened = (
        _from_web(source, name, error)
        if protocol in ("http", "https")
        else _by_fsspec(source, protocol, name, error)
    )
    with opened as file:
        yield file


def _from_web(link: str, name: str, error: type[UserError]) -> Any:
    try:
        request = urllib.request.Request(link, headers={"User-Agent": f"vivit_jax/{__version__}"})
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as why:
        raise error(f"{name}: the server answers {why.code} {why.reason}; check the link") from None
    except (OSError, ValueError, http.client.HTTPException) as why:
        reason = first_line(getattr(why, "reason", why))
        way_out = "check the link and the network"
        raise error(f"{name}: cannot be fetched: {reason}; {way_out}") from None
    size = answer.headers.get("Content-Length", "")
    if size.isdigit():
        try:
            _check_size(int(size), name, error)
        except UserError:
            answer.close()
            raise
    return answer


def _by_fsspec(link: str, protocol: str, name: str, error: type[UserError]) -> Any:
    if "::" in link:
        raise error(f"{name}: a chain of protocols; expected one link, or download the file")
    import fsspec

    if protocol not in fsspec.available_protocols():
        raise error(
            f"{name}: {protocol} is no protocol that is known; expected http, https or one of "
            "fsspec.available_protocols(), or download the file"
        )
    try:
        opened: Any = fsspec.open(link, "rb")
        return opened.open()
    except ImportError as why:  # the protocol's own package
        raise error(
            f"{name}: the protocol {protocol} needs another package ({first_line(why)}); install "
            "it, or download the file"
        ) from why
    except Exception as why:  # each protocol raises errors of its own
        raise error(f"{name}: cannot be opened: {type(why).__name__}: {first_line(why)}") from why

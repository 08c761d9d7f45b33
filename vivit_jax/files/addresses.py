# SPDX-License-Identifier: Apache-2.0
"""Addresses of files in object stores and on the web, such as gs://bucket/run/model.json.

An address is a text wherever one is kept or shown. Code that also handles local paths takes a
`Place`: `place(text)` is an `Address`, with the part of `Path`'s interface that is used here, or a
`Path`.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vivit_jax.errors import UserError
from vivit_jax.files import storage

# A Path keeps one of two slashes. A single letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?://(?=.)|/(?=[^/]))")
# Of other protocols three slashes are usual, as in file:///tmp and hdfs:///tmp, and a name may end
# in a colon.
_NO_BUCKET = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}|(?:gs|gcs|s3|s3a|hf|https?):(?:///.*)?")


def is_address(path: Any) -> bool:
    """Whether a path is an address rather than a local path, even if it was made a Path."""
    if isinstance(path, Address):
        return True
    if not isinstance(path, str | os.PathLike):
        return False
    name = os.fspath(path)
    return isinstance(name, str) and ":/" in name and bool(_ADDRESS.match(name))


def names_no_bucket(path: str) -> bool:
    """Whether a path begins as an address and ends before it names a bucket or a server."""
    return bool(_NO_BUCKET.fullmatch(path))


def address_text(path: Any) -> str:
    """The text of an address, with the slash that `Path` drops."""
    return _ADDRESS.sub(lambda found: f"{found[1].lower()}://", os.fspath(path), count=1)


def place(path: "str | os.PathLike[str] | Address") -> "Place":
    """The local path or the address that a text names."""
    if isinstance(path, Address):
        return path
    return Address(path) if is_address(path) else Path(path)


def refuse_address(path: Any, flag: str, way_out: str) -> None:
    """UserError if a path that has to be local is an address."""
    if is_address(path):
        raise UserError(f"{flag} {address_text(path)} is not on this machine; {way_out}")


class Address:
    """An address, with the methods of `Path` that places need."""

    def __init__(self, path: "str | os.PathLike[str]"):
        self._text = address_text(path).rstrip("/")

    def __str__(self) -> str:
        return self._text

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"Address({self._text!r})"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Address) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __lt__(self, other: "Address") -> bool:
        return self._text < other._text

    def __truediv__(self, name: "str | os.PathLike[str]") -> "Address":
        inner = Path(name).as_posix()
        return self if inner == "." else Address(posixpath.join(self._text, inner))

    @property
    def name(self) -> str:
        head, _, name = self._text.rpartition("/")
        return "" if head.endswith("/") else name

    @property
    def suffix(self) -> str:
        return posixpath.splitext(unquote(self.name.partition("?")[0]))[1]

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def parent(self) -> "Address":
        return Address(self._text[: -len(self.name) - 1]) if self.name else self

    def with_name(self, name: str) -> "Address":
        return self.parent / name

    def exists(self) -> bool:
        return storage.exists(self._text)

    def is_dir(self) -> bool:
        return storage.is_directory(self._text)

    def is_file(self) -> bool:
        return storage.is_file(self._text)

    def iterdir(self) -> "Iterator[Address]":
        return (self / entry.name for entry in storage.entries(self._text))

    def read_bytes(self) -> bytes:
        return storage.read(self._text)


Place = Path | Address

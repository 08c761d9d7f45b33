# SPDX-License-Identifier: Apache-2.0
"""Feature files: arrays written row by row, with metadata and checksums.

A file holds `features` [rows, ...], `frame_indices` int64 [rows, t], `frame_seconds` float64
[rows, t], and metadata as a JSON object: under "vivit_jax" of a .safetensors file's metadata, or as
the array `metadata` of an .npz file. A second JSON object holds the SHA-256 of each array (its
bytes, then its dtype and shape) and of the metadata: under "vivit_jax_checksums", or as the zip's
comment.
"""

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from checkpoints_convert.files.tensors import DTYPES
from vivit_jax.errors import UserError, first_line
from vivit_jax.files.inputs import check_file
from vivit_jax.files.json_files import parse_json

SUFFIXES = (".safetensors", ".npz")
METADATA, CHECKSUMS = "vivit_jax", "vivit_jax_checksums"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class RowWriter:
    """Writes arrays with the same number of rows to `path` (.safetensors or .npz) row by row.

    Rows go to unnamed files beside it, which `finish` joins, so that memory holds one row and the
    disk briefly holds all rows twice; the safetensors library and `numpy.savez` need whole arrays.
    Use it in a `with` statement: without `finish` nothing is left behind.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, 0
        self._open = contextlib.ExitStack()
        self._parts: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def add(self, **row: np.ndarray) -> None:
        """Append one row to each array; rows have the shapes and dtypes of the first."""
        row = {name: np.ascontiguousarray(value) for name, value in row.items()}
        kinds = {name: (value.dtype, value.shape) for name, value in row.items()}
        if not self.rows:
            self._kinds = kinds
            self._parts = {name: self._unnamed() for name in row}
            self._sums = {name: hashlib.sha256() for name in row}
        elif kinds != self._kinds:
            raise ValueError(f"row {self.rows} is {kinds}, earlier ones {self._kinds}")
        for name, value in row.items():
            data = value.reshape(-1).view(np.uint8).data
            self._parts[name].write(data)
            self._sums[name].update(data)
        self.rows += 1

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Write the file."""
        # Widest dtype first, then by name, like the safetensors library, which keeps data aligned.
        names = sorted(self._kinds, key=lambda name: (-self._kinds[name][0].itemsize, name))
        text = json.dumps(metadata)
        sums = json.dumps(
            {"metadata": hashlib.sha256(text.encode()).hexdigest()}
            | {"arrays": {name: self._sum(name) for name in names}}
        )
        if self.path.suffix.lower() == ".npz":
            self._write_npz(names, text, sums)
        else:
            self._write_safetensors(names, text, sums)

    def _write_safetensors(self, names: list[str], metadata: str, sums: str) -> None:
        header: dict[str, Any] = {"__metadata__": {METADATA: metadata, CHECKSUMS: sums}}
        end = 0
        for name in names:
            dtype, shape = self._kinds[name]
            start, end = end, end + self._parts[name].tell()
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": [self.rows, *shape],
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                self._copy(name, file)

    def _write_npz(self, names: list[str], metadata: str, sums: str) -> None:
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name in names:
                dtype, shape = self._kinds[name]
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": dtype.str, "fortran_order": False}
                    header["shape"] = (self.rows, *shape)
                    np.lib.format.write_array_header_1_0(file, header)
                    self._copy(name, file)
            with archive.open("metadata.npy", "w") as file:
                np.lib.format.write_array(file, np.array(metadata))
            archive.comment = sums.encode()

    def _sum(self, name: str) -> str:
        dtype, shape = self._kinds[name]
        return _ended(self._sums[name].copy(), dtype, [self.rows, *shape])

    def _unnamed(self):
        return self._open.enter_context(tempfile.TemporaryFile(dir=self.path.parent))

    def _copy(self, name: str, file) -> None:
        part = self._parts[name]
        part.seek(0)
        shutil.copyfileobj(part, file, 2**20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._open.close()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a feature file. UserError for any other file."""
    with _reading(path):
        return _object(_texts(path)[0], "its metadata")


def changed(path: Path) -> list[str] | None:
    """Names of the arrays, or "metadata", that have changed; None without checksums.

    Reads the whole file, piece by piece. UserError if it is not a feature file.
    """
    with _reading(path):
        metadata, text = _texts(path)
        if text is None:
            return None
        sums = _object(text, "its checksums")
        written, found = sums["arrays"], dict(_hashes(path))
        differs = {name for name in written | found if written.get(name) != found.get(name)}
        if hashlib.sha256(metadata.encode()).hexdigest() != sums["metadata"]:
            differs.add("metadata")
        return sorted(differs)


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise ValueError(f"{what} are a {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    check_file(path)
    try:
        yield
    except Exception as error:  # the readers raise errors of many kinds
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UserError(f"{path} is not a feature file: {first_line(error)}") from error


def _texts(path: Path) -> tuple[str, str | None]:
    """The metadata and checksums of a file; earlier versions wrote no checksums."""
    if path.suffix.lower() == ".npz":
        with np.load(path) as arrays:
            return arrays["metadata"].item(), arrays.zip.comment.decode() or None

    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    return metadata[METADATA], metadata.get(CHECKSUMS)


def _hashes(path: Path) -> Iterator[tuple[str, str]]:
    """The name and SHA-256 of each array."""
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                if name == "metadata":
                    continue
                with archive.open(member) as file:
                    np.lib.format.read_magic(file)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                    yield name, _hash(file, dtype, shape)
                    if file.read(1):
                        raise ValueError(f"{name} is longer than its header says")
        return
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = _object(file.read(size), "its header")
        for name, about in header.items():
            if name != "__metadata__":
                file.seek(8 + size + about["data_offsets"][0])
                yield name, _hash(file, DTYPES[about["dtype"]], about["shape"])


def _hash(file, dtype: np.dtype, shape: Sequence[int]) -> str:
    digest, left = hashlib.sha256(), math.prod(shape) * dtype.itemsize
    while left and (data := file.read(min(left, 2**20))):
        digest.update(data)
        left -= len(data)
    return _ended(digest, dtype, shape)


def _ended(digest, dtype: np.dtype, shape: Sequence[int]) -> str:
    digest.update(json.dumps([dtype.name, list(shape)]).encode())
    return digest.hexdigest()

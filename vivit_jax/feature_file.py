# SPDX-License-Identifier: Apache-2.0
"""Files of features: arrays that are written row by row, and what they were made with.

A file holds `features` [rows, ...], `frame_indices` int64 [rows, t], `frame_seconds` float64
[rows, t], and a JSON object: in .safetensors under the key "vivit_jax" of its metadata, in .npz as
the array `metadata`.
"""

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.tensors import DTYPES
from vivit_jax.errors import UserError, first_line
from vivit_jax.inputs import check_file

SUFFIXES = (".safetensors", ".npz")
METADATA = "vivit_jax"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class RowWriter:
    """Writes arrays of equally many rows to `path` (.safetensors or .npz), as the rows come.

    Rows go to unnamed files beside it; `finish` joins them, so that memory holds one row, and the
    disk for that moment all of them twice. The safetensors library and `numpy.savez` want whole
    arrays. Use it in a `with` statement: nothing is left behind where it is not finished.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, 0
        self._open = contextlib.ExitStack()
        self._parts: dict[str, Any] = {}
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def add(self, **row: np.ndarray) -> None:
        """Append one row to each array; all rows have the shapes and dtypes of the first."""
        row = {name: np.ascontiguousarray(value) for name, value in row.items()}
        kinds = {name: (value.dtype, value.shape) for name, value in row.items()}
        if not self.rows:
            self._kinds = kinds
            self._parts = {name: self._unnamed() for name in row}
        elif kinds != self._kinds:
            raise ValueError(f"row {self.rows} is {kinds}, those before it {self._kinds}")
        for name, value in row.items():
            self._parts[name].write(value.reshape(-1).view(np.uint8).data)
        self.rows += 1

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Write the file."""
        # Widest dtype first, then by name, as the safetensors library orders: keeps data aligned.
        names = sorted(self._kinds, key=lambda name: (-self._kinds[name][0].itemsize, name))
        if self.path.suffix.lower() == ".npz":
            self._write_npz(names, metadata)
        else:
            self._write_safetensors(names, metadata)

    def _write_safetensors(self, names: list[str], metadata: Mapping[str, Any]) -> None:
        header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(metadata)}}
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

    def _write_npz(self, names: list[str], metadata: Mapping[str, Any]) -> None:
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name in names:
                dtype, shape = self._kinds[name]
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": dtype.str, "fortran_order": False}
                    header["shape"] = (self.rows, *shape)
                    np.lib.format.write_array_header_1_0(file, header)
                    self._copy(name, file)
            with archive.open("metadata.npy", "w") as file:
                np.lib.format.write_array(file, np.array(json.dumps(metadata)))

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
    """What the features of a file were made with. Raises UserError where it is no such file."""
    check_file(path)
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path) as arrays:
                text = arrays["metadata"].item()
        else:
            from safetensors import safe_open

            with safe_open(path, "np") as file:
                text = (file.metadata() or {})[METADATA]
        return json.loads(text)
    except Exception as error:  # the readers raise errors of many kinds, their own among them
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UserError(f"{path} is no file of features: {first_line(error)}") from error

# SPDX-License-Identifier: Apache-2.0
"""Tensors in files: shape and dtype are known, data is read one tensor at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vivit_jax.errors import CheckpointError, first_line, quoted

# safetensors' names; other dtypes than floats can be listed but not imported.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file or made of parameters: `read()` fetches or computes the data."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class PlainValue(LazyTensor):
    """A value other than an array, as a tensor of shape ()."""


@dataclasses.dataclass(frozen=True)
class Unreadable(LazyTensor):
    """A file entry that cannot be a model tensor; reading it returns the `reason`."""

    reason: str

    @classmethod
    def because(cls, reason: str) -> "Unreadable":
        text = constant(reason)
        return cls(text.shape, text.dtype, text.read, reason)


@dataclasses.dataclass(frozen=True)
class ByteRanges:
    """Reads a tensor from one or several (start, end) byte ranges of a file.

    It uses plain reads: a memory map keeps every page it touched resident, and loading would need
    twice the file's size. Raises CheckpointError if the file has become shorter.
    """

    path: Path
    ranges: tuple[tuple[int, int], ...]
    dtype: np.dtype
    shape: tuple[int, ...]

    def __call__(self) -> np.ndarray:
        data = np.empty(sum(end - start for start, end in self.ranges), np.uint8)
        filled = 0
        with self.path.open("rb") as file:
            for start, end in self.ranges:
                file.seek(start)
                part = data[filled : filled + end - start]
                if file.readinto(part.data) != part.size:
                    raise CheckpointError(f"{self.path} has become shorter since it was opened")
                filled += part.size
        return data.view(self.dtype).reshape(self.shape)


def stored(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], *ranges: tuple[int, int]
) -> LazyTensor:
    """The tensor whose bytes are these (start, end) ranges of a file, in order."""
    return LazyTensor(shape, dtype, ByteRanges(path, ranges, dtype, shape))


def constant(value: Any) -> PlainValue:
    """A value other than an array as a tensor of shape (); dtype object unless it is a number."""
    if isinstance(value, int | float | complex | np.number | np.bool_):
        array = np.asarray(value)
    else:
        array = np.empty((), object)
        array[()] = value
    return PlainValue((), array.dtype, array.copy)


def check_readable(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """CheckpointError, with the reason, if any of these cannot be a model tensor."""
    for tensor in tensors.values():
        if isinstance(tensor, Unreadable):
            raise CheckpointError(f"{path}: {tensor.reason}")


def known_dtype(path: Path, name: str, kind: str, known: Mapping[str, np.dtype]) -> np.dtype:
    """The dtype that a file calls `kind`; CheckpointError, naming the tensor, if it is unknown."""
    if kind not in known:
        raise CheckpointError(
            f"{path}: {quoted(name)} is stored as {quoted(kind)}; readable: {', '.join(known)}"
        )
    return known[kind]


def incomplete(path: Path, kind: str, reason: BaseException | str) -> CheckpointError:
    """The error for a truncated or damaged file, with its reader's reason."""
    return CheckpointError(
        f"{path} is not a complete {kind} file ({first_line(reason)}); copy or download it again"
    )

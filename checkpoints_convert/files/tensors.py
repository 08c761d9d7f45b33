# SPDX-License-Identifier: Apache-2.0
"""Tensors that lie in files: known by shape and dtype, read one at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vivit_jax.errors import CheckpointError, first_line, quoted

# safetensors' names; what is not a float is listed, and refused when it is imported.
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
    """A tensor in a file, or to be made of parameters: `read()` fetches or computes the data."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class PlainValue(LazyTensor):
    """A value that is no array, as a tensor of shape ()."""


@dataclasses.dataclass(frozen=True)
class Unreadable(LazyTensor):
    """What could be no tensor of a model: it may lie in a file, and reads as the `reason`."""

    reason: str

    @classmethod
    def because(cls, reason: str) -> "Unreadable":
        told = constant(reason)
        return cls(told.shape, told.dtype, told.read, reason)


@dataclasses.dataclass(frozen=True)
class ByteRanges:
    """Reads a tensor whose bytes lie in one or several (start, end) ranges of a file.

    Plain file reads, because a memory map would leave every page it touched resident, and loading
    would need the file's size twice. Raises CheckpointError where the file has become shorter.
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
    """The tensor whose bytes are those (start, end) ranges of a file, one after the other."""
    return LazyTensor(shape, dtype, ByteRanges(path, ranges, dtype, shape))


def constant(value: Any) -> PlainValue:
    """A value that is no array as a tensor of shape (), of dtype object unless it is a number."""
    if isinstance(value, int | float | complex | np.number | np.bool_):
        array = np.asarray(value)
    else:
        array = np.empty((), object)
        array[()] = value
    return PlainValue((), array.dtype, array.copy)


def check_readable(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """CheckpointError, with the reason, if any of these could be no tensor of a model."""
    for tensor in tensors.values():
        if isinstance(tensor, Unreadable):
            raise CheckpointError(f"{path}: {tensor.reason}")


def known_dtype(path: Path, name: str, kind: str, known: Mapping[str, np.dtype]) -> np.dtype:
    """The dtype that a file calls `kind`; CheckpointError naming the tensor if there is none."""
    if kind not in known:
        told = f"{quoted(name)} is stored as {quoted(kind)}; readable: {', '.join(known)}"
        raise CheckpointError(f"{path}: {told}")
    return known[kind]


def incomplete(path: Path, kind: str, reason: BaseException | str) -> CheckpointError:
    """The error for a file that is cut short or damaged, whatever its reader says."""
    return CheckpointError(
        f"{path} is not a complete {kind} file ({first_line(reason)}); copy or download it again"
    )

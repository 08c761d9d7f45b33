# SPDX-License-Identifier: Apache-2.0
"""The file formats of JAX checkpoints: flax's msgpack and numpy's npz.

flax stores a tree of maps with string keys. An array is msgpack extension 1, whose payload is
msgpack again: shape, name of the dtype, row-major bytes. Extension 2 is a complex number, 3 a numpy
scalar. An array larger than `MAX_CHUNK_SIZE` is a map with its shape and its flat pieces.
"""

import collections
import contextlib
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from msgpack import Packer

from checkpoints_convert.files.msgpack_walk import Walk, begins_map
from checkpoints_convert.files.tensors import (
    DTYPES,
    LazyTensor,
    constant,
    incomplete,
    known_dtype,
    stored,
)
from vivit_jax.errors import CheckpointError, quoted
from vivit_jax.files.limits import check_unpacked

MAX_CHUNK_SIZE = 2**30  # bytes; flax's limit, a little below msgpack's
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_OBJECT = 1024  # bytes of memory that a value takes, however small it is in the file
_COUNTED = 1024  # values between two checks of the memory they take
_CHUNKED = "__msgpack_chunked_array__"
_BYTES, _EXTENSION = 0xC4, 0xC7  # first bytes with a length of 1 byte; the next two: 2, 4
_BEYOND_SAFETENSORS = (np.uint16, np.uint32, np.uint64, np.complex64, np.complex128)
_DTYPES = {dtype.name: dtype for dtype in (*DTYPES.values(), *map(np.dtype, _BEYOND_SAFETENSORS))}


def looks_like_msgpack(path: Path) -> bool:
    """Whether a file starts like a msgpack map, whatever its name."""
    with path.open("rb") as file:
        return begins_map(file.read(1))


def looks_like_npz(path: Path) -> bool:
    """Whether a file is a zip archive that holds .npy files, whatever its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return False


def open_msgpack(path: str | Path) -> dict[str, LazyTensor]:
    """The leaves of a flax msgpack file by '/'-joined path; array data is not read.

    Numbers become tensors of shape (); None, strings and bytes do too, with dtype object. Lists are
    maps with keys '0', '1', ... Raises CheckpointError for a truncated or damaged file, a file that
    is not a map, keys that repeat or contain '/', and unknown dtypes.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return dict(_leaves(_Reader(path, Walk(file)).tree()))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # msgpack's own errors are ValueErrors too
        raise incomplete(path, "msgpack", error) from None


def _leaves(tree: Mapping[str, Any], *above: str) -> Iterator[tuple[str, LazyTensor]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, *above, key)
        else:
            yield "/".join((*above, key)), value


class _Reader:
    """Reads flax's tree as nested dicts of LazyTensor; `keys` is the path to each object."""

    def __init__(self, path: Path, walk: Walk):
        self.path, self.walk = path, walk
        self.size, self.objects = path.stat().st_size, 0

    def tree(self) -> dict[str, Any]:
        kind, _, length = self.walk.head()
        tree = self.map((), length) if kind == "map" else None
        if not isinstance(tree, dict):
            raise CheckpointError(
                f"{self.path} holds a single object (a msgpack {kind}), expected a msgpack map of "
                "arrays by name, as flax.serialization.to_bytes writes for a parameter tree"
            )
        if not self.walk.ended:
            raise ValueError(f"it continues after the tree's end at byte {self.walk.at}")
        return tree

    def object(self, keys: tuple[str, ...]) -> dict[str, Any] | LazyTensor:
        kind, start, length = self.walk.head()
        self.objects += 1
        if self.objects % _COUNTED == 0:
            what = f"{self.path}: {self.objects:,} values"
            check_unpacked(what, _OBJECT * self.objects, self.size, CheckpointError)
        if kind == "map":
            return self.map(keys, length)
        if kind == "array":
            return {str(i): self.object((*keys, str(i))) for i in range(length)}
        if kind == "extension":
            return self.extension("/".join(keys), length)
        return constant(self.walk.decoded(start, length))

    def map(self, keys: tuple[str, ...], length: int) -> dict[str, Any] | LazyTensor:
        tree: dict[str, Any] = {}
        for _ in range(length):
            key = self.walk.decode()
            # flax reads integers as keys too, though it writes them as strings.
            if not isinstance(key, str) and type(key) is not int:
                raise ValueError(f"the key {key!r} in {'/'.join(keys)!r} is not a string")
            key = str(key)
            name = "/".join((*keys, key))
            if "/" in key or key in tree:
                fault = "contains '/'" if "/" in key else "occurs twice"
                raise CheckpointError(
                    f"{self.path}: the key {key!r} of {quoted(name)} {fault}, and names must be "
                    "unique; rewrite the checkpoint with other keys"
                )
            tree[key] = self.object((*keys, key))
        return self.joined("/".join(keys), tree) if _CHUNKED in tree else tree

    def extension(self, name: str, length: int) -> LazyTensor:
        code = self.walk.take(1)[0]
        end = self.walk.at + length
        if code in (_ARRAY, _SCALAR):
            tensor = self.array(name)
        elif code == _COMPLEX:
            self.walk.expect("array", 2)
            tensor = constant(complex(_number(self.walk), _number(self.walk)))
        else:
            raise CheckpointError(
                f"{self.path}: {quoted(name)} is stored as msgpack extension {code}; readable: "
                f"flax's {_ARRAY}, {_COMPLEX} and {_SCALAR}. Write it with "
                "flax.serialization.to_bytes"
            )
        if self.walk.at != end:
            raise ValueError(f"{name} ends at byte {self.walk.at}, not at {end}")
        return tensor

    def array(self, name: str) -> LazyTensor:
        self.walk.expect("array", 3)
        shape = tuple(_number(self.walk) for _ in range(self.walk.expect("array")))
        kind = self.walk.decode()
        if not isinstance(kind, str):
            raise ValueError(f"the dtype of {name} is {kind!r}, expected a name")
        dtype = known_dtype(self.path, name, kind, _DTYPES)
        size = self.walk.expect("bytes")
        start = self.walk.at
        self.walk.skip(size)
        return self.stored(name, dtype, shape, (start, start + size))

    def joined(self, name: str, tree: dict[str, Any]) -> LazyTensor:
        """A large array, from the map of pieces that flax writes for it."""
        try:
            shape = tuple(n.read().item() for n in _in_order(tree["shape"]))
            pieces = [piece.read for piece in _in_order(tree["chunks"])]
            (dtype,) = {piece.dtype for piece in pieces}
            ranges = [span for piece in pieces for span in piece.ranges]
        except (KeyError, AttributeError, TypeError, ValueError):
            raise ValueError(f"the pieces of {name} do not form one array") from None
        return self.stored(name, dtype, shape, *ranges)

    def stored(self, name: str, dtype: np.dtype, shape: tuple, *ranges) -> LazyTensor:
        size = sum(end - start for start, end in ranges)
        sound = all(type(n) is int and n >= 0 for n in shape)
        if not sound or size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {size} bytes for {dtype} of shape {shape}")
        return stored(self.path, dtype, shape, *ranges)


def _number(walk: Walk) -> int | float:
    value = walk.decode()
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} before byte {walk.at}, expected a number")
    return value


def _in_order(tree: dict[str, Any]) -> list[Any]:
    return [tree[str(i)] for i in range(len(tree))]


def write_msgpack(path: str | Path, tensors: Mapping[str, Any]) -> Path:
    """Write tensors by '/'-joined path as flax.serialization.to_bytes writes the nested dict.

    A tensor has `read()`, or is an array, number, string or None, or {} for an empty map; one
    tensor is read at a time. Maps and keys keep the order of `tensors`. Returns the path. Raises
    CheckpointError before writing if a name is also a prefix of another, and for a dtype that
    `open_msgpack` does not read.
    """
    path = Path(path)
    tree = _nested(tensors)
    with path.open("wb") as file:
        _Writer(file).object(tree)
    return path


def _nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(
                f"{name} cannot be written beside a tensor whose name is its prefix or extends it; "
                "every name must be a leaf"
            )
        node[last] = tensor
    return tree


def _head(first: int, length: int) -> bytes:
    if first == _EXTENSION and length in (1, 2, 4, 8, 16):
        return bytes([0xD4 + length.bit_length() - 1])
    wider = (length > 0xFF) + (length > 0xFFFF)
    return bytes([first + wider]) + length.to_bytes(1 << wider, "big")


class _Writer:
    """Writes flax's tree of nested dicts."""

    def __init__(self, file: BinaryIO):

        self.write, self.packer = file.write, Packer()

    def object(self, value: Any, keys: tuple[str, ...] = ()) -> None:
        if isinstance(value, dict):
            self.write(self.packer.pack_map_header(len(value)))
            for key, below in value.items():
                self.pack(key)
                self.object(below, (*keys, key))
        else:
            self.leaf(value.read() if hasattr(value, "read") else value, "/".join(keys))

    def leaf(self, value: Any, name: str) -> None:
        if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 0:
            value = value.item()  # None, a string or bytes, as `open_msgpack` gives them
        if value is None or type(value) in (bool, int, float, str, bytes):
            self.pack(value)
        elif type(value) is complex:
            pair = self.packer.pack((value.real, value.imag))
            self.write(_head(_EXTENSION, len(pair)) + bytes([_COMPLEX]) + pair)
        elif isinstance(value, np.generic):
            self.array(_SCALAR, _plain(value, name))
        else:
            self.chunks(_plain(value, name))

    def chunks(self, array: np.ndarray) -> None:
        """An array, in pieces if it is large."""
        if array.nbytes <= MAX_CHUNK_SIZE:
            self.array(_ARRAY, array)
            return
        step = max(1, MAX_CHUNK_SIZE // array.itemsize)
        starts = range(0, array.size, step)
        self.write(self.packer.pack_map_header(3))
        self.pack(_CHUNKED, True)
        self.pack("shape", {str(i): n for i, n in enumerate(array.shape)})
        self.pack("chunks")
        self.write(self.packer.pack_map_header(len(starts)))
        for i, start in enumerate(starts):
            self.pack(str(i))
            self.array(_ARRAY, array.reshape(-1)[start : start + step])

    def array(self, code: int, array: np.ndarray) -> None:
        # Heads by hand: the packer would copy the data twice.
        head = self.packer.pack_array_header(3)
        head += self.packer.pack(array.shape) + self.packer.pack(array.dtype.name)
        head += _head(_BYTES, array.nbytes)
        self.write(_head(_EXTENSION, len(head) + array.nbytes) + bytes([code]) + head)
        self.write(array.reshape(-1).view(np.uint8).data)

    def pack(self, *values: Any) -> None:
        for value in values:
            self.write(self.packer.pack(value))


def _plain(value: Any, name: str) -> np.ndarray:
    """The array in C order and native byte order; only the dtype's name is stored."""
    array = np.asarray(value)
    if array.dtype.name not in _DTYPES:
        raise CheckpointError(
            f"{name} is of dtype {array.dtype}, expected one of {', '.join(_DTYPES)}; cast it or "
            "leave it out"
        )
    return np.asarray(array, _DTYPES[array.dtype.name], order="C")


def open_npz(path: str | Path) -> dict[str, LazyTensor]:
    """The arrays of a .npz file by name, compressed or not; only their headers are read.

    Arrays of two-byte voids are bfloat16, which numpy writes without its name. Raises
    CheckpointError for a truncated or damaged file, entries that are not .npy files, repeated
    names, arrays of Python objects, and arrays that unpack to more than `unpack_limit`.
    """
    path = Path(path)
    with _whole_npz(path), zipfile.ZipFile(path) as archive:
        members = collections.Counter(archive.namelist())
        others = sorted(m for m in members if not m.endswith(".npy") or members[m] > 1)
        if others:
            raise CheckpointError(
                f"{path} holds entries that are not .npy files, or repeated names: "
                f"{quoted(', '.join(others))}; rewrite it with numpy.savez"
            )
        return {m.removesuffix(".npy"): _npy(path, archive, m) for m in members}


@contextlib.contextmanager
def _whole_npz(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own errors for damage
        raise incomplete(path, "npz", error) from None


def _npy(path: Path, archive: zipfile.ZipFile, member: str) -> LazyTensor:
    size = archive.getinfo(member).file_size
    check_unpacked(f"{path}: {quoted(member)}", size, path.stat().st_size, CheckpointError)
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
        begin = file.tell()
    if dtype.hasobject:
        raise CheckpointError(
            f"{path}: {quoted(member)} holds pickled Python objects, and unpickling those could "
            "run code; save it as arrays of numbers"
        )
    if begin + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{member} does not have the size that its header says")
    bfloat16 = dtype == np.dtype("V2")

    def read():
        with _whole_npz(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        return array.view(ml_dtypes.bfloat16) if bfloat16 else array.astype(native, copy=False)

    native = np.dtype(ml_dtypes.bfloat16) if bfloat16 else dtype.newbyteorder("=")
    return LazyTensor(shape, native, read)

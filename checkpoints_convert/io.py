# SPDX-License-Identifier: Apache-2.0
"""Opening checkpoints without reading their data.

Safetensors are read with plain file reads of one tensor's bytes: a memory map would leave every
page it touched resident, and loading would need the file's size twice.
"""

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vivit_jax.errors import CheckpointError, MissingExtra

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT_FILES = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)  # in order of preference
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
    """A tensor in a file: its shape and dtype are known, `read()` fetches the data."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the file that was named, every weight file, and tensors by name."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory or one weight or index file; reads headers only.

    A directory may hold any of `WEIGHT_FILES`; safetensors come first. Raises CheckpointError for
    a path that holds no checkpoint, for damaged or truncated files, for a pickle that is more than
    tensors, and for an index that disagrees with its shards; MissingExtra for a .bin without torch.
    """
    path = _weight_file(Path(path))
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return Checkpoint(path, (path,), _open_file(path))


def _weight_file(path: Path) -> Path:
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    return path


def _open_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return _open_pickle(path)
    raise CheckpointError(
        f"{path}: unknown kind of file; expected .safetensors, .bin or .index.json"
    )


def read_index(path: Path) -> dict[str, str]:
    """The file name of every tensor's shard; CheckpointError if it is no index of plain names."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(name).name == name for name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a weight index: {error!r}") from None
    if not plain:
        raise CheckpointError(f"{path} names shards outside its own directory")
    return weight_map


def _open_index(path: Path) -> Checkpoint:
    """Open the shards an index names; index and shards must name the same tensors."""
    weight_map = read_index(path)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} names shards that do not exist: {', '.join(missing)}")
    files = tuple(path.parent / name for name in shards)
    opened = {file.name: _open_file(file) for file in files}
    wrong = [
        f"{name} is not in {shard}"
        for name, shard in weight_map.items()
        if name not in opened[shard]
    ] + [
        f"{name} in {shard} is not in the index"
        for shard, tensors in opened.items()
        for name in tensors
        if weight_map.get(name) != shard
    ]
    if wrong:
        lines = "\n  ".join(wrong)
        raise CheckpointError(f"{path} disagrees with its shards ({len(wrong)}):\n  {lines}")
    tensors = {name: opened[shard][name] for name, shard in weight_map.items()}
    return Checkpoint(path, files, tensors)


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # validates the header against the file's size
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); copy or download it again"
        ) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {entry['dtype']}; readable: {', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = LazyTensor(shape, dtype, _byte_range(path, start, end, dtype, shape))
    return tensors


def _byte_range(path: Path, start: int, end: int, dtype: np.dtype, shape: tuple[int, ...]):
    def read():
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            data = np.fromfile(file, np.uint8, end - start)
        if data.size != end - start:
            raise CheckpointError(f"{path} has become shorter since it was opened")
        return data.view(dtype).reshape(shape)

    return read


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    try:
        import torch
    except ImportError:
        raise MissingExtra("torch", "torch", f"reading {path}") from None
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and unpickling that could run code. "
            f"Convert it to safetensors where you trust it. torch says: {_first_line(error)}"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # the unpickler stumbles over damaged bytes in every way there is
        raise CheckpointError(
            f"{path} is not a complete torch file ({_first_line(error)}); copy or download it again"
        ) from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{path} is not a flat state dict, it also holds: {', '.join(map(str, others))}"
        )
    odd = [
        str(name)
        for name, tensor in state.items()
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_meta
    ]
    if odd:
        raise CheckpointError(
            f"{path} holds what is not a dense tensor under a name: {', '.join(odd)}"
        )
    return {name: _torch_tensor(path, name, tensor) for name, tensor in state.items()}


def _torch_tensor(path: Path, name: str, tensor: Any) -> LazyTensor:
    import torch

    stored = str(tensor.dtype).removeprefix("torch.")
    known = {str(dtype): dtype for dtype in DTYPES.values()}
    if stored not in known:
        raise CheckpointError(f"{path}: {name} is stored as {stored}; readable: {', '.join(known)}")

    def read():
        flat = tensor.detach().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().view(known[stored]).reshape(tensor.shape)

    return LazyTensor(tuple(tensor.shape), known[stored], read)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]

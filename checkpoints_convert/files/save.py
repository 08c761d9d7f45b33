# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints: safetensors tensor by tensor, and directories that appear complete."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.files.tensors import DTYPES
from vivit_jax.errors import CheckpointError, UserError
from vivit_jax.files.atomic import writing
from vivit_jax.files.staging import Staging, clear_leftovers, made_parents, names_in
from vivit_jax.hub import PROCESSOR_FILES, SAFETENSORS, SAFETENSORS_INDEX

CONFIG = "config.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?i?)B?", re.IGNORECASE)


def is_weight_file(name: str) -> bool:
    """Whether a file of this name may hold the weights of a HuggingFace directory."""
    return _WEIGHTS.fullmatch(name) is not None


def write_weights(
    directory: str | Path, tensors: Mapping[str, Any], max_shard_size: int | str | None = None
) -> list[Path]:
    """Write tensors (`shape`, `dtype`, `read()`) as model.safetensors, or as shards and an index.

    `max_shard_size` is a number of bytes or a text like "5GB"; a larger tensor gets its own shard.
    One tensor is read at a time. Returns the paths written.
    """
    directory = Path(directory)
    shards = _shards(tensors, parse_size(max_shard_size))
    if len(shards) == 1:
        return [write_safetensors(directory / SAFETENSORS, shards[0])]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    paths = [
        write_safetensors(directory / name, shard)
        for name, shard in zip(names, shards, strict=True)
    ]
    index = {
        "metadata": {
            "total_parameters": sum(_count(tensor) for tensor in tensors.values()),
            "total_size": sum(_size(tensor) for tensor in tensors.values()),
        },
        "weight_map": {
            key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
    }
    path = directory / SAFETENSORS_INDEX
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*paths, path]


def parse_size(size: int | str | None) -> int | None:
    """Bytes of "5GB" (powers of 1000), "5GiB" (of 1024) or a number."""
    if size is None:
        return None
    found = _SIZE.fullmatch(str(size).strip())
    if not found or float(found.group(1)) <= 0:
        raise UserError(f"max_shard_size must be bytes or like '5GB', got {size!r}")
    unit = found.group(2).lower()
    power = " kmgt".index(unit[:1] or " ")
    return int(float(found.group(1)) * (1024 if unit.endswith("i") else 1000) ** power)


def _shards(tensors: Mapping[str, Any], limit: int | None) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{}]
    used = 0
    for name in sorted(tensors):
        size = _size(tensors[name])
        if limit is not None and shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensors[name]
        used += size
    return shards


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors (`shape`, `dtype`, `read()`) as one file, with transformers' metadata."""
    # Widest dtype first, then by name, as the safetensors library does; this keeps data aligned.
    names = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name in names:
        start, end = end, end + _size(tensors[name])
        header[name] = {
            "dtype": _NAMES[np.dtype(tensors[name].dtype)],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            data = np.ascontiguousarray(tensors[name].read())
            file.write(data.reshape(-1).view(np.uint8).data)
    return path


def _count(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _size(tensor: Any) -> int:
    return _count(tensor) * np.dtype(tensor.dtype).itemsize


def check_sole(directory: Path, name: str, rivals: re.Pattern) -> None:
    """CheckpointError if readers would open another file of the directory than `name`.

    `rivals` matches names that they prefer; weight files that will be replaced do not count.
    """
    names = names_in(directory) if directory.is_dir() else []
    others = sorted(
        n for n in names if n != name and rivals.fullmatch(n) and not _WEIGHTS.fullmatch(n)
    )
    if others:
        raise CheckpointError(
            f"{directory} holds {', '.join(others)}, which would be read instead of {name}; write "
            "to another directory"
        )


def check_destination(directory: str | Path, overwrite: bool) -> Path:
    """The directory to write, links resolved; CheckpointError if it must not be written.

    Leftovers of writers that were killed are cleared first, with a warning.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, expected a directory to write")
    if directory.is_dir():
        clear_leftovers(directory)
        _check_empty(directory, overwrite)
    return directory


def _check_empty(directory: Path, overwrite: bool) -> None:
    if not overwrite and names_in(directory):
        raise CheckpointError(
            f"{directory} is not empty; pass overwrite=True (--overwrite) to replace the model "
            "files in it"
        )


@contextlib.contextmanager
def replaced_directory(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory; its files move into `directory` when the block succeeds.

    Nothing changes if the block fails or is interrupted. A non-empty destination is a
    CheckpointError unless `overwrite`: then files of the same name are replaced, old weight files
    removed, and old processor files too if a new one was written. All other files stay, and so do
    the directory, its mode and its owner. WriteError if the disk is full.
    """
    directory = check_destination(directory, overwrite)
    if directory.is_dir():
        with writing(directory), Staging(directory) as staging:
            yield staging.new
            _check_empty(directory, overwrite)  # another process may have written it
            staging.move_in(CONFIG, _replaced(staging.new, directory))
        return
    with made_parents(directory), writing(directory), Staging(directory.parent) as staging:
        yield staging.new
        if directory.exists():
            raise CheckpointError(f"{directory} was written by another process; nothing changed")
        staging.become(directory)


def _replaced(staged: Path, directory: Path) -> list[str]:
    """The files of a directory that the staged ones replace."""
    incoming = {path.name for path in staged.iterdir()}
    # Readers take the first processor file they find, which could be the old one.
    processors = set(PROCESSOR_FILES) if incoming & set(PROCESSOR_FILES) else set()
    return [
        name
        for name in names_in(directory)
        if name in incoming | processors or _WEIGHTS.fullmatch(name)
    ]

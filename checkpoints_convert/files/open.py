# SPDX-License-Identifier: Apache-2.0
"""Opens checkpoints without reading their data: finds the files and their format."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from checkpoints_convert.files.flax_files import (
    looks_like_msgpack,
    looks_like_npz,
    open_msgpack,
    open_npz,
)
from checkpoints_convert.files.tensors import DTYPES, LazyTensor, incomplete, known_dtype, stored
from checkpoints_convert.files.torch_files import looks_like_pickle, open_pickle
from vivit_jax.errors import CheckpointError, quoted
from vivit_jax.files.inputs import check_file
from vivit_jax.files.json_files import parse_json
from vivit_jax.files.staging import interrupted
from vivit_jax.hub import WEIGHT_FILES, read_index

# What a directory may hold instead, after checkpoint and checkpoint_<step>.
_FLAX_FILES = ("flax_model.msgpack", "model.msgpack")
_SINGLE_FILES = ("*.npz", "*.msgpack", "*.safetensors", "*.pth", "*.pt", "*.ckpt")
# Where programs keep checkpoints inside the directory of a run: the Trainer of transformers, and
# Lightning.
_OF_A_RUN = ("checkpoint-*", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt")
_STEP = re.compile(r"checkpoint_(\d+)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its weight or index file, every weight file, and tensors by name.

    `given` is the path or hub id that it was opened by.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]
    given: str = ""

    def __str__(self) -> str:
        return self.given or str(self.path)

    @property
    def has_config(self) -> bool:
        """Whether a config.json lies beside the weights."""
        return (self.path.parent / "config.json").exists()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory, or one weight or index file; reads headers only.

    In a directory, any of `WEIGHT_FILES` is opened, safetensors first; else a file that JAX
    programs write: `checkpoint`, the `checkpoint_<step>` with the largest step, or a single npz,
    msgpack, safetensors, pth, pt or ckpt file. Raises CheckpointError for a path without a
    checkpoint, damaged or truncated files, a pickle that could run code, and an index that
    disagrees with its shards; MissingExtra for a torch file without torch.
    """
    path = _weight_file(Path(path))
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return Checkpoint(path, (path,), _open_file(path))


def _weight_file(path: Path) -> Path:
    try:
        is_dir, there = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, or a symlink loop
        raise CheckpointError(f"{quoted(path)}: {error.strerror}") from None
    if is_dir:
        return (
            _first_file(path, *WEIGHT_FILES, "checkpoint")
            or _newest_step(path)
            or _first_file(path, *_FLAX_FILES)
            or _only_file(path)
        )
    if not there:
        raise CheckpointError(f"{quoted(path)} does not exist")
    return _regular(path)


def _regular(path: Path) -> Path:
    """The path; CheckpointError unless it is a regular file of weights."""
    check_file(path, CheckpointError)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, expected a file of weights")
    return path


def _first_file(directory: Path, *names: str) -> Path | None:
    found = next((directory / name for name in names if (directory / name).exists()), None)
    return found and _regular(found)


def _newest_step(directory: Path) -> Path | None:
    """The `checkpoint_<step>` of the largest step; unfinished ones have another ending."""
    steps = {
        int(found[1]): path for path in directory.iterdir() if (found := _STEP.fullmatch(path.name))
    }
    if not steps:
        return None
    newest = steps[max(steps)]
    if not newest.is_file():
        raise CheckpointError(
            f"{newest} is a directory, expected a file as flax.serialization writes it; name "
            "another checkpoint, or restore this one with orbax and write it with to_bytes"
        )
    return newest


def _only_file(directory: Path) -> Path:
    found = sorted(path for pattern in _SINGLE_FILES for path in directory.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{directory} holds several weight files: {names}; name one of them")
    if not found:
        models = [path.parent.name for path in directory.glob(f"models/*/{WEIGHT_FILES[0]}")]
        models.sort(key=lambda step: (len(step), step))
        if models:
            raise CheckpointError(
                f"{directory} is a training run; name one of its models, {directory}/models/"
                f"{models[0]}" + (f" (or {', '.join(models[1:])})" if models[1:] else "")
            )
        inside = _checkpoints_inside(directory)
        if inside:
            names = [str(path.relative_to(directory)) for path in inside]
            more = f" (or {', '.join(names[1:5])}{', ...' * (len(names) > 5)})" * (len(names) > 1)
            raise CheckpointError(
                f"{directory} holds no weights of its own but checkpoints of a run; name one, "
                f"{inside[0]}{more}"
            )
        accepted = ", ".join((*WEIGHT_FILES, "checkpoint", "checkpoint_<step>", *_FLAX_FILES))
        raise CheckpointError(
            f"{directory} holds no weights; expected one of {accepted}, or a single file of "
            f"{', '.join(_SINGLE_FILES)}{interrupted(directory)}"
        )
    return _regular(found[0])


def _checkpoints_inside(directory: Path) -> list[Path]:
    """Checkpoints inside the directory of a run, the newest first."""
    found = [path for pattern in _OF_A_RUN for path in directory.glob(pattern)]
    found = [path for path in found if path.is_file() or _first_file(path, *WEIGHT_FILES)]
    numbers = {path: tuple(map(int, re.findall(r"\d+", path.name))) for path in found}
    return sorted(found, key=lambda path: (numbers[path], path), reverse=True)


def _open_file(path: Path) -> dict[str, LazyTensor]:
    check_file(path, CheckpointError)
    if path.suffix in _OPENERS:
        return _OPENERS[path.suffix](path)
    # Lightning's .ckpt is a torch file. JAX programs use this suffix too, or none, or the step.
    if path.suffix == ".ckpt" and looks_like_pickle(path) and not looks_like_npz(path):
        return open_pickle(path)
    if looks_like_npz(path):
        return open_npz(path)
    if looks_like_msgpack(path):
        return open_msgpack(path)
    raise CheckpointError(
        f"{path}: unknown kind of file; expected {', '.join(_OPENERS)}, .ckpt or .index.json, or, "
        "under any name, flax's msgpack or numpy's npz"
    )


def _open_index(path: Path) -> Checkpoint:
    """Open the shards of an index; both must name the same tensors."""
    weight_map = read_index(path)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (path.parent / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path} names shards that do not exist: {quoted(', '.join(missing))}"
        )
    for name in shards:
        _regular(path.parent / name)
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

    try:
        with safe_open(path, framework="numpy"):  # validates the header against the file's size
            pass
    except SafetensorError as error:
        raise incomplete(path, "safetensors", error) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), f"the header of {path}", CheckpointError)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = known_dtype(path, name, entry["dtype"], DTYPES)
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = stored(path, dtype, tuple(entry["shape"]), (start, end))
    return tensors


_OPENERS = {
    ".safetensors": _open_safetensors,
    ".bin": open_pickle,
    ".pt": open_pickle,
    ".pth": open_pickle,
    ".npz": open_npz,
    ".msgpack": open_msgpack,
}

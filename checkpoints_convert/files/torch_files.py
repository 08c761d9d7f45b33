# SPDX-License-Identifier: Apache-2.0
"""torch files: trees of dense tensors and plain values, and nothing that could run code."""

import argparse
import collections
import io
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.files.tensors import (
    DTYPES,
    LazyTensor,
    PlainValue,
    Unreadable,
    constant,
    incomplete,
    known_dtype,
)
from checkpoints_convert.files.torch_archive import Archive, ArchivedTensor, SparseTensor
from checkpoints_convert.files.torch_pickle import check_pickle
from vivit_jax.errors import CheckpointError, MissingExtra, UserError, first_line, quoted
from vivit_jax.files.limits import check_unpacked

_ARCHIVE = b"PK\3\4"
_OLD_PICKLES = 5  # a number, a version, the machine, the state, and the keys of its tensors

# Where releases of Lightning and Python keep their hyperparameter and path classes.
_LIGHTNING = (
    "pytorch_lightning.utilities.parsing",
    "lightning.pytorch.utilities.parsing",
    "lightning_fabric.utilities.data",
    "lightning.fabric.utilities.data",
)
_PATHLIB = ("pathlib", "pathlib._local")


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The leaves of a torch file by '/'-joined path; a state dict's tensors by name.

    Lists of tensors or trees are maps with keys '0', '1', ...; any other value is a tensor of shape
    (), with dtype object unless it is a number. Sparse and other tensors, and values under keys
    that are not names, are `Unreadable` leaves; callers that need them refuse them. Raises
    CheckpointError for damage, a pickle that needs more than torch's safe types,
    argparse.Namespace and numpy scalars, compressed entries, headers that disagree, and a pickle
    that unfolds to more than `unpack_limit`. Reading a tensor raises it if the checksum does not
    match. MissingExtra without torch.
    """
    torch = _torch(f"reading {path}")
    try:
        archive = _checked(path)
        with torch.serialization.safe_globals(_harmless()):
            # Files from before torch 1.6 are not archives, and are read whole.
            state = (
                torch.load(path, map_location="cpu", weights_only=True)
                if archive is None
                else torch.load(archive.outline, map_location="meta", weights_only=True)
            )
    except UserError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and unpickling that could run code. "
            f"Convert it to safetensors if you trust it. torch says: {_culprit(error)}"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise incomplete(path, "torch", error) from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    tensors: dict[str, LazyTensor] = {}
    try:
        for name, value in _leaves(state):
            if name in tensors:
                raise CheckpointError(
                    f"{path} holds {quoted(name)} twice, and names must be unique"
                )
            tensors[name] = _leaf(path, archive, name, value)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise incomplete(path, "torch", error) from None
    return tensors


def _checked(path: Path) -> Archive | None:
    """The file as an archive, None if it is from before torch 1.6; its pickles are checked."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == _ARCHIVE:  # how torch tells them apart
            archive = Archive(path)
            check_pickle(io.BytesIO(archive.pickle), size)
            return archive
        file.seek(0)
        for _ in range(_OLD_PICKLES):
            if file.tell() < size:
                check_pickle(file, size)
    return None


def looks_like_pickle(path: Path) -> bool:
    """Whether a file starts like torch's: an archive, or a pickle from before torch 1.6."""
    with path.open("rb") as file:
        begin = file.read(2)
    return begin in (b"PK", b"\x80\x02")


def _harmless() -> list[Any]:
    """What a pickle may hold besides torch's safe types; it holds data and runs no code.

    VideoMAE's authors keep their script's arguments, a Namespace, and learning rates from a numpy
    schedule. Of numpy only plain number scalars are made: `scalar` copies bytes and refuses dtype
    object. Lightning keeps hyperparameters in a dict class of its own, with paths among them: they
    become plain dicts and pure paths.
    """
    scalar = np.float64(0).__reduce__()[0]  # numpy makes its scalars by this, which has no name
    dtypes = (type(np.dtype(code)) for code in ("f8", "f4", "f2", "i8", "i4", "u1", "bool"))
    old = (scalar, "numpy.core.multiarray.scalar")  # as numpy 1 calls it
    stand_ins = [(collections.OrderedDict, f"{name}.AttributeDict") for name in _LIGHTNING]
    for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
        names = pure.__name__, pure.__name__.removeprefix("Pure")
        stand_ins += [(pure, f"{module}.{name}") for module in _PATHLIB for name in names]
    sparse = (SparseTensor, "checkpoints_convert.SparseTensor")
    return [argparse.Namespace, scalar, old, np.dtype, *dtypes, *stand_ins, sparse]


def _culprit(error: pickle.UnpicklingError) -> str:
    """What torch refuses, without its advice and terminal colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    name = re.search(r"Unsupported global: GLOBAL \S+", text)
    return name[0] if name else first_line(text.rpartition("WeightsUnpickler error: ")[2])


def is_beside(name: str, tensor: LazyTensor) -> bool:
    """Whether a leaf of a torch file is outside a top-level state dict: nested, or not a tensor."""
    return "/" in name or isinstance(tensor, PlainValue)


def check_flat(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """CheckpointError if a torch file holds more than one flat state dict."""
    others = [name for name, tensor in tensors.items() if is_beside(name, tensor)]
    if others and path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        held = ", ".join(dict.fromkeys(name.partition("/")[0] for name in others))
        raise CheckpointError(
            f"{path} is not a flat state dict, it also holds: {held}; save the state dict of the "
            "model alone"
        )


def write_state_dict(path: Path, tensors: Mapping[str, Any], container: str | None) -> Path:
    """Write tensors (`read()`) as a state dict in their order, under the key `container` if given.

    Returns the path; MissingExtra without torch.
    """
    torch = _torch(f"writing {path.name}")
    names = {dtype: name for name, dtype in _torch_dtypes().items()}

    def converted(tensor):
        array = np.ascontiguousarray(tensor.read())
        # torch takes numpy's bytes, but does not know ml_dtypes.
        flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
        return flat.view(getattr(torch, names[array.dtype])).reshape(array.shape)

    state = {name: converted(tensor) for name, tensor in tensors.items()}
    torch.save({container: state} if container else state, path)
    return path


def _torch(purpose: str):
    try:
        import torch
    except ImportError:
        raise MissingExtra("torch", "torch", purpose) from None
    return torch


def _torch_dtypes() -> dict[str, np.dtype]:
    """Our dtypes by torch name."""
    return {str(dtype): dtype for dtype in DTYPES.values()}


def _leaves(tree: Any, *above: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, argparse.Namespace):
        items = vars(tree).items()
    elif isinstance(tree, list | tuple) and any(map(_is_tree, tree)):
        items = enumerate(tree)
    else:
        yield "/".join(above), tree
        return
    for key, value in items:
        if isinstance(key, str | int):
            yield from _leaves(value, *above, str(key))
            continue
        place = "/".join(above) or "the file"
        reason = f"not a tensor under a name: the key {key!r} of {place}"
        yield "/".join((*above, repr(key))), Unreadable.because(reason)


def _is_tree(value: Any) -> bool:
    import torch

    return isinstance(value, Mapping | list | tuple | argparse.Namespace | torch.Tensor)


def _leaf(path: Path, archive: Archive | None, name: str, value: Any) -> LazyTensor:
    import torch

    if isinstance(value, Unreadable):
        return value
    dense = not isinstance(value, SparseTensor)
    if dense and not isinstance(value, torch.Tensor):
        return constant(value)
    offset = None
    if dense and value.layout == torch.strided and value.is_meta and archive is not None:
        # torch documents that a tensor loaded without its data knows this.
        offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if not dense or value.layout != torch.strided or (value.is_meta and offset is None):
        return Unreadable.because(f"not a dense tensor under a name: {name}")
    try:
        dtype = known_dtype(path, name, str(value.dtype).removeprefix("torch."), _torch_dtypes())
    except CheckpointError as error:
        return Unreadable.because(str(error).removeprefix(f"{path}: "))

    if archive is not None and offset is not None:
        record = archive.storage(offset, value.untyped_storage().nbytes(), dtype)
        place = ArchivedTensor(
            archive,
            record,
            dtype,
            tuple(value.shape),
            int(value.storage_offset()),
            value.stride(),
            value.is_neg(),
        )
        return LazyTensor(place.shape, dtype, place)
    count, held = value.numel() * dtype.itemsize, path.stat().st_size
    check_unpacked(f"{path}: {quoted(name)}", count, held, CheckpointError)

    def read():
        flat = value.detach().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().view(dtype).reshape(value.shape)

    return LazyTensor(tuple(value.shape), dtype, read)

# SPDX-License-Identifier: Apache-2.0
"""Opening torch's pickles: state dicts of dense tensors, nothing that could run code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.tensors import DTYPES, LazyTensor, first_line, incomplete, known_dtype
from vivit_jax.errors import CheckpointError, MissingExtra


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a torch file by name.

    Raises CheckpointError for damage and for what is not a flat state dict of dense tensors,
    MissingExtra without torch.
    """
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
            f"Convert it to safetensors where you trust it. torch says: {first_line(error)}"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # the unpickler stumbles over damaged bytes in every way there is
        raise incomplete(path, "torch", error) from None
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

    known = {str(dtype): dtype for dtype in DTYPES.values()}
    dtype = known_dtype(path, name, str(tensor.dtype).removeprefix("torch."), known)

    def read():
        flat = tensor.detach().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)

    return LazyTensor(tuple(tensor.shape), dtype, read)

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints at addresses, copied to this machine once for each state that they have there.

They lie in the user's cache (XDG_CACHE_HOME, or ~/.cache), in vivit_jax/models. Several processes
may copy the same one: a file appears whole.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from vivit_jax.errors import CheckpointError
from vivit_jax.files import storage
from vivit_jax.files.addresses import Address
from vivit_jax.files.atomic import whole_file


def fetched_checkpoint(address: str, beside: Sequence[str], weights: Sequence[str]) -> Path:
    """The copy of a directory, or of a weight file, with the files `beside` that exist.

    Of a directory the first of `weights` that exists is copied. Raises CheckpointError if there is
    none, FileNotFoundError if there is nothing at all.
    """
    where = Address(address)
    if where.is_file():
        folder = _folder(where.parent, storage.state(address).tag)
        fetched_file(address, folder / where.name)
        for name in beside:
            if (where.parent / name).is_file():
                fetched_file(str(where.parent / name), folder / name)
        return folder / where.name
    there = {name for name, is_directory in storage.entries(address) if not is_directory}
    found = next((name for name in weights if name in there), None)
    if beside[0] not in there:
        raise CheckpointError(f"{address} holds no {beside[0]}; name a model, or a weight file")
    if found is None:
        raise CheckpointError(f"{address} holds none of {', '.join(weights)}")
    folder = _folder(where, storage.state(str(where / found)).tag)
    for name in [name for name in (*beside, found) if name in there]:
        fetched_file(str(where / name), folder / name)
    return folder


def fetched_file(address: str, path: Path) -> None:
    """Copy a file, unless there is a copy of this size."""
    if path.exists() and path.stat().st_size == storage.state(address).size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        storage.download(address, partial)


def _folder(where: Address, tag: str) -> Path:
    """Where a state of a checkpoint is kept; its last part is named as there, for messages."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(f"{where}\0{tag}".encode()).hexdigest()[:16]
    return Path(cache, "vivit_jax", "models", key, where.name or "model")

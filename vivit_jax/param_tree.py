# SPDX-License-Identifier: Apache-2.0
"""Parameter trees as flat {'a/b/kernel': leaf} dicts, and their two layouts.

The interchange form has one entry per layer, `.../layers_{i}/rest`. The running form of a scanned
model has one leaf `.../layers/rest` whose first axis is the layer. Weight tables use the
interchange form; `slots` locates its entries in a tree of either form.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_STACKED = re.compile(r"(?:^|(?<=/))layers(?=/)")


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one interchange entry: a whole leaf, or one row of a stacked leaf."""

    leaf: str
    layer: int | None
    shape: tuple[int, ...]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings to '/'-joined paths."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest '/'-joined paths again."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def layer_path(path: str, layer: int) -> str:
    """`a/layers/b` -> `a/layers_3/b`."""
    return _STACKED.sub(f"layers_{layer}", path, count=1)


def slots(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Map every interchange path of a tree in either layout to its slot.

    `shapes` holds the shape of every leaf by path.
    """
    found = {}
    for leaf, shape in shapes.items():
        if _STACKED.search(leaf):
            for layer in range(shape[0]):
                found[layer_path(leaf, layer)] = Slot(leaf, layer, tuple(shape[1:]))
        else:
            found[leaf] = Slot(leaf, None, tuple(shape))
    return found


def shapes_of(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of arrays, or of anything that has a `shape`, by path."""
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def params_hash(params: Any) -> str:
    """SHA-256 of all parameters in the order of their per-layer names, with dtypes and shapes.

    Scanned and looped layouts of the same weights have the same hash.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    digest = hashlib.sha256()
    for name, slot in sorted(slots(shapes_of(flat)).items()):
        value = flat[slot.leaf] if slot.layer is None else flat[slot.leaf][slot.layer]
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""A training state as a checkpoint stores it: arrays by path, PRNG keys as their data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vivit_jax.errors import UserError

_SHOWN = 8  # paths in a message


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by '/'-joined path."""
    leaves = jax.tree.leaves_with_path(tree)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(found) != len(leaves):
        raise UserError("two leaves of the state have the same path; rename one")
    return found


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_arrays(state: Any) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The state's leaves by path, with keys as their data, and the generator of each key."""
    leaves = flat(state)
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) or not leaf.size:
            raise UserError(
                f"state {path!r} is {type(leaf).__name__} {getattr(leaf, 'shape', '')}; expected a "
                "jax.Array that is not empty"
            )
    keys = {path: str(jax.random.key_impl(leaf)) for path, leaf in leaves.items() if _is_key(leaf)}
    return leaves | {path: jax.random.key_data(leaves[path]) for path in keys}, keys


def from_arrays(state: Any, arrays: Mapping[str, jax.Array], keys: Mapping[str, str]) -> Any:
    """The tree like `state` of what `to_arrays` has returned."""
    leaves = [
        jax.random.wrap_key_data(arrays[path], impl=keys[path]) if path in keys else arrays[path]
        for path in flat(state)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def storage(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding that a leaf is stored with: a key is stored as its data."""
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        struct = jax.eval_shape(jax.random.key_data, struct)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=leaf.sharding)


def check_state(
    stored: Mapping[str, Any], keys: Mapping[str, str], wanted: Mapping[str, Any], where: Path
) -> None:
    """Raises UserError unless the checkpoint has the paths, shapes and dtypes of the state."""
    unsharded = [path for path, leaf in wanted.items() if leaf.sharding is None]
    if unsharded:
        raise UserError(
            f"restore needs a sharding for every array; {some_of(unsharded)} of the state has none"
        )
    for leaf in wanted.values():
        leaf.sharding.shard_shape(leaf.shape)  # raised later, its ValueError would pass for damage
    differs = []
    for path in wanted.keys() & stored.keys():
        has, needs = _storage_text(stored[path], keys.get(path)), array_text(wanted[path])
        if has != needs:
            differs.append(f"{path} ({has} there, {needs} here)")
    kinds = {
        "not in the checkpoint": sorted(wanted.keys() - stored.keys()),
        "only in the checkpoint": sorted(stored.keys() - wanted.keys()),
        "different": sorted(differs),
    }
    problems = [f"{title}: {some_of(paths)}" for title, paths in kinds.items() if paths]
    if problems:
        raise UserError(
            f"{where} holds a different training state; {'; '.join(problems)}. Resume with the "
            "recipe that started the run"
        )


def array_text(leaf: Any) -> str:
    """The dtype and shape of an array, as in messages."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _storage_text(leaf: Any, impl: str | None) -> str:
    if impl is None:
        return array_text(leaf)
    dtype = jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
    return f"{dtype}{list(leaf.shape[:-1])}"


def some_of(paths: Sequence[str]) -> str:
    """The first of many paths, as in messages."""
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more

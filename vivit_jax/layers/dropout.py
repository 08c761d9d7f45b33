# SPDX-License-Identifier: Apache-2.0
"""Dropout and drop path, drawn for each clip by its id, its number in the whole batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray

from vivit_jax.masking import AnyArray


def clip_keys(key: PRNGKeyArray, clip_ids: Int[AnyArray, " b"]) -> Key[jax.Array, " b"]:
    """One key for each clip: a function of `key` and of the clip's id.

    So a batch computed in parts, or on several devices, draws what the whole batch on one device
    does. The keys are threefry's whatever `key` is: under vmap the other generators draw from the
    first key of a batch for all of it.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        data = jax.random.bits(key, (2,), jnp.uint32)
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(clip_ids))


def draw_kept(
    key: PRNGKeyArray, clip_ids: Int[AnyArray, " b"], keep, shape: Sequence[int]
) -> Bool[jax.Array, "b ..."]:
    """True with probability `keep`, of the given shape for each clip, drawn by the clip's id."""

    def draw(key):
        return jax.random.bernoulli(key, keep, tuple(shape))

    return jax.vmap(draw)(clip_keys(key, clip_ids))


def dropout(
    module: nn.Module,
    x: Float[jax.Array, "b ..."],
    rate: float,
    clip_ids: Int[AnyArray, " b"] | None,
    shared: Sequence[int] = (),
) -> Float[jax.Array, "b ..."]:
    """Set values of x to 0 with probability `rate` and divide the others by 1 - rate.

    A rate of 1 leaves zeros. Without `clip_ids` nothing is dropped. All places along the axes
    `shared` are dropped or kept together. The key is the next one of `module`'s stream "dropout".
    """
    if clip_ids is None or not rate:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
    kept = draw_kept(module.make_rng("dropout"), clip_ids, 1 - rate, shape[1:])
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def dropout_ids(
    clip_ids: Int[AnyArray, " b"] | None, batch: int, deterministic: bool
) -> Int[AnyArray, " b"] | None:
    """The clip ids that layers drop by: 0, 1, ... unless given, None where nothing is dropped."""
    if deterministic:
        return None
    return jnp.arange(batch) if clip_ids is None else clip_ids

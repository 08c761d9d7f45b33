# SPDX-License-Identifier: Apache-2.0
"""What is left out at random in training, drawn for each clip by its number in the batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def clip_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """One key for each clip, [b]: a function of `key` and of the clips' numbers `rows`, int [b].

    So a batch computed in parts, or on several devices, draws what the whole batch on one device
    does. The keys are threefry's whatever `key` is: under vmap the other generators draw from the
    first key of a batch for all of it.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        data = jax.random.bits(key, (2,), jnp.uint32)
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(rows))


def draw_kept(key, rows, keep, shape: Sequence[int]) -> jax.Array:
    """bool [b, *shape], True with probability `keep`: row i is a function of (key, rows[i])."""
    draw = lambda key: jax.random.bernoulli(key, keep, tuple(shape))  # noqa: E731
    return jax.vmap(draw)(clip_keys(key, rows))


def dropout(module, x, rate: float, rows: jax.Array | None, shared: Sequence[int] = ()):
    """Set values of x [b, ...] to 0 with probability `rate` and divide the others by 1 - rate.

    A rate of 1 leaves zeros. Nothing happens without `rows`, the clips' numbers [b]. Along the axes
    `shared` all places have the same fate. The key is the next of the stream "dropout" of `module`,
    a linen module.
    """
    if rows is None or not rate:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
    kept = draw_kept(module.make_rng("dropout"), rows, 1 - rate, shape[1:])
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def numbered(rows: jax.Array | None, batch: int, deterministic: bool) -> jax.Array | None:
    """The clips' numbers that the layers are given: None where nothing is dropped."""
    if deterministic:
        return None
    return jnp.arange(batch) if rows is None else rows

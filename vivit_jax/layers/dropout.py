# SPDX-License-Identifier: Apache-2.0
"""What is left out at random in training, drawn for each clip by its number in the batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def draw_kept(key, rows, keep, shape: Sequence[int]) -> jax.Array:
    """bool [b, *shape], True with probability `keep`: row i is a function of (key, rows[i]).

    One key per clip, so that a batch computed in parts, or on several devices, keeps what the whole
    batch on one device does.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return jax.vmap(lambda key: jax.random.bernoulli(key, keep, tuple(shape)))(keys)


def dropout(module, x, rate: float, rows: jax.Array | None, shared: Sequence[int] = ()):
    """Set values of x [b, ...] to 0 with probability `rate` and divide the others by 1 - rate.

    Nothing happens without `rows`, the clips' numbers [b]. Along the axes `shared` all places have
    the same fate. The key is the next of the stream "dropout" of `module`, a linen module.
    """
    if rows is None or not rate:
        return x
    shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
    kept = draw_kept(module.make_rng("dropout"), rows, 1 - rate, shape[1:])
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def numbered(rows: jax.Array | None, batch: int, deterministic: bool) -> jax.Array | None:
    """The clips' numbers that the layers are given: None where nothing is dropped."""
    if deterministic:
        return None
    return jnp.arange(batch) if rows is None else rows

# SPDX-License-Identifier: Apache-2.0
"""Exact attention in a loop over blocks of queries, for a partitioner to split by clips and heads.

All clips and heads are in every round, as batch axes of plain products, which the compiler of any
platform splits without a rule, whatever a mesh's axes are called. The tiles are those of
`vivit_jax.layers.chunked`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from vivit_jax.layers.chunked import (
    Tile,
    backward_tile,
    by_platform,
    forward_tile,
    mean_gradient,
)

FEWEST, MOST = 64, 512  # queries in a block, in whatever number of clips and heads


def forward(q, k, v, *, devices: int):
    """As that of `chunked`, over clips and heads of which each device is to have its part."""
    return by_platform(functools.partial(_forward_blocks, devices=devices), q, k, v)


def backward(q, k, v, out, log_sum, d_out, *, devices: int):
    """As that of `chunked`."""
    function = functools.partial(_backward_blocks, devices=devices)
    return by_platform(function, q, k, v, out, log_sum, d_out)


def _forward_blocks(q, k, v, tile, devices):
    length, size = q.shape[-3], _block(q, k, tile, devices)
    q, k, v = (jnp.moveaxis(x, -2, -3) for x in (q, k, v))
    run = _over_heads(forward_tile, q.ndim - 2)
    out, log_sum = jax.lax.map(lambda q: run(q, k, v), _blocks(q, size))
    return _joined(out, length), _joined(log_sum, length)[..., 0]


def _backward_blocks(q, k, v, out, log_sum, d_out, tile, devices):
    length, size, dtypes = q.shape[-3], _block(q, k, tile, devices), (k.dtype, v.dtype)
    rows = q, log_sum[..., None], d_out, mean_gradient(out, d_out, log_sum.dtype)
    k, v, *rows = (jnp.moveaxis(x, -2, -3) for x in (k, v, *rows))
    run = _over_heads(backward_tile, k.ndim - 2)

    def one_block(sums, block):
        q, *block = block
        d_q, *add = run(q, k, v, *block)
        return jax.tree.map(jnp.add, sums, add), d_q

    zeros = [jnp.zeros_like(x, log_sum.dtype) for x in (k, v)]
    sums, d_q = jax.lax.scan(one_block, zeros, [_blocks(x, size) for x in rows])
    d_k, d_v = (
        jnp.moveaxis(x, -3, -2).astype(dtype) for x, dtype in zip(sums, dtypes, strict=True)
    )
    return _joined(d_q, length), d_k, d_v


def _over_heads(function, axes: int):
    """The function of one head's tokens [l, e] over so many leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def _block(q, k, tile: Tile, devices: int) -> int:
    """Queries in a block, so many that the tile of a device is about as large as `tile`.

    A device's share of clips and heads is supposed to be equal to the others'; in a batch of any
    size it counts as one clip.
    """
    *clips, length, heads, _ = q.shape
    share = heads
    if all(isinstance(size, int) for size in clips):
        share = math.ceil(math.prod(clips) * heads / devices)
    most = min(tile.rows, tile.scores // k.shape[-3]) // max(1, share)
    count = math.ceil(length / min(max(most, FEWEST), MOST))
    return math.ceil(length / count)


def _blocks(x, size: int):
    """[..., l, e] -> [blocks, ..., size, e], zeros at the end."""
    *leading, length, width = x.shape
    count = math.ceil(length / size)
    x = jnp.pad(x, (*((0, 0),) * len(leading), (0, count * size - length), (0, 0)))
    return jnp.moveaxis(x.reshape(*leading, count, size, width), -3, 0)


def _joined(x, length: int):
    """[blocks, ..., n, size, e] -> [..., l, n, e]."""
    x = jnp.moveaxis(x, 0, -3)
    *leading, heads, count, size, width = x.shape
    return jnp.moveaxis(x.reshape(*leading, heads, count * size, width)[..., :length, :], -3, -2)

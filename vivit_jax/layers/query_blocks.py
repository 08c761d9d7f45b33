# SPDX-License-Identifier: Apache-2.0
"""Exact attention in a loop over blocks of queries, for a partitioner to split by clips and heads.

Every round has all clips and heads, as batch axes of plain products. The compiler of any platform
splits those without a rule, whatever a mesh's axes are called. The tiles are those of
`vivit_jax.layers.chunked`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from vivit_jax.layers.chunked import (
    Keys,
    LogSums,
    Queries,
    Tile,
    backward_tile,
    by_platform,
    forward_tile,
    mean_gradient,
)

FEWEST, MOST = 64, 512  # queries in a block, whatever the number of clips and heads


def forward(q: Queries, k: Keys, v: Keys, *, devices: int) -> tuple[Queries, LogSums]:
    """As `chunked.forward`, for clips and heads that are split over so many devices."""
    return by_platform(functools.partial(_forward_blocks, devices=devices), q, k, v)


def backward(
    q: Queries, k: Keys, v: Keys, out: Queries, log_sum: LogSums, d_out: Queries, *, devices: int
) -> tuple[Queries, Keys, Keys]:
    """As `chunked.backward`."""
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
    """The function of one head's tokens [l, e], mapped over so many leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def _block(q, k, tile: Tile, devices: int) -> int:
    """Queries in a block, so that the tile of a device is about as large as `tile`.

    Devices are assumed to have equal shares of clips and heads; in a batch of symbolic size a
    share counts as one clip.
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

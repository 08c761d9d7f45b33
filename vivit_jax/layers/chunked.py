# SPDX-License-Identifier: Apache-2.0
"""Exact attention in tiles of scores, forward and backward, for every platform and length.

The scores of all heads at once are never held: a tile is a block of one head's queries against all
of its keys, or several short heads together. The forward pass keeps the output and one number for
each query, the logarithm of the sum of its exponentials, from which the backward pass makes the
weights of a tile again (Dao et al. 2022, FlashAttention, section 3.1 and appendix B, with whole
rows of scores in a tile, so that no running maximum is needed).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vivit_jax.layers.linear import project, wide_type


@dataclasses.dataclass(frozen=True)
class Tile:
    """How much is computed at a time: a block of a head's queries, or several whole heads."""

    queries: int  # of one head, at most
    rows: int  # queries of all heads of a tile, at most
    scores: int  # of a tile, at most


# On CPU a tile should stay in cache: 523 queries of 1568 take 3.3 MB. Accelerators need more work
# at a time: 16384 rows of scores, whose memory is linear in tokens, 98 MiB for 1568.
TILES = {"cpu": Tile(576, 2**12, 2**21), "default": Tile(4096, 2**14, 2**27)}
SAVED = "attention"  # the name of what a remat policy may keep


def chunked_attention(q, k, v):
    """softmax(q k^T / sqrt(e)) v; q [b, q, n, e], k and v [b, k, n, e] -> [b, q, n, e].

    Scores and softmax are in float32, in float64 for float64. Memory beside the operands is one
    tile. Has a derivative in reverse mode, of any order, and none in forward mode (`jax.jvp`): use
    "xla" for that.
    """
    b, _, n, e = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * n, -1, e) for x in (q, k, v))
    return _attend(q, k, v).reshape(b, n, -1, e).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attend(q, k, v):
    """q [h, q, e], k and v [h, k, e] -> [h, q, e]."""
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    out, log_sum = _by_platform(_forward_tiles, q, k, v)
    out, log_sum = checkpoint_name(out, SAVED), checkpoint_name(log_sum, SAVED)
    return out, (q, k, v, out, log_sum)


def _backward(residuals, d_out):
    return _by_platform(_backward_tiles, *residuals, d_out)


_attend.defvjp(_forward, _backward)


def _by_platform(function, *operands):
    """`function(*operands, tile)` with the tile of the platform that it is compiled for."""
    with_tile = {name: functools.partial(function, tile=tile) for name, tile in TILES.items()}
    return jax.lax.platform_dependent(*operands, **with_tile)


def _forward_tiles(q, k, v, tile):
    _, num_queries, e = q.shape
    block, heads = _plan(q.shape[0], num_queries, k.shape[1], tile)

    def one_head(head):
        q, k, v = head

        def one_block(q):
            scores = _scores(q, k)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(-1, keepdims=True)
            out = _weighted_sum(weights, v) / total
            return out.astype(v.dtype), largest + jnp.log(total)

        return _map(one_block, q)

    out, log_sum = _map(one_head, (_blocks(q, block), k, v), heads)
    join = lambda x: x.reshape(q.shape[0], -1, x.shape[-1])[:, :num_queries]  # noqa: E731
    return join(out), join(log_sum)


def _backward_tiles(q, k, v, out, log_sum, d_out, tile):
    _, num_queries, e = q.shape
    block, heads = _plan(q.shape[0], num_queries, k.shape[1], tile)
    wide = log_sum.dtype
    # What the softmax's derivative takes off: the weighted mean of the gradient to the weights.
    mean = jnp.sum(out.astype(wide) * d_out.astype(wide), -1, keepdims=True)

    def one_head(head):
        blocks, k, v = head

        def one_block(sums, block):
            q, d_out, log_sum, mean = block
            weights = jnp.exp(_scores(q, k) - log_sum)
            d_weights = jnp.einsum("qe,ke->qk", d_out, v, preferred_element_type=wide)
            d_scores = weights * (d_weights - mean) * e**-0.5
            if q.dtype == jnp.float16:  # which ends at 6e-8, and the scores' gradients do not
                q, keys = q.astype(wide), k.astype(wide)
            else:
                d_scores, keys = d_scores.astype(q.dtype), k
            add = (
                jnp.einsum("qk,qe->ke", d_scores, q, preferred_element_type=wide),
                jnp.einsum(
                    "qk,qe->ke", weights.astype(d_out.dtype), d_out, preferred_element_type=wide
                ),
            )
            sums = add if sums is None else jax.tree.map(jnp.add, sums, add)
            return sums, project(d_scores, keys)

        if len(blocks[0]) == 1:
            (d_k, d_v), d_q = one_block(None, jax.tree.map(lambda x: x[0], blocks))
            return d_q[None], d_k, d_v
        zeros = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
        (d_k, d_v), d_q = jax.lax.scan(one_block, zeros, blocks)
        return d_q, d_k, d_v

    blocks = jax.tree.map(lambda x: _blocks(x, block), (q, d_out, log_sum, mean))
    d_q, d_k, d_v = _map(one_head, (blocks, k, v), heads)
    d_q = d_q.reshape(q.shape[0], -1, e)[:, :num_queries]
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _plan(num_heads: int, num_queries: int, num_keys: int, tile: Tile) -> tuple[int, int]:
    """Queries in a block, and heads that are computed together: as many each time."""
    rows = min(tile.rows, tile.scores // num_keys)
    blocks = math.ceil(num_queries / max(1, min(tile.queries, rows)))
    block = math.ceil(num_queries / blocks)
    most = max(1, rows // block) if blocks == 1 else 1
    if isinstance(num_heads, int):  # else a batch of any size, of which each clip has as many
        most = min(most, num_heads)
    return block, max(n for n in range(1, most + 1) if num_heads % n == 0)


def _blocks(x, block: int):
    """[h, l, e] -> [h, blocks, block, e], zeros at the end."""
    h, length, e = x.shape
    count = math.ceil(length / block)
    return jnp.pad(x, ((0, 0), (0, count * block - length), (0, 0))).reshape(h, count, block, e)


def _scores(q, k):
    wide = wide_type(q.dtype)
    return jnp.einsum("qe,ke->qk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5


def _weighted_sum(weights, v):
    """[q, k] times [k, e]; the weights are not yet divided by their sum."""
    if weights.dtype == v.dtype:
        return project(weights, v)
    # Kept wide: 3137 equal weights of 1 take values of 21 past 65504, the largest float16.
    return jnp.dot(weights.astype(v.dtype), v, preferred_element_type=weights.dtype)


def _map(function, xs, together: int = 1):
    """`jax.lax.map`, `together` at a time, and without a loop where one round is enough."""
    count = jax.tree.leaves(xs)[0].shape[0]
    if count == 1:
        return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))
    if isinstance(count, int) and together >= count:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=together if together > 1 else None)

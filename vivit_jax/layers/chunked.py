# SPDX-License-Identifier: Apache-2.0
"""Exact attention in tiles of scores, forward and backward, for every platform and length.

The scores of all heads are never held at once: a tile is a block of one head's queries against all
of its keys, or several short heads together. The forward pass keeps the output and one number for
each query, the logarithm of the sum of its exponentials; from these the backward pass recomputes
the weights of a tile (Dao et al. 2022, FlashAttention, section 3.1 and appendix B). Tiles have
whole rows of scores, so that no running maximum is needed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from vivit_jax.layers.linear import project, wide_type
from vivit_jax.layers.matrices import eigen_is_faster, matrix_product, turned
from vivit_jax.layers.platform import platform

Queries = Float[jax.Array, "*b q n e"]
Keys = Float[jax.Array, "*b k n e"]  # or values
LogSums = Float[jax.Array, "*b q n"]  # logarithms of the sums of exponentials


@dataclasses.dataclass(frozen=True)
class Tile:
    """How much is computed at a time: a block of a head's queries, or several whole heads."""

    queries: int  # of one head, at most
    rows: int  # queries of all heads of a tile, at most
    scores: int  # of a tile, at most
    keys_in_rows: bool = False  # whether the backward pass in bfloat16 has scores [k, q]


# On CPU a tile should stay in cache: 523 queries of 1568 take 3.3 MB. Accelerators need more work
# at a time: 16384 rows of scores, whose memory is linear in tokens, 98 MiB for 1568.
TILES = {"cpu": Tile(576, 2**12, 2**21, True), "default": Tile(4096, 2**14, 2**27)}
SAVED = "attention"  # checkpoint name: a remat policy may keep these results


def forward(q: Queries, k: Keys, v: Keys) -> tuple[Queries, LogSums]:
    """softmax(q k^T / sqrt(e)) v on one device, and the logarithms of the sums of exponentials.

    Scores and softmax are in float32, or in float64 for float64. It needs the memory of one tile
    besides the operands.
    """
    return by_platform(_forward_tiles, q, k, v)


def backward(
    q: Queries, k: Keys, v: Keys, out: Queries, log_sum: LogSums, d_out: Queries
) -> tuple[Queries, Keys, Keys]:
    """The gradients to q, k and v, from the results of `forward` and the gradient to `out`."""
    return by_platform(_backward_tiles, q, k, v, out, log_sum, d_out)


def by_platform(function, *operands):
    """`function(*operands, tile)` with the tile of the platform it is compiled for."""
    with_tile = {name: functools.partial(function, tile=tile) for name, tile in TILES.items()}
    return jax.lax.platform_dependent(*operands, **with_tile)


def forward_tile(q, k, v):
    """One head: queries [q, e], keys and values [k, e] -> [q, e], logarithms of sums [q, 1]."""
    q, scale = _scaled(q)
    scores = _scores(q, k, scale)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = _weighted_sum(weights, v) / total
    return out.astype(v.dtype), largest + jnp.log(total)


def backward_tile(q, k, v, log_sum, d_out, mean):
    """One head's queries [q, e] -> d_q, and their part of d_k and d_v in log_sum's type.

    log_sum [q, 1] is from `forward_tile`, mean [q, 1] from `mean_gradient`.
    """
    wide = log_sum.dtype
    q, scale = _scaled(q)
    weights = jnp.exp(_scores(q, k, scale) - log_sum)
    d_weights = _products(d_out, v, wide)
    d_scores = weights * (d_weights - mean)
    if scale is not None:
        d_scores = d_scores * scale
    kept = k.dtype
    if kept == jnp.float16:  # its smallest number, 6e-8, is too large for the scores' gradients
        q, k = q.astype(wide), k.astype(wide)
    else:
        d_scores = d_scores.astype(kept)
    d_k = jnp.einsum("qk,qe->ke", d_scores, q, preferred_element_type=wide)
    d_v = jnp.einsum("qk,qe->ke", weights.astype(kept), d_out, preferred_element_type=wide)
    d_q = project(d_scores, k)
    if scale is None:
        d_q = d_q * _scale(q)
    return d_q.astype(kept), d_k, d_v


def keys_in_rows(turned_k, q, k, v, log_sum, d_out, mean):
    """`backward_tile` with scores [k, q], so that no product sums over the first axis of a tile.

    On CPU YNNPACK's bfloat16 kernel then takes all five products, see `vivit_jax.layers.matrices`:
    1568 tokens and 12 heads of 64 took 45 ms instead of 60 (2 cores, AVX512-BF16). turned_k [e, k].
    """
    wide, scale = log_sum.dtype, _scale(q)
    of_queries = functools.partial(jnp.einsum, "ke,qe->kq", preferred_element_type=wide)
    weights = jnp.exp(of_queries(k, q) * scale - log_sum.T)
    d_scores = weights * (of_queries(v, d_out) - mean.T) * scale
    weights, d_scores = weights.astype(k.dtype), d_scores.astype(k.dtype)
    d_k, d_v, d_q = (
        jnp.matmul(a, b, preferred_element_type=wide)
        for a, b in ((d_scores, q), (weights, d_out), (turned_k, d_scores))
    )
    return d_q.astype(k.dtype).T, d_k, d_v


def mean_gradient(out, d_out, wide):
    """The softmax derivative subtracts this: the weighted mean of the gradient to the weights."""
    return jnp.sum(out.astype(wide) * d_out.astype(wide), -1, keepdims=True)


def _forward_tiles(q, k, v, tile):
    shape = q.shape
    q, k, v = map(_by_head, (q, k, v))
    block, heads = _plan(q.shape[0], q.shape[1], k.shape[1], tile)

    def one_head(head):
        blocks, k, v = head
        return _map(lambda q: forward_tile(q, k, v), blocks)

    out, log_sum = _map(one_head, (_blocks(q, block), k, v), heads)
    return _by_token(out, shape), _by_token(log_sum, (*shape[:-1], 1))[..., 0]


def _backward_tiles(q, k, v, out, log_sum, d_out, tile):
    like = q, k, v
    rows = q, log_sum[..., None], d_out, mean_gradient(out, d_out, log_sum.dtype)
    k, v, *rows = map(_by_head, (k, v, *rows))
    block, heads = _plan(k.shape[0], rows[0].shape[1], k.shape[1], tile)
    in_rows = tile.keys_in_rows and k.dtype == jnp.bfloat16

    def one_head(head):
        blocks, k, v = head
        run = functools.partial(keys_in_rows, turned(k)) if in_rows else backward_tile

        def one_block(sums, block):
            q, *block = block
            d_q, *add = run(q, k, v, *block)
            return (add if sums is None else jax.tree.map(jnp.add, sums, add)), d_q

        if len(blocks[0]) == 1:
            (d_k, d_v), d_q = one_block(None, jax.tree.map(lambda x: x[0], blocks))
            return d_q[None], d_k, d_v
        zeros = [jnp.zeros_like(x, log_sum.dtype) for x in (k, v)]
        (d_k, d_v), d_q = jax.lax.scan(one_block, zeros, blocks)
        return d_q, d_k, d_v

    found = _map(one_head, ([_blocks(x, block) for x in rows], k, v), heads)
    return tuple(_by_token(x, y.shape).astype(y.dtype) for x, y in zip(found, like, strict=True))


def _by_head(x):
    """[..., l, n, e] -> [h, l, e], h all heads of all clips."""
    *leading, length, heads, width = x.shape
    return jnp.moveaxis(x, -2, -3).reshape(math.prod(leading) * heads, length, width)


def _by_token(x, shape):
    """[h, l, e], or [h, blocks, block, e] with padding -> [..., l, n, e] of that shape."""
    *leading, length, heads, width = shape
    x = x.reshape(x.shape[0], -1, width)[:, :length]
    return jnp.moveaxis(x.reshape(*leading, heads, length, width), -3, -2)


def _plan(num_heads: int, num_queries: int, num_keys: int, tile: Tile) -> tuple[int, int]:
    """Queries in a block, and heads computed together; the same numbers each time."""
    rows = min(tile.rows, tile.scores // num_keys)
    blocks = math.ceil(num_queries / max(1, min(tile.queries, rows)))
    block = math.ceil(num_queries / blocks)
    most = max(1, rows // block) if blocks == 1 else 1
    if isinstance(num_heads, int):  # else a batch of symbolic size
        most = min(most, num_heads)
    return block, max(n for n in range(1, most + 1) if num_heads % n == 0)


def _blocks(x, block: int):
    """[h, l, e] -> [h, blocks, block, e], zeros at the end."""
    h, length, e = x.shape
    count = math.ceil(length / block)
    return jnp.pad(x, ((0, 0), (0, count * block - length), (0, 0))).reshape(h, count, block, e)


def _scale(q) -> float:
    return q.shape[-1] ** -0.5


def _scaled(q):
    """(Queries times 1 / sqrt(e), None); or (queries, the factor left for the scores).

    A row of e takes less time to scale than a row of scores: 1568 tokens took 0.89 of the time
    forward (float32, AMD EPYC with AVX-512). In half precision, unless the factor is a power of
    two, scaling queries would round once more; there the scores are scaled.
    """
    scale = _scale(q)
    if q.dtype == wide_type(q.dtype) or math.frexp(scale)[0] == 0.5:
        return q * scale, None
    return q, scale


def _scores(q, k, scale: float | None):
    """Scaled q k^T in float32 or wider; q and `scale` as from `_scaled`."""
    scores = _products(q, k, wide_type(q.dtype))
    return scores if scale is None else scores * scale


def _products(q, k, dtype):
    """q k^T of [q, e] and [k, e]; Eigen takes k as [e, k], transposed once a head."""
    if platform() == "cpu" and eigen_is_faster():
        return matrix_product(q, k.T, dtype)
    return jnp.einsum("qe,ke->qk", q, k, preferred_element_type=dtype)


def _weighted_sum(weights, v):
    """[q, k] times [k, e]; the weights are not yet divided by their sum."""
    if weights.dtype == v.dtype:
        return project(weights, v)
    # Wide: 3137 weights of 1 and values of 21 exceed 65504, the largest float16.
    return jnp.dot(weights.astype(v.dtype), v, preferred_element_type=weights.dtype)


def _map(function, xs, together: int = 1):
    """`jax.lax.map`, `together` at a time, without a loop if one round is enough."""
    count = jax.tree.leaves(xs)[0].shape[0]
    if count == 1:
        return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))
    if isinstance(count, int) and together >= count:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=together if together > 1 else None)

# SPDX-License-Identifier: Apache-2.0
"""Exact attention as two Pallas kernels for TPU, forward and backward; no score leaves the chip.

The kernels that come with jax have features last: flash in all arrays, splash in the result and the
gradients. Then the 64 features of a head fill half of a register's 128 lanes, memory pads them to
128, XLA copies inputs and outputs into that layout and to whole blocks, and the logarithm of each
sum is written 128 times. Here tokens are last, as XLA itself lays out [b, l, n, 64]: the kernels
read what the projections write, without a copy, and the scores of a query are a column, whose
maximum and sum are cheap. The kernels use only Pallas's public names; splash's backward pass,
without its forward pass, is private.

One chip of v5e, 8 clips x 1568 tokens x 12 heads of 64, bfloat16, forward and backward, as libtpu
0.0.42.1 compiles it; nothing here was run on a TPU. Millions of cycles, at 1500 MHz: outside the
kernels by XLA's estimate, in them by their scheduled instructions.

                 memory traffic   temporaries   outside   kernels
    this              0.16 GiB         0 MiB        0        2.6
    splash            0.97 GiB       253 MiB        5.1      5.6   blocks of 896
    flash             3.22 GiB       817 MiB       10.1            blocks of 512
    chunked           4.44 GiB        40 MiB       14.3
    xla               7.16 GiB      1434 MiB       23.0

The matrix unit needs 1.6 for the arithmetic alone, and 2.6 in fact: three of seven products sum
over 64 features, half of its depth, and tokens are padded to 1664.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from vivit_jax.errors import ConfigError
from vivit_jax.layers.chunked import Keys, Queries
from vivit_jax.layers.platform import flag

LANES = 128  # of a register, and the side of the matrix unit
ROWS = 16  # of a register in half precision; float32 has 8
CHUNK = 256  # keys whose scores are computed at a time
# Scores of one program, which is unrolled: 1664 x 1664 take 18,000 instructions in the backward
# pass. Blocks of many queries need fewer for each score; short heads share a program's overhead.
MOST_SCORES = 3 * 2**20
SHORT_SCORES = 2**19
MOST_HEADS = 16  # of one program
VMEM = 14.5 * 2**20  # bytes, of the 16 MiB that a kernel has on each of v4, v5e, v5p and v6e
SHORTEST = 64  # queries and keys for which the kernels win, see `worth_it`
NARROWEST = 8  # head width: Mosaic does not broadcast 4 in bfloat16, which do not fill a sublane


def worth_it(length: int, width: int) -> bool:
    """Whether the kernels take less time than XLA's and the chunked form, by estimate.

    `length` is in tokens, `width` that of a head.

    Millions of cycles of v5e, forward and backward, 12 heads of 64, bfloat16, copies included:

        clips x tokens   1568 x 16   512 x 32   256 x 64   128 x 100   64 x 197   8 x 784   4 x 3137
        this                  24.5        7.6        3.7         1.7        0.7       0.8        5.5
        chunked               13.1        7.0        6.9         3.9        3.9       3.3       42.5
        xla                   15.1        7.3        7.2         4.1        4.4       6.3       42.3

    Short sequences leave most of 128 lanes empty, and XLA copies them into that layout.
    """
    return length >= SHORTEST and width >= NARROWEST


def cycles(heads: int, num_queries: int, num_keys: int, head_width: int, *, backward: bool) -> int:
    """A kernel's cycles on one core of v5e or v5p in bfloat16; `heads` is b * n.

    XLA's own estimate of a compiled program leaves kernels out. A product that sums over features
    takes the unit's whole depth, the others as many rows as features; the rest is fitted to the
    schedules of libtpu 0.0.42.1, within a quarter from 128 tokens on. v6e takes 0.7 (forward) and
    0.63 (backward) of that, v4 1.55 and 1.32 times as long at 1568 tokens; a chip of v4 or v5p has
    two cores, which share the heads.
    """
    deep = _up(head_width, LANES)
    features = 2 * deep + 3 * head_width if backward else deep + head_width
    tokens = _up(num_queries, LANES) * _up(num_keys, LANES)
    product = tokens * features / (4 * LANES**2)  # four units of LANES x LANES
    return round(heads * (product + 80 if backward else 1.15 * product + 100))


LogSums = Float[jax.Array, "*b q n"]  # of type float32, as the softmax is


def forward(q: Queries, k: Keys, v: Keys) -> tuple[Queries, LogSums]:
    """softmax(q k^T / sqrt(e)) v, and for `backward` the logarithms of the sums of exponentials.

    It is for one device, or for its share of clips and heads inside `shard_map`. float16, which
    TPUs lack, is computed in float32. Without a TPU it runs only under
    `jax.experimental.pallas.tpu.force_tpu_interpret_mode()`, for tests.
    """
    like = q
    q, k, v = _tokens_last(q, k, v)
    log_sum = _like(q, (q.shape[0], 1, q.shape[-1]), jnp.float32)
    parts = []
    for plan, part in _plans(q, k, arrays=2, sums=0):
        queries, keys, sums = plan.specs()
        run = plan.call(
            _forward_kernel, "attention_forward",
            in_specs=[queries, keys, keys], out_specs=[queries, sums],
            out_shape=[_like(q), log_sum],
            cost_estimate=plan.cost(products=2, arrays=2),
        )  # fmt: skip
        parts.append(run(q, k[..., part], v[..., part]))
    out, log_sum = functools.reduce(_join, parts)
    *leading, num_queries, n, _ = like.shape
    log_sum = jnp.moveaxis(log_sum.reshape(*leading, n, num_queries), -1, -2)
    return _heads_next_to_last(out, like), log_sum


def backward(
    q: Queries, k: Keys, v: Keys, out: Queries, log_sum: LogSums, d_out: Queries
) -> tuple[Queries, Keys, Keys]:
    """Gradients to q, k and v, in their types, from the operands and results of `forward`."""
    given = q, k, v
    q, k, v, out, d_out = _tokens_last(q, k, v, out, d_out)
    log_sum = jnp.moveaxis(log_sum, -1, -2).reshape(q.shape[0], 1, q.shape[-1])
    d_q, d_k, d_v = [], [], []
    for plan, part in _plans(q, k, arrays=4, sums=2):
        queries, keys, sums = plan.specs()
        run = plan.call(
            _backward_kernel, "attention_backward",
            in_specs=[queries, keys, keys, queries, sums, queries],
            out_specs=[queries, keys, keys],
            out_shape=[_like(q), _like(k[..., part]), _like(v[..., part])],
            scratch_shapes=plan.sums(), cost_estimate=plan.cost(products=5, arrays=4),
        )  # fmt: skip
        found = run(q, k[..., part], v[..., part], out, log_sum, d_out)
        for all_parts, one in zip((d_q, d_k, d_v), found, strict=True):
            all_parts.append(one)
    d_q = d_q[0] if len(d_q) == 1 else sum(x.astype(jnp.float32) for x in d_q)
    d_k, d_v = (x[0] if len(x) == 1 else jnp.concatenate(x, -1) for x in (d_k, d_v))
    d_q, d_k, d_v = map(_heads_next_to_last, (d_q, d_k, d_v), given)
    return d_q, d_k, d_v


def _like(x, shape=None, dtype=None) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result: that of x unless given, varying in a `shard_map` as x does."""
    varying = jax.typeof(x).mat
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=varying)


def _tokens_last(*arrays):
    """[..., l, n, e] -> [h, e, l], h all heads; XLA lays them out so that nothing is moved."""
    kinds = {x.dtype.name for x in arrays}
    if len(kinds) > 1 or kinds <= {"float64"}:
        raise ConfigError(
            "attention='pallas' takes q, k and v of one type, float32, bfloat16 or float16, got "
            f"{sorted(kinds)}; use attention='chunked'"
        )
    if kinds == {"float16"}:
        arrays = [x.astype(jnp.float32) for x in arrays]
    return [jnp.moveaxis(x, -3, -1).reshape(-1, x.shape[-1], x.shape[-3]) for x in arrays]


def _heads_next_to_last(x, like):
    """[h, e, l] -> [..., l, n, e], with the shape and type of `like`."""
    *leading, length, n, e = like.shape
    return jnp.moveaxis(x.reshape(*leading, n, e, length), -1, -3).astype(like.dtype)


def _join(one, other):
    """Attention over two parts of the keys, each given by its output and logarithms of sums."""
    (out, log_sum), (more, log_more) = one, other
    total = jnp.logaddexp(log_sum, log_more)
    out, more = out.astype(jnp.float32), more.astype(jnp.float32)
    return out * jnp.exp(log_sum - total) + more * jnp.exp(log_more - total), total


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one program computes: blocks of queries of a few heads, against all of their keys.

    Blocks are filled up to whole registers. Past the end of an array a block holds arbitrary
    values, which the kernels replace.
    """

    num_heads: int
    num_queries: int
    num_keys: int
    head_width: int
    dtype: jnp.dtype
    heads: int = 1
    queries: int = LANES

    @property
    def keys(self) -> int:
        return _up(self.num_keys, LANES)

    @property
    def width(self) -> int:
        return _up(self.head_width, ROWS)

    @property
    def whole(self) -> bool:
        """Whether all queries are in one block, so that no sum goes from block to block."""
        return self.queries >= self.num_queries

    @property
    def chunks(self) -> list[slice]:
        starts = range(0, self.keys, CHUNK)
        return [slice(start, min(start + CHUNK, self.keys)) for start in starts]

    def specs(self):
        """Blocks of arrays [h, e, q], [h, e, k] and [h, 1, q]."""
        queries = pl.BlockSpec((self.heads, self.width, self.queries), lambda i, j: (i, 0, j))
        keys = pl.BlockSpec((self.heads, self.width, self.keys), lambda i, j: (i, 0, 0))
        return queries, keys, pl.BlockSpec((self.heads, 1, self.queries), lambda i, j: (i, 0, j))

    def sums(self):
        shape = (self.heads, self.width, self.keys)
        return [] if self.whole else [pltpu.VMEM(shape, jnp.float32)] * 2

    def bytes(self, arrays: int, sums: int) -> int:
        """VMEM for two buffers of each array, of both lengths, for sums, and for values.

        Values are three chunks of scores, and six of features x queries, in float32.
        """
        one = self.heads * self.width
        size = self.dtype.itemsize
        blocks = 2 * arrays * one * (self.queries + self.keys) * size
        kept = 0 if self.whole else 4 * sums * one * self.keys
        values = 4 * self.queries * (3 * min(CHUNK, self.keys) + 6 * self.width)
        return blocks + kept + values

    def cost(self, products: int, arrays: int):
        """For XLA's schedule: so many matrix products, and arrays of both lengths."""
        if not isinstance(self.num_heads, int):
            return None
        scores = self.num_heads * self.num_queries * self.num_keys
        tokens = self.num_heads * (self.num_queries + self.num_keys)
        return pl.CostEstimate(
            flops=2 * products * scores * self.head_width,
            transcendentals=scores,
            bytes_accessed=arrays * tokens * self.head_width * self.dtype.itemsize,
        )

    def call(self, kernel, name, **how):
        return pl.pallas_call(
            functools.partial(kernel, plan=self),
            grid=(pl.cdiv(self.num_heads, self.heads), pl.cdiv(self.num_queries, self.queries)),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            name=name,
            **how,
        )


def _plans(q, k, arrays: int, sums: int):
    """A plan for each part of the keys; one part if VMEM holds all keys."""
    h, e, num_queries = q.shape
    num_keys = k.shape[-1]
    count = 0
    while True:
        count += 1
        size = _up(math.ceil(num_keys / count), LANES)
        plan = _largest(_Plan(h, num_queries, min(size, num_keys), e, q.dtype), arrays, sums)
        if plan is not None:
            break
        if size == LANES:
            raise ConfigError(
                f"attention='pallas' got head width {e}, of which not even 128 queries and keys "
                "fit into a TPU's VMEM; use attention='chunked'"
            )
    parts = [slice(start, min(start + size, num_keys)) for start in range(0, num_keys, size)]
    return [(dataclasses.replace(plan, num_keys=x.stop - x.start), x) for x in parts]


def _largest(plan: _Plan, arrays: int, sums: int) -> _Plan | None:
    """The plan with the number of queries or heads in a program that is fastest; None if none fits.

    A block takes about as long as its tiles of LANES queries and one more. Precise float32 products
    are sums of six products of parts of their operands, which need room.
    """
    tiles = math.ceil(plan.num_queries / LANES)
    share = 2 if _precise(plan.dtype) else 1

    def fits(tried, most):
        scores = tried.heads * tried.queries * tried.keys
        return scores <= most / share and tried.bytes(arrays, sums) <= VMEM / share

    found = {}
    for count in range(1, tiles + 1):
        tiles_each = math.ceil(tiles / count)
        tried = dataclasses.replace(plan, queries=tiles_each * LANES)
        if fits(tried, MOST_SCORES):
            found.setdefault(count * (tiles_each + 1), tried)
    if not found:
        return None
    best = found[min(found)]
    symbolic = not isinstance(plan.num_heads, int)  # a batch of any size
    for heads in range(MOST_HEADS if symbolic else min(plan.num_heads, MOST_HEADS), 1, -1):
        tried = dataclasses.replace(best, heads=heads)
        if best.whole and fits(tried, SHORT_SCORES):
            return tried
    return best


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


def _within(x, rows, columns):
    """x [rows, columns] of a block, with zeros past the array's own rows and columns."""
    for axis, size in enumerate((rows, columns)):
        if not isinstance(size, int) or size < x.shape[axis]:
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < size, x, 0)
    return x


def _precise(dtype) -> bool:
    """Whether float32 products are asked for in more than one pass of bfloat16."""
    asked = flag("jax_default_matmul_precision")
    return dtype == jnp.float32 and asked not in (None, "default", "bfloat16", "fastest")


def _dot(x, y, x_axis: int, y_axis: int):
    """Matrix product in float32 over one axis of each."""
    precision = jax.lax.Precision.HIGHEST if _precise(x.dtype) else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _scores(k, q, left: int, plan: _Plan):
    """Scores to base 2, [k, q]; rows from `left` on are not of keys and hold -inf."""
    scores = _dot(k, q, 0, 0) * (plan.head_width**-0.5 / math.log(2))
    if left < scores.shape[0]:
        inside = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) < left
        scores = jnp.where(inside, scores, -jnp.inf)
    return scores


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, log_sum_ref, *, plan: _Plan):
    """q [h, e, q], k and v [h, e, k] -> out [h, e, q] and log_sum [h, 1, q]."""
    for head in range(plan.heads):
        q = _within(q_ref[head], plan.head_width, plan.queries)
        kept = None  # the largest score, the sum and the output so far
        for chunk in plan.chunks:
            left = plan.num_keys - chunk.start
            k, v = (_within(ref[head, :, chunk], plan.head_width, left) for ref in (k_ref, v_ref))
            scores = _scores(k, q, left, plan)
            top = scores.max(0, keepdims=True)
            if kept is not None:
                top = jnp.maximum(kept[0], top)
            weights = jnp.exp2(scores - top)
            add, add_out = weights.sum(0, keepdims=True), _dot(v, weights.astype(v.dtype), 1, 0)
            if kept is not None:
                largest, total, out = kept
                shrink = jnp.exp2(largest - top)
                add, add_out = total * shrink + add, out * shrink + add_out
            kept = top, add, add_out
        assert kept is not None  # there is a chunk
        largest, total, out = kept
        out_ref[head] = (out / total).astype(out_ref.dtype)
        log_sum_ref[head] = (largest + jnp.log2(total)) * math.log(2)


def _backward_kernel(
    q_ref, k_ref, v_ref, out_ref, log_sum_ref, d_out_ref,
    d_q_ref, d_k_ref, d_v_ref, *sums, plan: _Plan,
):  # fmt: skip
    """As `_forward_kernel`; the sums of d_k and d_v over blocks of queries are [h, e, k]."""
    scale, block = plan.head_width**-0.5, pl.program_id(1)
    queries = plan.queries
    if plan.num_queries % plan.queries:
        queries = plan.num_queries - block * plan.queries
    if sums:

        @pl.when(block == 0)
        def start():
            for ref in sums:
                ref[...] = jnp.zeros_like(ref)

    for head in range(plan.heads):
        q, out, d_out = (
            _within(ref[head], plan.head_width, queries) for ref in (q_ref, out_ref, d_out_ref)
        )
        log_sum = _within(log_sum_ref[head], 1, queries) * (1 / math.log(2))
        # The softmax derivative subtracts this: the weighted mean of the gradient to the weights.
        mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), 0, keepdims=True)
        d_q = jnp.zeros(q.shape, jnp.float32)
        for chunk in plan.chunks:
            left = plan.num_keys - chunk.start
            k, v = (_within(ref[head, :, chunk], plan.head_width, left) for ref in (k_ref, v_ref))
            weights = jnp.exp2(_scores(k, q, left, plan) - log_sum)
            d_scores = (weights * (_dot(v, d_out, 0, 0) - mean)).astype(q.dtype)
            d_q += _dot(k, d_scores, 1, 0)
            d_k, d_v = _dot(q, d_scores, 1, 1), _dot(d_out, weights.astype(q.dtype), 1, 1)
            if sums:
                sums[0][head, :, chunk] += d_k
                sums[1][head, :, chunk] += d_v
            else:
                d_k_ref[head, :, chunk] = (d_k * scale).astype(d_k_ref.dtype)
                d_v_ref[head, :, chunk] = d_v.astype(d_v_ref.dtype)
        d_q_ref[head] = (d_q * scale).astype(d_q_ref.dtype)
    if sums:

        @pl.when(block == pl.num_programs(1) - 1)
        def end():
            d_k_ref[...] = (sums[0][...] * scale).astype(d_k_ref.dtype)
            d_v_ref[...] = sums[1][...].astype(d_v_ref.dtype)

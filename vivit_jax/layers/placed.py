# SPDX-License-Identifier: Apache-2.0
"""Attention split by clips and heads on any mesh: each head is computed once, none is moved.

A program for one device loops over heads. If a partitioner splits the loop's axis, it gathers all
that the loop reads, in every round, and each device computes every head. So the loop over heads
must be inside the split, and no mechanism of JAX puts it there on all platforms: libtpu refuses
`custom_partitioning`, and `shard_map` has to know the axes. Hence

* if the axes are known while tracing (`vivit_jax.layers.axes`), `jax.shard_map` over them, in which
  each device runs the one-device function on its share;
* if not (an automatic mesh of other names without rules for logical axes, or arrays split with no
  mesh set), a primitive that decides when it is lowered. A program for one device, or one in which
  all axes are manual, gets the one-device function. Any other program gets
  `vivit_jax.layers.query_blocks`, whose loop is over queries, which nobody splits, and whose
  products every partitioner splits by itself. On TPU that takes 1.8 times as long by the
  compiler's estimate (v5e, 8 clips of 1568 tokens, 12 heads of 64, bfloat16, both passes: 16.2 ms
  against 9.2).

The two passes are placed separately, inside the derivative's rule: so no transposed `shard_map`
sums values that several devices hold.
"""

import logging
from functools import cache, partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from vivit_jax.layers import chunked, pallas, query_blocks
from vivit_jax.layers.axes import Placement, partitions, placement_of
from vivit_jax.layers.chunked import SAVED, Keys, Queries

log = logging.getLogger(__name__)


# The implementations that are placed here: modules with both passes for one device.
# `forward(q, k, v)` takes q [..., l, n, e], k and v [..., k, n, e] and returns out, like q, and
# log_sum [..., l, n] in float32 or wider, the logarithm of the sum of each query's exponentials;
# `backward(q, k, v, out, log_sum, d_out)` returns d_q, d_k, d_v.
PLACED: dict[str, ModuleType] = {"chunked": chunked, "pallas": pallas}


def placed_attention(
    q: Queries, k: Keys, v: Keys, implementation: str = "chunked", leading=("batch",)
) -> Queries:
    """softmax(q k^T / sqrt(e)) v.

    `leading` has the logical names of the leading axes; by default there is one, the clips. It has
    derivatives of any order in reverse mode and none in forward mode (`jax.jvp`): use "xla" for
    that.
    """
    placement = placement_of(q, leading)
    q, k, v = _varying_alike(*placement.typed_alike(q, k, v))
    return _attend(q, k, v, implementation, placement)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q, k, v, implementation, placement):
    return _forward(q, k, v, implementation, placement)[0]


def _forward(q, k, v, implementation, placement):
    out, log_sum = _placed(placement, implementation, "forward", q, k, v)
    out, log_sum = checkpoint_name(out, SAVED), checkpoint_name(log_sum, SAVED)
    return out, (q, k, v, out, log_sum)


def _backward(implementation, placement, residuals, d_out):
    (d_out,) = placement.typed_alike(d_out)
    return _placed(placement, implementation, "backward", *residuals, d_out)


_attend.defvjp(_forward, _backward)


def _placed(placement: Placement, implementation: str, way: str, *arrays):
    """One pass, on each device's share as far as that is known."""
    found = placement.on_each(partial(_bind, implementation, way))(*arrays)
    return _varying_alike(*found, *arrays)[: len(found)]


def _varying_alike(*arrays):
    """The arrays, all typed as varying over each manual axis that one of them varies over."""
    axes = set().union(*(jax.typeof(x).mat.varying for x in arrays))
    missing = [tuple(sorted(axes - jax.typeof(x).mat.varying)) for x in arrays]
    return tuple(
        jax.lax.pcast(x, names, to="varying") for x, names in zip(arrays, missing, strict=True)
    )


_share_p = Primitive("attention_share")
_share_p.multiple_results = True


def _bind(implementation, way, *arrays):
    """The primitive; it carries the one-device program, for code that inspects programs."""
    function = getattr(PLACED[implementation], way)
    # Traced anew for each call: what it reads of this module and `chunked` may have changed.
    local = jax.make_jaxpr(lambda *arrays: function(*arrays))(*arrays)
    return tuple(_share_p.bind(*arrays, implementation=implementation, way=way, local=local))


@_share_p.def_impl
def _run(*arrays, implementation, way, local):
    del local  # new each time: as part of the key it would hide the compiled program
    return list(_compiled(implementation, way)(*arrays))


@cache
def _compiled(implementation, way):
    return jax.jit(partial(_bind, implementation, way))


@_share_p.def_abstract_eval
def _types(*_, local, **__):
    return local.out_avals


def _lower(ctx, *arrays, implementation, way, local):
    devices = partitions(ctx.module_context.axis_context)
    function = jaxpr_as_fun(local)
    if devices > 1:
        if implementation == "pallas" and way == "forward":
            log.warning(
                "attention: chunked instead of pallas on %d devices, as nothing says which axes of "
                "the mesh split clips and heads: jax.set_mesh and flax.linen.logical_axis_rules "
                "for 'batch' and 'heads' do",
                devices,
            )
        function = partial(getattr(query_blocks, way), devices=devices)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *arrays)


# Not cached: the same call is lowered differently inside and outside a `shard_map`.
mlir.register_lowering(_share_p, _lower, cacheable=False)


def _batch(arrays, axes, *, implementation, way, local):
    (size,) = {x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None}
    arrays = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(arrays, axes, strict=True)
    ]
    placement = placement_of(arrays[0], None)  # along an explicit axis that was mapped over
    out = _placed(placement, implementation, way, *arrays)
    return out, (0,) * len(out)


batching.primitive_batchers[_share_p] = _batch


def _differentiate(primals, tangents, *, way, **_):
    """Derivatives of second and higher order, of the form that partitioners split."""
    tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
    return jax.jvp(partial(getattr(query_blocks, way), devices=1), primals, tangents)


ad.primitive_jvps[_share_p] = _differentiate

# SPDX-License-Identifier: Apache-2.0
"""Products of half precision on CPU, where how one is written decides which kernel takes it.

XLA for CPU hands a product of bfloat16 to YNNPACK's kernel, twice as fast as that of float32, where
the left operand's last axis is summed over and the result is float32; since jax 0.12 it may be
bfloat16. Any other product it makes one of float32 first. Measured for 1568 tokens and widths of
768 and 3072 on 2 cores of an AMD EPYC with AVX512-BF16, in TFLOP/s: 0.91 against 0.44 for the
gradient to the input, 0.85 against 0.41 for that to the kernel, which sums over tokens. float16 has
no such kernel and is made float32 in any form.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from vivit_jax.layers.axes import partitions

_STRIP = 32  # columns that are turned together


def rounded_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [m, k] times y [k, n], both of one half precision; summed in float32, then rounded.

    So are its derivatives. Only for what runs on CPU; elsewhere, and where a partitioner splits it,
    it is a plain product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or (mesh.size == 1 and set(mesh.axis_types) == {AxisType.Auto})
    return _bind(x, y, (1, 0)) if alone else _plain(x, y, (1, 0))


def _plain(x, y, summed):
    # Products of two numbers of half precision are exact whatever jax_default_matmul_precision.
    dimensions = (((summed[0],), (summed[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, jax.lax.Precision.DEFAULT)


def _with_wide_sums(x, y, summed):
    """As `_plain`, in the form that YNNPACK takes."""
    if summed[0] == 0:
        x = turned(x)
    dimensions = (((1,), (summed[1],)), ((), ()))
    exact = jax.lax.Precision.DEFAULT
    wide = jax.lax.dot_general(x, y, dimensions, exact, preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


def turned(x):
    """The transpose [k, m] of x [m, k], as XLA does not see it.

    A transposition that it sees it takes into the product, which then sums over the first axis. In
    strips of columns it is also several times as fast as in one.
    """
    m, k = x.shape
    strip = np.gcd(k, _STRIP)
    return x.reshape(m, k // strip, strip).transpose(1, 2, 0).reshape(k, m)


# The product by the axes of x and y, matrices, that are summed over. A primitive, since the
# derivative of a product is plain products, and that of a function with rules of its own is either
# forward or backward.
_product_p = Primitive("rounded_product")


def _bind(x, y, summed):
    return _product_p.bind(x, y, summed=summed, plain=_traced(jax.typeof(x), jax.typeof(y), summed))


@cache
def _traced(x, y, summed):
    """The plain product, for all that looks into programs."""
    return jax.make_jaxpr(partial(_plain, summed=summed))(x, y)


@_product_p.def_impl
def _run(x, y, *, summed, plain):
    del plain
    return _compiled(summed)(x, y)


@cache
def _compiled(summed):
    return jax.jit(partial(_bind, summed=summed))


@_product_p.def_abstract_eval
def _type(x, y, *, summed, plain):
    del x, y, summed
    return plain.out_avals[0]


def _gradient_to_x(g, x, y, *, summed, plain):
    del x, plain
    kept = 1 - summed[1]  # of y's axes the one that g's last is
    return _bind(g, y, (1, kept)) if summed[0] == 1 else _bind(y, g, (kept, 1))


def _gradient_to_y(g, x, y, *, summed, plain):
    del y, plain
    kept = 1 - summed[0]  # of x's axes the one that g's first is
    return _bind(x, g, (kept, 0)) if summed[1] == 0 else _bind(g, x, (0, kept))


ad.defbilinear(_product_p, _gradient_to_x, _gradient_to_y)


def _batch(arrays, axes, *, summed, plain):
    del plain
    (x, y), (x_axis, y_axis) = arrays, axes
    if y_axis is None and summed[0] == 1:  # rows of all are rows of one product
        x = jnp.moveaxis(x, x_axis, 0)
        found = _bind(x.reshape(-1, x.shape[-1]), y, summed)
        return found.reshape(*x.shape[:2], -1), 0
    return jax.vmap(partial(_plain, summed=summed), axes)(x, y), 0


batching.primitive_batchers[_product_p] = _batch


def _lower(ctx, x, y, *, summed, plain):
    function = jaxpr_as_fun(plain)
    return mlir.lower_fun(function, multiple_results=True)(ctx, x, y)


def _lower_on_cpu(ctx, x, y, *, summed, plain):
    if partitions(ctx.module_context.axis_context) > 1:
        return _lower(ctx, x, y, summed=summed, plain=plain)
    function = partial(_with_wide_sums, summed=summed)
    return mlir.lower_fun(function, multiple_results=False)(ctx, x, y)


# Not cached: the same call lies differently inside and outside of a `shard_map`.
mlir.register_lowering(_product_p, _lower, cacheable=False)
mlir.register_lowering(_product_p, _lower_on_cpu, platform="cpu", cacheable=False)

# SPDX-License-Identifier: Apache-2.0
"""Products of two float32 matrices on a CPU, by the faster of the two libraries that XLA has.

XLA gives a dot to YNNPACK. On an Intel Xeon with AMX, 2 cores, YNNPACK took 1.34, 1.10 and 1.21
times as long as MKL for [1568, 768] with [768, 768], [768, 3072] and [3072, 768]; Eigen took 0.99,
1.08 and 1.03 times as long, with a smaller error to float64. q k^T of attention's tiles Eigen
multiplies as fast as MKL if k lies as [64, l]; weights times v take YNNPACK two thirds of Eigen's
time. On an AMD EPYC with AVX-512 (Zen 5) the two are level: 0.999 of VideoMAE-B's forward pass. So
Eigen gets projections and scores, on processors with AMX.

The one way to Eigen in a program is a convolution without spatial dimensions: XLA rewrites it as a
dot after YNNPACK's turn. Only jaxlib 0.10 does: 0.11 and 0.12 leave the convolution, which takes
150 times as long. So does 0.10 with convolutions of transposed matrices, such as JAX's derivative
of a convolution makes; the derivative here is of dots.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

FEW_COLUMNS = 160  # the width of a head, which YNNPACK multiplies faster
CPUINFO = pathlib.Path("/proc/cpuinfo")
NAME = "matrix_product"  # of the primitive, for what looks at the primitives of a program
_ROWS_BY_COLUMNS = jax.lax.ConvDimensionNumbers((0, 1), (1, 0), (0, 1))


def matrix_product(x, y, dtype=None):
    """x y for matrices [m, k] and [k, n] -> [m, n], in their type or in `dtype`.

    A plain dot, but for float32 matrices of many columns where Eigen is the faster library.
    """
    types = {x.dtype, y.dtype, np.dtype(dtype or x.dtype)}
    if types != {np.dtype("float32")} or y.shape[1] < FEW_COLUMNS or not eigen_is_faster():
        return jnp.matmul(x, y, preferred_element_type=dtype)
    as_dot = jax.make_jaxpr(jnp.matmul)(x, y)
    return _product_p.bind(x, y, as_dot=as_dot)[0]


@functools.cache
def eigen_is_faster() -> bool:
    """Whether this machine's processor and jaxlib are of those that are better off with Eigen."""
    rewrites = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11)
    return rewrites and "amx_tile" in _processor_flags()


def _processor_flags() -> list[str]:
    """What Linux says that the processor can do; nothing on other systems."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


_product_p = Primitive(NAME)
_product_p.multiple_results = True


@_product_p.def_impl
def _run(x, y, *, as_dot):
    del as_dot
    return [jax.jit(matrix_product)(x, y)]


@_product_p.def_abstract_eval
def _types(*_, as_dot):
    return as_dot.out_avals


def _lower(ctx, *matrices, as_dot):
    """The convolution, in a program of one device that runs here and now.

    A partitioner has better rules for dots, and an exported program runs with any later jaxlib.
    """
    context = ctx.module_context
    axes = context.axis_context
    devices = axes.mesh.size if isinstance(axes, mlir.SPMDAxisContext) else axes.num_devices
    exported = context.lowering_parameters.for_export
    function = jaxpr_as_fun(as_dot)
    if tuple(context.platforms) == ("cpu",) and devices == 1 and not exported:
        function = _convolution
    return mlir.lower_fun(function, multiple_results=True)(ctx, *matrices)


def _convolution(x, y):
    return [jax.lax.conv_general_dilated(x, y, (), [], dimension_numbers=_ROWS_BY_COLUMNS)]


# Not cached: the same product lies differently inside and outside of a `shard_map`.
mlir.register_lowering(_product_p, _lower, cacheable=False)


def _differentiate(primals, tangents, *, as_dot):
    x, y = primals
    d_x, d_y = tangents
    parts = []
    if type(d_x) is not ad.Zero:
        parts.append(jnp.matmul(d_x, y))
    if type(d_y) is not ad.Zero:
        parts.append(jnp.matmul(x, d_y))
    return _product_p.bind(x, y, as_dot=as_dot), [sum(parts[1:], parts[0])]


ad.primitive_jvps[_product_p] = _differentiate


def _batch(matrices, axes, *, as_dot):
    """Rows of many matrices with one are rows of one matrix; else a dot with a batch axis."""
    (x, y), (of_x, of_y) = matrices, axes
    if of_y is None:
        x = jnp.moveaxis(x, of_x, 0)
        rows = matrix_product(x.reshape(-1, x.shape[-1]), y)
        return [rows.reshape(*x.shape[:-1], y.shape[-1])], [0]
    return [jax.vmap(jnp.matmul, (of_x, of_y))(x, y)], [0]


batching.primitive_batchers[_product_p] = _batch

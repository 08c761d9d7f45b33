# SPDX-License-Identifier: Apache-2.0
"""Products of two matrices on a CPU, written so that XLA uses its fastest kernel for each.

Half precision. XLA uses YNNPACK's bfloat16 kernel, twice as fast as the float32 one, if the left
operand's last axis is summed over and the result is float32; since jax 0.12 it may be bfloat16. It
converts all other products to float32 first. Measured for 1568 tokens and widths of 768 and 3072 on
2 cores of an AMD EPYC with AVX512-BF16, in TFLOP/s: 0.91 against 0.44 for the gradient to the
input, 0.85 against 0.41 for that to the kernel, which sums over tokens. float16 has no such kernel
and is converted in any form.

float32. XLA gives a dot to YNNPACK. On an Intel Xeon with AMX, 2 cores, that took 1.34, 1.10 and
1.21 times as long as MKL for [1568, 768] with [768, 768], [768, 3072] and [3072, 768]; Eigen took
0.99, 1.08 and 1.03 times as long, with a smaller error to float64. For q k^T of attention's tiles
Eigen is as fast as MKL if k is stored as [64, l]; for weights times v YNNPACK takes two thirds of
Eigen's time. On an AMD EPYC with AVX-512 (Zen 5) the two are level: 0.999 of VideoMAE-B's forward
pass. So Eigen gets projections and scores, on processors with AMX. A program can only reach it by a
convolution without spatial dimensions, which XLA rewrites as a dot after YNNPACK's turn. Only
jaxlib 0.10 does that: 0.11 and 0.12 keep the convolution, which takes 150 times as long, as 0.10
does with convolutions of transposed matrices; so the products of derivatives are dots.
"""

import pathlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jaxtyping import Float

from vivit_jax.layers.axes import partitions
from vivit_jax.layers.platform import flag
from vivit_jax.masking import AnyArray

FEW_COLUMNS = 160  # a head has 64 to 128, which YNNPACK multiplies faster; projections 192 and more
CPUINFO = pathlib.Path("/proc/cpuinfo")
_STRIP = 32  # columns that are turned together
_ROWS_BY_COLUMNS = jax.lax.ConvDimensionNumbers((0, 1), (1, 0), (0, 1))


def matrix_product(
    x: Float[AnyArray, "m k"], y: Float[AnyArray, "k n"], dtype=None
) -> Float[jax.Array, "m n"]:
    """x times y, both of one type, in that type or in `dtype`.

    Half precision results are summed in float32, then rounded; so are their derivatives. This is
    for programs on a CPU; elsewhere, and where a partitioner splits it, it is a plain product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or (mesh.size == 1 and set(mesh.axis_types) == {AxisType.Auto})
    if alone and x.dtype == y.dtype == np.dtype(dtype or x.dtype) and _has_a_form(y):
        return contracted(x, y, (1, 0))
    return jnp.matmul(x, y, preferred_element_type=dtype)


def _has_a_form(y) -> bool:
    """Whether a product with y has a faster form than a dot of its type."""
    if y.dtype == jnp.float32:
        return y.shape[1] >= FEW_COLUMNS and eigen_is_faster()
    return _is_half(y.dtype)


def _is_half(dtype) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16)


@cache
def eigen_is_faster() -> bool:
    """Whether Eigen is faster with this machine's processor and jaxlib."""
    rewrites = tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11)
    return rewrites and "amx_tile" in _processor_flags()


def _processor_flags() -> list[str]:
    """The processor's features by Linux's names; none on other systems."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def _plain(x, y, summed):
    # Products of two half precision numbers are exact whatever jax_default_matmul_precision.
    precision = jax.lax.Precision.DEFAULT if _is_half(x.dtype) else None
    return jax.lax.dot_general(x, y, (((summed[0],), (summed[1],)), ((), ())), precision)


def _with_wide_sums(x, y, summed):
    """As `_plain`, in the form that YNNPACK takes."""
    if summed[0] == 0:
        x = turned(x)
    dimensions = (((1,), (summed[1],)), ((), ()))
    exact = jax.lax.Precision.DEFAULT
    wide = jax.lax.dot_general(x, y, dimensions, exact, preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


def turned(x):
    """The transpose [k, m] of x [m, k], hidden from XLA.

    XLA would merge a transpose that it sees into the product, which then sums over the first axis.
    In strips of columns it is also several times as fast.
    """
    m, k = x.shape
    strip = np.gcd(k, _STRIP)
    return x.reshape(m, k // strip, strip).transpose(1, 2, 0).reshape(k, m)


def _by_eigen(x, y):
    return jax.lax.conv_general_dilated(x, y, (), [], dimension_numbers=_ROWS_BY_COLUMNS)


# The product of matrices x and y by the axes summed over. It is a primitive, which has derivatives
# in both modes: a function with its own rule has them in forward or in backward mode only.
NAME = "matrix_product"  # of the primitive, for code that counts the products of a program
_product_p = Primitive(NAME)


def saved(primitive, *operands, **_) -> bool:
    """For a remat policy: whether this is a float32 product, to be kept as a dot would be.

    Half precision products are kept by name.
    """
    return primitive is _product_p and operands[0].dtype == jnp.float32


def contracted(x, y, summed):
    """The product of matrices of one type, summed over an axis of each, in its form for CPU."""
    precision = flag("jax_default_matmul_precision")
    plain = _traced(jax.typeof(x), jax.typeof(y), summed, precision)
    return _product_p.bind(x, y, summed=summed, plain=plain)


@cache
def _traced(x, y, summed, precision):
    """The plain product, for code that inspects programs; `precision` is JAX's default."""
    del precision
    return jax.make_jaxpr(partial(_plain, summed=summed))(x, y)


@_product_p.def_impl
def _run(x, y, *, summed, plain):
    del plain
    with jax.disable_jit(False):  # else the compiled function would call this again, for ever
        return _compiled(summed)(x, y)


@cache
def _compiled(summed):
    return jax.jit(partial(contracted, summed=summed))


@_product_p.def_abstract_eval
def _type(x, y, *, summed, plain):
    del x, y, summed
    return plain.out_avals[0]


def _gradient_to_x(g, x, y, *, summed, plain):
    del x, plain
    kept = 1 - summed[1]  # the axis of y that is g's last
    return contracted(g, y, (1, kept)) if summed[0] == 1 else contracted(y, g, (kept, 1))


def _gradient_to_y(g, x, y, *, summed, plain):
    del y, plain
    kept = 1 - summed[0]  # the axis of x that is g's first
    return contracted(x, g, (kept, 0)) if summed[1] == 0 else contracted(g, x, (0, kept))


ad.defbilinear(_product_p, _gradient_to_x, _gradient_to_y)


def _batch(arrays, axes, *, summed, plain):
    del plain
    (x, y), (x_axis, y_axis) = arrays, axes
    if y_axis is None and summed[0] == 1:  # one product of all rows
        x = jnp.moveaxis(x, x_axis, 0)
        many, rows, terms = x.shape
        found = contracted(x.reshape(many * rows, terms), y, summed)
        return found.reshape(many, rows, found.shape[1]), 0
    return jax.vmap(partial(_plain, summed=summed), axes)(x, y), 0


batching.primitive_batchers[_product_p] = _batch


def _lower(ctx, x, y, *, summed, plain):
    context = ctx.module_context
    form, as_dot = None, jaxpr_as_fun(plain)
    if _is_half(ctx.avals_in[0].dtype):
        form = partial(_with_wide_sums, summed=summed)
    elif summed == (1, 0) and not context.lowering_parameters.for_export:
        form = _by_eigen  # not in exports: a later jaxlib would keep the convolution
    if form is None or partitions(context.axis_context) > 1:
        return mlir.lower_fun(as_dot, multiple_results=True)(ctx, x, y)

    def by_platform(x, y):
        return jax.lax.platform_dependent(x, y, cpu=form, default=lambda *xy: as_dot(*xy)[0])

    return mlir.lower_fun(by_platform, multiple_results=False)(ctx, x, y)


# Not cached: the same call is lowered differently inside and outside a `shard_map`.
mlir.register_lowering(_product_p, _lower, cacheable=False)

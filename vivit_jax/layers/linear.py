# SPDX-License-Identifier: Apache-2.0
"""Projections and norms that carry logical axis names, our dtypes and our numerical choices."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from vivit_jax.config import Config
from vivit_jax.layers.matrices import matrix_product
from vivit_jax.layers.parts import with_whole_kernels
from vivit_jax.layers.platform import platform

PROJECTED = "projection"  # the name of what a remat policy may keep


def exact_gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's cumulative function, by erf as PyTorch computes it.

    `jax.nn.gelu` takes erfc, which XLA on CPU computes in twice the time.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * np.asarray(0.5**0.5, x.dtype)))


def _relu6(x: jax.Array) -> jax.Array:
    """x cut to [0, 6]; its gradient is 0 on both ends as in PyTorch, where jax's takes a half."""
    return jnp.where(x > 0, jnp.where(x < 6, x, 6), 0).astype(x.dtype)


def _laplace(x: jax.Array) -> jax.Array:
    """The normal distribution's cumulative function at MEGA's mean and deviation."""
    mean, deviation = 0.707107, 0.282095
    return 0.5 * (1 + jax.lax.erf((x - mean) / (deviation * math.sqrt(2.0))))


def _sqrt_softplus(x: jax.Array) -> jax.Array:
    """sqrt(log(1 + e^x)), which is e^(x/2) to the last bit far below 0.

    There the root's own gradient would be infinity times 0, which PyTorch returns as NaN.
    """
    root = jnp.sqrt(jax.nn.softplus(jnp.maximum(x, -40)))
    return jnp.where(x < -40, jnp.exp(jnp.minimum(x, -40) / 2), root)


# "gelu" is the exact erf form, "gelu_fast" and its siblings the tanh approximation; they differ by
# up to 4.7e-4 per unit and must never be mixed up. The names are those of transformers' ACT2FN but
# for its two with parameters of their own, and "selu", which transformers documents and lacks.
_gelu_tanh = partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "gelu": exact_gelu,
    "gelu_10": lambda x: jnp.clip(exact_gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": exact_gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * _relu6(x + 3) / 6,
    "laplace": _laplace,
    "leaky_relu": lambda x: jnp.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": _relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


PRECISE_TERMS = 256


def wide_type(dtype) -> np.dtype:
    """float32 for half precision and for itself, float64 for float64.

    NumPy's promotion, since JAX's raises under jax_numpy_dtype_promotion="strict".
    """
    return np.promote_types(dtype, np.float32)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widen half precision, in which softmax, norms and losses lose too much; keep float64."""
    return x.astype(wide_type(x.dtype))


def project(x: jax.Array, kernel: jax.Array, num_in: int = 1, dtype=None) -> jax.Array:
    """Contract the last `num_in` axes of x with the first `num_in` of the kernel.

    The result has their type, or `dtype` if that is wider.

    On CPU it is a product of two matrices, whose gradients are such products too; over more axes
    XLA first copies what it multiplies, transposed (52 copies in a pre-training step, now 14).
    `vivit_jax.layers.matrices` says in which form. Elsewhere axes keep their places for the
    compiler to shard.

    Under jax_default_matmul_precision="highest" a long float32 sum on CPU is taken in blocks of
    PRECISE_TERMS. XLA there adds all terms in one chain, whose error is 2 to 3 times that of
    PyTorch's blocks of 192; the blocks cost a third of the speed, so they are not the default.
    """
    if platform() != "cpu":
        return jnp.tensordot(x, kernel, num_in, preferred_element_type=dtype)
    left, right = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    terms = math.prod(kernel.shape[:num_in])
    x = x.reshape(math.prod(left), terms)
    kernel = kernel.reshape(terms, math.prod(right))
    precise = jax.config.jax_default_matmul_precision == "highest" and x.dtype == jnp.float32
    step = PRECISE_TERMS if precise else terms
    starts = range(0, terms, step)
    parts = [
        matrix_product(x[:, start : start + step], kernel[start : start + step], dtype)
        for start in starts
    ]
    return sum(parts[1:], parts[0]).reshape(*left, *right)


@jax.custom_jvp
def _written(x: jax.Array) -> jax.Array:
    """x, not computed again by what reads it; nothing is said of its gradient."""
    return jax.lax.optimization_barrier(x)


@_written.defjvp
def _written_jvp(primals, tangents):
    return _written(*primals), tangents[0]


def product(x: jax.Array, kernel: jax.Array, num_in: int = 1) -> jax.Array:
    """`project` in float32 or wider, for what is added or computed before it is rounded.

    Not so on GPU, where XLA fuses a product with no bias and writes float32 at twice the size:
    there half precision is rounded here already, but for products of one vector a clip.
    """
    if wide_type(x.dtype) == x.dtype or (platform() == "gpu" and x.ndim - num_in > 1):
        return project(x, kernel, num_in)
    return _wide_product(x, kernel, num_in)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _wide_product(x, kernel, num_in):
    return project(x, kernel, num_in, jnp.float32)


@partial(_wide_product.defjvp, symbolic_zeros=True)
def _wide_product_jvp(num_in, primals, tangents):
    """Of its own because the transpose of a product that returns float32 multiplies float32.

    So the gradient is rounded once, and those to x and kernel are products of half precision.
    """
    (x, kernel), (d_x, d_kernel) = primals, tangents
    changes = []
    if not isinstance(d_x, SymbolicZero):
        changes.append(at_least_float32(project(d_x, kernel, num_in)))
    if not isinstance(d_kernel, SymbolicZero):
        changes.append(at_least_float32(project(x, d_kernel, num_in)))
    return _wide_product(x, kernel, num_in), sum(changes[1:], changes[0])


def plus_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """What `product` returned plus a bias, in float32 or wider."""
    y = at_least_float32(y)
    if bias is None:
        return y
    return y + jnp.expand_dims(at_least_float32(bias), range(y.ndim - bias.ndim))


def rounded_once(
    y: jax.Array, bias: jax.Array | None, dtype, function: Callable | None = None
) -> jax.Array:
    """function(y + bias) in float32 or wider, then rounded to `dtype`; y as from `product`.

    Rounded after every operation, GELU in bfloat16 has 17 times the error below -1.5. The backward
    pass keeps what the function is of in `dtype`, rounded for that where it was not, and makes what
    the derivative needs in float32 again.
    """
    if y.dtype == wide_type(dtype):
        y, bias = plus_bias(y, bias).astype(dtype), None
    y = checkpoint_name(y, PROJECTED)
    if function is None:
        return plus_bias(y, bias).astype(dtype)
    if wide_type(dtype) == dtype:
        return function(y)
    rounded = lambda y, bias: function(plus_bias(y, bias)).astype(dtype)  # noqa: E731
    # No barrier: it would keep the derivative from being fused with the product before it.
    return jax.checkpoint(rounded, prevent_cse=False)(y, bias)


class Projection(nn.Module):
    """y = x kernel + bias over the last `num_in` axes, with the kernel created at its true rank.

    `nn.DenseGeneral` would initialise a flattened kernel, and rank-3 axis names then raise under
    a mesh (google/flax#3676). The axes of `shape` after the first `num_in` are outputs and the
    bias shape.
    """

    config: Config
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_in: int = 1
    use_bias: bool = True
    zero_init: bool = False

    @nn.compact
    def parameters(self):
        """Kernel and bias in `config.dtype`, the bias None if there is none."""
        config, outputs = self.config, self.shape[self.num_in :]
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        init = nn.initializers.normal(0.0 if self.zero_init else config.initializer_range)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), self.shape, param_dtype
        ).astype(dtype)
        if not self.use_bias:
            return kernel, None
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.num_in :])
        return kernel, self.param("bias", zeros, outputs, param_dtype).astype(dtype)

    def __call__(self, x, activation: str = "linear", columns: Callable | None = None):
        """The activation of that name of x kernel + bias, rounded to `config.dtype`.

        `columns` puts the last axis of kernel and bias, and so of the result, in another order.
        """
        kernel, bias = self.parameters()
        if columns is not None:
            kernel, bias = columns(kernel), None if bias is None else columns(bias)
        y = self._product(x, kernel)
        function = None if activation == "linear" else ACTIVATIONS[activation]
        y = rounded_once(y, bias, kernel.dtype, function)
        # Where nothing else needs the product, XLA for TPU computes it and the function again for
        # each tile of the next one: a layer of V2's giant took 1.15 M estimated cycles forward for
        # the two (v5p, 32 clips), and takes 0.98 M.
        again = function is not None and self.config.remat == "block" and platform() == "tpu"
        return _written(y) if again else y

    def unrounded(self, x):
        """x kernel + bias in float32 or wider, for what is added to it before it is rounded."""
        kernel, bias = self.parameters()
        return plus_bias(self._product(x, kernel), bias)

    def _product(self, x, kernel):
        of_two = partial(product, num_in=self.num_in)
        x = x.astype(kernel.dtype)
        return with_whole_kernels(of_two, x, [kernel], self.axes, self.num_in)[0]


def projections_in(params: Mapping[str, Any], dtype) -> dict[str, Any]:
    """The params with kernels, and biases beside a kernel, in the type that they are used in.

    All else that models have, norms, scales, tokens and positions, they use in float32 or wider.
    """
    of_projection = "kernel" in params

    def cast(name, value):
        if isinstance(value, Mapping):
            return projections_in(value, dtype)
        return value.astype(dtype) if of_projection and name in ("kernel", "bias") else value

    return {name: cast(name, value) for name, value in params.items()}


def project_together(x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array]:
    """[p(x) for p in projections] of one shape [d, n, e], on GPU by one matrix product.

    There x is read once instead of once for each. Elsewhere it is as many products. On CPU the one
    gains nothing, and putting the kernels side by side made a fine-tuning step 1.2 times as long
    (VideoMAE-B, batch 1, 2 cores). A TPU writes each result as attention's kernels read it, and
    spends more on cutting one apart and putting its gradient together than on reading x: 49.4 M
    estimated cycles of a pre-training step against 46.8 M (VideoMAE-B, 8 clips, v5e).
    """
    kernels, biases = zip(*(p.parameters() for p in projections), strict=True)
    dtype, axes = kernels[0].dtype, projections[0].axes
    x = x.astype(dtype)
    if platform() != "gpu":
        products = with_whole_kernels(product, x, kernels, axes)
        return [rounded_once(y, bias, dtype) for y, bias in zip(products, biases, strict=True)]
    kernel = jnp.stack(kernels, axis=1)
    (y,) = with_whole_kernels(product, x, [kernel], (axes[0], None, *axes[1:]))
    if y.dtype == wide_type(dtype):  # not rounded yet: all biases are added before
        zeros = jnp.zeros(kernels[0].shape[1:], dtype)
        bias = jnp.stack([zeros if bias is None else bias for bias in biases])
        y, biases = plus_bias(y, bias).astype(dtype), [None] * len(biases)
    y = checkpoint_name(y, PROJECTED)
    return [plus_bias(y[..., i, :, :], bias).astype(dtype) for i, bias in enumerate(biases)]


class LayerNorm(nn.Module):
    """LayerNorm over the last axis in float32 or wider, rounded once to `config.dtype`.

    The variance is the mean of squares about the mean. From the mean of squares alone, the default
    of `nn.LayerNorm`, it loses accuracy where |mean| >> std: at mean 100 the error is 4e-3 against
    1e-5 for two passes and for PyTorch. That class multiplies float32 by half precision parameters,
    which raises under jax_numpy_dtype_promotion="strict".
    """

    config: Config
    eps: float

    @nn.compact
    def __call__(self, x):
        x = at_least_float32(x)

        def parameter(name, init):
            init = nn.with_logical_partitioning(init, ("embed",))
            value = self.param(name, init, x.shape[-1:], jnp.dtype(self.config.param_dtype))
            return jnp.expand_dims(value.astype(x.dtype), range(x.ndim - 1))

        scale = parameter("scale", nn.initializers.ones)
        bias = parameter("bias", nn.initializers.zeros)
        x = x - x.mean(-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
        return (x * (factor * scale) + bias).astype(self.config.dtype)

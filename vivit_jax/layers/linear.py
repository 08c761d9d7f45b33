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
from jaxtyping import Float

from vivit_jax.config import Config
from vivit_jax.layers.matrices import matrix_product
from vivit_jax.layers.parts import with_whole_kernels
from vivit_jax.layers.platform import flag, platform
from vivit_jax.masking import AnyArray

PROJECTED = "projection"  # checkpoint name: a remat policy may keep these results


def exact_gelu(x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """x times the normal distribution's cumulative function, by erf as in PyTorch.

    `jax.nn.gelu` uses erfc, which takes XLA on CPU twice as long.
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

    There the root's own gradient would be infinity times 0: NaN, which PyTorch returns.
    """
    root = jnp.sqrt(jax.nn.softplus(jnp.maximum(x, -40)))
    return jnp.where(x < -40, jnp.exp(jnp.minimum(x, -40) / 2), root)


# "gelu" is the exact erf form, "gelu_fast" and its siblings the tanh approximation; they differ by
# up to 4.7e-4 per unit and must never be mixed up. The names are transformers' ACT2FN without the
# two that have parameters, and "selu", which transformers documents but lacks.
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
    """The type of exact work: float32 for half precision and float32, float64 for float64.

    By NumPy's promotion, since JAX's raises under jax_numpy_dtype_promotion="strict".
    """
    return np.promote_types(dtype, np.float32)


def at_least_float32(x: Float[AnyArray, "..."]) -> Float[jax.Array, "..."]:
    """Widen half precision, in which softmax, norms and losses lose too much; keep float64."""
    return jnp.asarray(x, wide_type(x.dtype))


def project(
    x: Float[AnyArray, "..."], kernel: Float[AnyArray, "..."], num_in: int = 1, dtype=None
) -> Float[jax.Array, "..."]:
    """Contract the last `num_in` axes of x with the first `num_in` of the kernel.

    The result has their type, or `dtype` if that is wider.

    On CPU it is a product of two matrices, and so are its gradients: with more axes XLA first
    copies the operands, transposed (52 copies in a pre-training step, now 14).
    `vivit_jax.layers.matrices` chooses the form. Elsewhere axes keep their places, for the compiler
    to shard.

    Under jax_default_matmul_precision="highest" a long float32 sum on CPU is taken in blocks of
    PRECISE_TERMS. XLA adds all terms in one chain, with 2 to 3 times the error of PyTorch's blocks
    of 192; the blocks cost a third of the speed, so they are not the default.
    """
    if platform() != "cpu":
        return jnp.tensordot(x, kernel, num_in, preferred_element_type=dtype)
    left, right = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    terms = math.prod(kernel.shape[:num_in])
    x = x.reshape(math.prod(left), terms)
    kernel = kernel.reshape(terms, math.prod(right))
    precise = flag("jax_default_matmul_precision") == "highest" and x.dtype == jnp.float32
    step = PRECISE_TERMS if precise else terms
    starts = range(0, terms, step)
    parts = [
        matrix_product(x[:, start : start + step], kernel[start : start + step], dtype)
        for start in starts
    ]
    return sum(parts[1:], parts[0]).reshape(*left, *right)


@jax.custom_jvp
def _written(x: jax.Array) -> jax.Array:
    """x, which its readers cannot recompute; its gradient is not held back."""
    return jax.lax.optimization_barrier(x)


@_written.defjvp
def _written_jvp(primals, tangents):
    return _written(*primals), tangents[0]


def product(
    x: Float[AnyArray, "..."], kernel: Float[AnyArray, "..."], num_in: int = 1
) -> Float[jax.Array, "..."]:
    """`project` in float32 or wider, so that bias and activation come before rounding.

    On GPU XLA fuses no bias into a product and would write float32, twice the bytes: there half
    precision is rounded at once, except for products with one vector a clip.
    """
    if wide_type(x.dtype) == x.dtype or (platform() == "gpu" and x.ndim - num_in > 1):
        return project(x, kernel, num_in)
    return _wide_product(x, kernel, num_in)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _wide_product(x, kernel, num_in):
    return project(x, kernel, num_in, jnp.float32)


@partial(_wide_product.defjvp, symbolic_zeros=True)
def _wide_product_jvp(num_in, primals, tangents):
    """The rule that keeps gradients in half precision.

    The transpose of a product that returns float32 would multiply float32. Here the gradient is
    rounded once, and those to x and kernel are products of half precision.
    """
    (x, kernel), (d_x, d_kernel) = primals, tangents
    changes = []
    if not isinstance(d_x, SymbolicZero):
        changes.append(at_least_float32(project(d_x, kernel, num_in)))
    if not isinstance(d_kernel, SymbolicZero):
        changes.append(at_least_float32(project(x, d_kernel, num_in)))
    return _wide_product(x, kernel, num_in), sum(changes[1:], changes[0])


def plus_bias(
    y: Float[jax.Array, "..."], bias: Float[jax.Array, "..."] | None
) -> Float[jax.Array, "..."]:
    """y, the result of `product`, plus a bias along its last axes, in float32 or wider."""
    y = at_least_float32(y)
    if bias is None:
        return y
    return y + jnp.expand_dims(at_least_float32(bias), range(y.ndim - bias.ndim))


def rounded_once(
    y: Float[jax.Array, "..."],
    bias: Float[jax.Array, "..."] | None,
    dtype,
    function: Callable | None = None,
) -> Float[jax.Array, "..."]:
    """function(y + bias) in float32 or wider, then rounded to `dtype`; y as from `product`.

    Rounded after every operation, GELU in bfloat16 has 17 times the error below -1.5. The backward
    pass keeps the function's argument in `dtype` and recomputes from it, in float32, what the
    derivative needs.
    """
    if y.dtype == wide_type(dtype):
        y, bias = plus_bias(y, bias).astype(dtype), None
    y = checkpoint_name(y, PROJECTED)
    if function is None:
        return plus_bias(y, bias).astype(dtype)
    if wide_type(dtype) == dtype:
        return function(y)

    def rounded(y, bias):
        return function(plus_bias(y, bias)).astype(dtype)

    # No barrier: it would keep the derivative from being fused with the product before it.
    return jax.checkpoint(rounded, prevent_cse=False)(y, bias)


def with_axes(init: Callable, axes: tuple[str | None, ...]) -> Callable[..., jax.Array]:
    """An initialiser whose parameter has these logical axes.

    It returns flax's box. `Module.param` takes the array out of it, hence the type.
    """
    boxed: Any = nn.with_logical_partitioning(init, axes)
    return boxed


class Projection(nn.Module):
    """y = x kernel + bias over the last `num_in` axes, with the kernel created at its true rank.

    `nn.DenseGeneral` initialises a flattened kernel, for which rank-3 axis names raise under a mesh
    (google/flax#3676). The axes of `shape` after the first `num_in` are the outputs and the bias.
    """

    config: Config
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_in: int = 1
    use_bias: bool = True
    zero_init: bool = False

    @nn.compact
    def parameters(self) -> tuple[Float[jax.Array, "..."], Float[jax.Array, "..."] | None]:
        """Kernel and bias, if there is one, in `config.dtype`."""
        config, outputs = self.config, self.shape[self.num_in :]
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        init = nn.initializers.normal(0.0 if self.zero_init else config.initializer_range)
        kernel = self.param("kernel", with_axes(init, self.axes), self.shape, param_dtype)
        kernel = jnp.asarray(kernel, dtype)
        if not self.use_bias:
            return kernel, None
        zeros = with_axes(nn.initializers.zeros, self.axes[self.num_in :])
        return kernel, jnp.asarray(self.param("bias", zeros, outputs, param_dtype), dtype)

    def __call__(
        self,
        x: Float[AnyArray, "b ..."],
        activation: str = "linear",
        columns: Callable | None = None,
    ) -> Float[jax.Array, "b ..."]:
        """activation(x kernel + bias), rounded to `config.dtype`.

        `columns` reorders the last axis of kernel and bias, and so of the result.
        """
        kernel, bias = self.parameters()
        if columns is not None:
            kernel, bias = columns(kernel), None if bias is None else columns(bias)
        y = self._product(x, kernel)
        function = None if activation == "linear" else ACTIVATIONS[activation]
        y = rounded_once(y, bias, kernel.dtype, function)
        # If nothing else needs the product, XLA for TPU recomputes it and the function for each
        # tile of the next product: a layer of V2's giant took 1.15 M estimated cycles forward for
        # the two (v5p, 32 clips), and takes 0.98 M so.
        again = function is not None and self.config.remat == "block" and platform() == "tpu"
        return _written(y) if again else y

    def unrounded(self, x: Float[AnyArray, "b ..."]) -> Float[jax.Array, "b ..."]:
        """x kernel + bias in float32 or wider, for additions before rounding."""
        kernel, bias = self.parameters()
        return plus_bias(self._product(x, kernel), bias)

    def _product(self, x, kernel):
        of_two = partial(product, num_in=self.num_in)
        x = jnp.asarray(x, kernel.dtype)
        return with_whole_kernels(of_two, x, [kernel], self.axes, self.num_in)[0]


def projections_in(params: Mapping[str, Any], dtype) -> dict[str, Any]:
    """The params with kernels, and the biases beside them, in the type they are used in.

    Models use all others (norms, scales, tokens, positions) in float32 or wider.
    """
    of_projection = "kernel" in params

    def cast(name, value):
        if isinstance(value, Mapping):
            return projections_in(value, dtype)
        return value.astype(dtype) if of_projection and name in ("kernel", "bias") else value

    return {name: cast(name, value) for name, value in params.items()}


def project_together(
    x: Float[AnyArray, "b *l d"], projections: Sequence[Projection]
) -> list[Float[jax.Array, "b *l n e"]]:
    """[p(x) for p in projections] of one shape [d, n, e], on GPU by one matrix product.

    There x is read once, not once for each. Elsewhere each has a product of its own: on CPU one
    product gains nothing, and putting the kernels side by side made a fine-tuning step 1.2 times as
    long (VideoMAE-B, batch 1, 2 cores). A TPU writes each result as attention's kernels read it;
    splitting one result and joining its gradient would cost more than reading x again: 49.4 M
    estimated cycles of a pre-training step against 46.8 M (VideoMAE-B, 8 clips, v5e).
    """
    kernels, biases = zip(*(p.parameters() for p in projections), strict=True)
    dtype, axes = kernels[0].dtype, projections[0].axes
    x = jnp.asarray(x, dtype)
    if platform() != "gpu":
        products = with_whole_kernels(product, x, kernels, axes)
        return [rounded_once(y, bias, dtype) for y, bias in zip(products, biases, strict=True)]
    kernel = jnp.stack(kernels, axis=1)
    (y,) = with_whole_kernels(product, x, [kernel], (axes[0], None, *axes[1:]))
    if y.dtype == wide_type(dtype):  # not rounded yet: add all biases before
        zeros = jnp.zeros(kernels[0].shape[1:], dtype)
        bias = jnp.stack([zeros if bias is None else bias for bias in biases])
        y, biases = plus_bias(y, bias).astype(dtype), [None] * len(biases)
    y = checkpoint_name(y, PROJECTED)
    return [plus_bias(y[..., i, :, :], bias).astype(dtype) for i, bias in enumerate(biases)]


class LayerNorm(nn.Module):
    """LayerNorm over the last axis in float32 or wider, rounded once to `config.dtype`.

    The variance is the mean of squared differences from the mean. `nn.LayerNorm` takes it from the
    mean of squares, which is inaccurate where |mean| >> std: at mean 100 the error is 4e-3, against
    1e-5 for two passes and for PyTorch. It also multiplies float32 by half precision parameters,
    which raises under jax_numpy_dtype_promotion="strict".
    """

    config: Config
    eps: float

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b ... d"]) -> Float[jax.Array, "b ... d"]:
        x = at_least_float32(x)

        def parameter(name, init):
            init = with_axes(init, ("embed",))
            value = self.param(name, init, x.shape[-1:], jnp.dtype(self.config.param_dtype))
            return jnp.expand_dims(value.astype(x.dtype), range(x.ndim - 1))

        scale = parameter("scale", nn.initializers.ones)
        bias = parameter("bias", nn.initializers.zeros)
        x = x - x.mean(-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
        return (x * (factor * scale) + bias).astype(self.config.dtype)

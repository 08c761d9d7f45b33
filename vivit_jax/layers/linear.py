# SPDX-License-Identifier: Apache-2.0
"""Projections and norms that carry logical axis names, our dtypes and our numerical choices."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from vivit_jax.config import VideoMAEConfig, VivitConfig

PROJECTED = "projection"  # the name of what a remat policy may keep

Config = VivitConfig | VideoMAEConfig


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


def platform() -> str:
    """Where what is traced now will run: "cpu", "gpu" or "tpu", after `jax_default_device`."""
    device = jax.config.jax_default_device
    place = jax.default_backend() if device is None else getattr(device, "platform", device)
    return {"cuda": "gpu", "rocm": "gpu"}.get(place, place)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widen half precision, in which softmax, norms and losses lose too much; keep float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rounded_once(function: Callable, x: jax.Array) -> jax.Array:
    """function(x) in float32 or wider, rounded to the type of x at the end.

    Rounded after every operation, GELU in bfloat16 has 17 times the error below -1.5. Of half
    precision the backward pass keeps x alone, and makes what the derivative needs in float32 again.
    """
    if at_least_float32(x).dtype == x.dtype:
        return function(x)
    rounded = lambda x: function(at_least_float32(x)).astype(x.dtype)  # noqa: E731
    # No barrier: it would keep the derivative from being fused with the product before it.
    return jax.checkpoint(rounded, prevent_cse=False)(x)


def activate(name: str, x: jax.Array) -> jax.Array:
    """The activation of that name of x, rounded once."""
    return rounded_once(ACTIVATIONS[name], x)


def project(x: jax.Array, kernel: jax.Array, num_in: int = 1, dtype=None) -> jax.Array:
    """Contract the last `num_in` axes of x with the first `num_in` of the kernel.

    The result has their type, or `dtype` if that is wider.

    On CPU it is a product of two matrices, whose gradients are such products too; over more axes
    XLA first copies what it multiplies, transposed (52 copies in a pre-training step, now 14).
    Elsewhere axes keep their places for the compiler to shard.

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
        jnp.matmul(
            x[:, start : start + step],
            kernel[start : start + step],
            preferred_element_type=dtype,
        )
        for start in starts
    ]
    return sum(parts[1:], parts[0]).reshape(*left, *right)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, num_in: int = 1) -> jax.Array:
    """`project` plus the bias if there is one, in float32 or wider: not yet rounded."""
    if at_least_float32(x).dtype != x.dtype:
        return _half_affine(x, kernel, bias, num_in)
    y = project(x, kernel, num_in)
    return y if bias is None else y + _broadcastable(bias, num_in, x)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _half_affine(x, kernel, bias, num_in):
    y = project(x, kernel, num_in, jnp.float32)
    return y if bias is None else y + _broadcastable(at_least_float32(bias), num_in, x)


@partial(_half_affine.defjvp, symbolic_zeros=True)
def _half_affine_jvp(num_in, primals, tangents):
    """Of its own because the transpose of a product that returns float32 multiplies float32.

    The gradient is rounded once, and those to x and kernel are products of half precision as the
    forward pass is; that to the bias is summed in float32.
    """
    (x, kernel, bias), (d_x, d_kernel, d_bias) = primals, tangents
    y, changes = _half_affine(*primals, num_in), []
    if not isinstance(d_x, SymbolicZero):
        changes.append(at_least_float32(project(d_x, kernel, num_in)))
    if not isinstance(d_kernel, SymbolicZero):
        changes.append(at_least_float32(project(x, d_kernel, num_in)))
    if bias is not None and not isinstance(d_bias, SymbolicZero):
        d_bias = _broadcastable(at_least_float32(d_bias), num_in, x)
        changes.append(jnp.broadcast_to(d_bias, y.shape))
    return y, sum(changes[1:], changes[0])


def _broadcastable(bias, num_in, x):
    return jnp.expand_dims(bias, range(x.ndim - num_in))


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

    def __call__(self, x, rounded: bool = True):
        """`rounded=False` leaves half precision in float32, for what is added before rounding."""
        kernel, bias = self.parameters()
        y = affine(x.astype(kernel.dtype), kernel, bias, self.num_in)
        return checkpoint_name(y.astype(kernel.dtype), PROJECTED) if rounded else y


def project_together(x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array]:
    """[p(x) for p in projections] of one shape [d, n, e], on accelerators by one matrix product.

    There x is read once instead of once for each. On CPU it is as many products: there the single
    one gains nothing, and putting the kernels side by side made a fine-tuning step 1.2 times as
    long (VideoMAE-B, batch 1, 2 cores).
    """
    if platform() == "cpu":
        return [projection(x) for projection in projections]
    kernels, biases = zip(*(p.parameters() for p in projections), strict=True)
    x, bias = x.astype(kernels[0].dtype), None
    if any(bias is not None for bias in biases):
        zeros = jnp.zeros(kernels[0].shape[1:], x.dtype)
        bias = jnp.stack([zeros if bias is None else bias for bias in biases])
    y = affine(x, jnp.stack(kernels, axis=1), bias).astype(x.dtype)
    y = checkpoint_name(y, PROJECTED)
    return [y[..., i, :, :] for i in range(len(projections))]


def layer_norm(config: Config, eps: float, name: str) -> Callable[[jax.Array], jax.Array]:
    """LayerNorm in float32 with a two-pass variance, rounded once to `config.dtype`.

    Flax's default one-pass variance loses accuracy where |mean| >> std: at mean 100 the error is
    4e-3 against 1e-5 for two passes and for PyTorch.
    """
    dtype = jnp.dtype(config.dtype)
    norm = nn.LayerNorm(
        eps,
        dtype=jnp.promote_types(dtype, jnp.float32),
        param_dtype=jnp.dtype(config.param_dtype),
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )
    return lambda x: norm(at_least_float32(x)).astype(dtype)

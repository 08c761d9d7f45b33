# SPDX-License-Identifier: Apache-2.0
"""Projections and norms that carry logical axis names, our dtypes and our numerical choices."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vivit_jax.config import VideoMAEConfig, VivitConfig

Config = VivitConfig | VideoMAEConfig


def exact_gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's cumulative function, by erf as PyTorch computes it.

    `jax.nn.gelu` takes erfc, which XLA on CPU computes in twice the time.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * np.asarray(0.5**0.5, x.dtype)))


# "gelu" is the exact erf form, "gelu_fast" and its siblings the tanh approximation; they differ by
# up to 4.7e-4 per unit and must never be mixed up.
ACTIVATIONS = {
    "gelu": exact_gelu,
    "gelu_python": exact_gelu,
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
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


def project(x: jax.Array, kernel: jax.Array, num_in: int = 1) -> jax.Array:
    """Contract the last `num_in` axes of x with the first `num_in` of the kernel.

    On CPU it is a product of two matrices, whose gradients are such products too; over more axes
    XLA first copies what it multiplies, transposed (52 copies in a pre-training step, now 14).
    Elsewhere axes keep their places for the compiler to shard.

    Under jax_default_matmul_precision="highest" a long float32 sum on CPU is taken in blocks of
    PRECISE_TERMS. XLA there adds all terms in one chain, whose error is 2 to 3 times that of
    PyTorch's blocks of 192; the blocks cost a third of the speed, so they are not the default.
    """
    if platform() != "cpu":
        return jnp.tensordot(x, kernel, num_in)
    left, right = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    terms = math.prod(kernel.shape[:num_in])
    x = x.reshape(math.prod(left), terms)
    kernel = kernel.reshape(terms, math.prod(right))
    precise = jax.config.jax_default_matmul_precision == "highest" and x.dtype == jnp.float32
    step = PRECISE_TERMS if precise else terms
    starts = range(0, terms, step)
    total = sum(x[:, start : start + step] @ kernel[start : start + step] for start in starts)
    return total.reshape(*left, *right)


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

    def __call__(self, x):
        kernel, bias = self.parameters()
        return _biased(project(x.astype(kernel.dtype), kernel, self.num_in), bias)


def project_together(x: jax.Array, projections: Sequence[Projection]) -> list[jax.Array]:
    """[p(x) for p in projections] of one shape [d, n, e], on accelerators by one matrix product.

    There x is read once instead of once for each. On CPU it is as many products: there the single
    one gains nothing, and putting the kernels side by side made a fine-tuning step 1.2 times as
    long (VideoMAE-B, batch 1, 2 cores).
    """
    if platform() == "cpu":
        return [projection(x) for projection in projections]
    kernels, biases = zip(*(p.parameters() for p in projections), strict=True)
    y = project(x.astype(kernels[0].dtype), jnp.stack(kernels, axis=1))
    outputs = (y[..., i, :, :] for i in range(len(projections)))
    return [_biased(y, bias) for y, bias in zip(outputs, biases, strict=True)]


def _biased(y, bias):
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))


def layer_norm(config: Config, eps: float, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics and a two-pass variance.

    Flax's default one-pass variance loses accuracy where |mean| >> std: at mean 100 the error is
    4e-3 against 1e-5 for two passes and for PyTorch.
    """
    return nn.LayerNorm(
        eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )

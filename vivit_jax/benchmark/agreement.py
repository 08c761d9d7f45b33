# SPDX-License-Identifier: Apache-2.0
"""Whether two sides compute the same function, on weights that make a difference visible."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vivit_jax.benchmark.work import Work
from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.layers.platform import platform

# What a side computes: the output, and Adam's first moments by tensor, None for a forward pass.
Computed = tuple[np.ndarray, dict[str, np.ndarray] | None]

# ||a - b|| / ||b|| that rounding explains if both sides compute in float32. VideoMAE-B and ViViT-B
# measured 2e-6 for logits and 7e-6 for the worst gradient. A fault (scores times 0.9) puts logits
# 6e-3, a loss 4e-5 to 2e-4 and the worst gradient 2e-1 apart (4 frames).
OUTPUT, GRADIENT = 1e-5, 1e-4
# In fewer bits rounding is as large as a fault might be. There the side farther from float32 may be
# this many times as far as the other: correct sides measured 1.1 for outputs, the fault 3 to 18.
FARTHER = 2.0
# In fewer bits a gradient may be this far from float32 whatever the other side's is. Measured: 2e-2
# on both sides for bfloat16, 2e-2 for PyTorch in float16, and 2e-1 with the fault.
ROUNDED_GRADIENT = 5e-2
# A tensor's gradient counts as no smaller than this share of the largest tensor's.
FLOOR = 1e-5
# The gradient of a key bias is 0 but for rounding (1e-8 of the largest gradient for ViViT-B), so it
# is measured against that of the query bias.
_ZERO, _BESIDE = "key.bias", "query.bias"


@dataclasses.dataclass(frozen=True)
class Distance:
    """||a - b|| / ||b|| of outputs, and the largest one of any tensor's gradient."""

    output: float
    gradient: float | None = None  # None for a forward pass
    tensor: str | None = None

    def __str__(self) -> str:
        found = f"{self.output:.0e}"
        return found if self.gradient is None else f"{found}, gradient {self.gradient:.0e}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a side is from the reference, and whether it computes the same function as ours.

    On a CPU in float32 the reference is this library. Where products are rounded to fewer bits, in
    half precision and by accelerators, it is this library in float32, and `own` is the distance of
    our side from it.
    """

    distance: Distance
    own: Distance | None
    holds: bool

    def __str__(self) -> str:
        return f"{self.distance}" if self.own is None else f"{self.distance} (ours {self.own})"


def agreement(work: Work, ours: Computed, theirs: Computed, exact: Computed | None) -> Agreement:
    """Compare two sides after their first step.

    `exact` is computed in float32 if the work `is_rounded`, else None. Raises UserError if the
    sides have gradients of different tensors.
    """
    if exact is None:
        apart = distance(work, theirs, ours)
        gradient = 0.0 if apart.gradient is None else apart.gradient
        return Agreement(apart, None, apart.output <= OUTPUT and gradient <= GRADIENT)
    own, apart = distance(work, ours, exact), distance(work, theirs, exact)
    outputs = _alike(own.output, apart.output, epsilon(work))
    gradients = True
    if own.gradient is not None and apart.gradient is not None:
        gradients = _alike(own.gradient, apart.gradient, ROUNDED_GRADIENT)
    return Agreement(apart, own, outputs and gradients)


def epsilon(work: Work) -> float:
    """The relative rounding error of factors in matrix products."""
    dtype = work.config.dtype
    if dtype == "float32":  # which accelerators multiply in fewer bits by default
        return {"gpu": 2.0**-10, "tpu": 2.0**-7}.get(platform(), float(jnp.finfo(dtype).eps))
    return float(jnp.finfo(dtype).eps)


def is_rounded(work: Work) -> bool:
    """Whether products are rounded to fewer bits than float32 has."""
    return epsilon(work) > float(jnp.finfo(jnp.float32).eps)


def _alike(one: float, other: float, rounding: float) -> bool:
    """Whether two distances are explained by rounding, or else near each other."""
    if np.isnan(one) or np.isnan(other):
        return False
    near, far = sorted([one, other])
    return bool(far <= rounding or (far <= FARTHER * near and far < 0.5))


def distance(work: Work, computed: Computed, truth: Computed) -> Distance:
    """How far a side is from the reference."""
    (output, moments), (true_output, true_moments) = computed, truth
    apart = _norm(output - true_output) / max(_norm(true_output), 1e-30)
    if true_moments is None:
        return Distance(apart)
    assert moments is not None, "a step has moments on every side"
    if moments.keys() != true_moments.keys():
        raise UserError(
            f"gradients of {work.name} differ in their names: "
            f"{sorted(moments.keys() ^ true_moments.keys())[:6]}"
        )
    norms = {name: _norm(moment) for name, moment in true_moments.items()}
    least = max(FLOOR * max(norms.values()), 1e-30)

    def size(name: str) -> float:
        beside = name.replace(_ZERO, _BESIDE) if name.endswith(_ZERO) else name
        return max(norms[name], norms.get(beside, 0.0), least)

    errors = {name: _norm(moments[name] - true_moments[name]) / size(name) for name in norms}
    # NaN is worse than any number.
    worst = max(errors, key=lambda name: np.inf if np.isnan(errors[name]) else errors[name])
    return Distance(apart, errors[worst], worst)


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def sensitive_params(params: Any, config: Config, seed: int = 0) -> Any:
    """Fresh params, changed so that a fault in any part of the model shows in its outputs.

    Fresh queries and keys are so small that all tokens get almost the same weight, and dropping
    attention altogether would look like rounding in half precision. So queries and keys are scaled
    by three, biases, positions and the class and mask tokens are not 0, and scales not 1. Kernels
    of narrow models are as large as those of width 768 with its std of 0.02.
    """
    rng = np.random.default_rng(seed)
    larger = 0.02 * 768**0.5 / (config.initializer_range * config.hidden_size**0.5)

    def change(path, x):
        x, (*_, parent, name) = np.asarray(x), ("", *(key.key for key in path))
        if name == "bias":
            return rng.normal(0, 0.1, x.shape).astype(x.dtype)
        if name.startswith("scale"):
            return x * rng.normal(1, 0.1, x.shape).astype(x.dtype)
        if name == "kernel":
            return x * np.asarray(larger * (3 if parent in ("query", "key") else 1), x.dtype)
        return x if x.any() else rng.normal(0, 0.1, x.shape).astype(x.dtype)  # positions, tokens

    return jax.tree.map_with_path(change, params)

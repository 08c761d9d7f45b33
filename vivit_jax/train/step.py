# SPDX-License-Identifier: Apache-2.0
"""One step of gradient descent."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from vivit_jax.layers.linear import platform

# XLA orders a CPU's work for concurrency by default, which keeps more buffers alive at a time:
# VideoMAE-B's pre-training step on 2 clips then has 773 MiB of temporaries in place of 519, and is
# no faster on 2 cores.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def jit_step(step: Callable) -> Callable:
    """`jax.jit` of a training step, for the platform that computes now.

    `step` takes the whole state first, which is donated: the new state takes its place in memory.
    """
    return jax.jit(step, donate_argnums=0, compiler_options=_COMPILER_OPTIONS.get(platform()))


def gradient_step(
    optimizer: optax.GradientTransformation,
    loss_of: Callable[[Any], tuple[jax.Array, Any]],
    params: Any,
    optimizer_state: Any,
) -> tuple[Any, Any, jax.Array, Any]:
    """(new params, new optimizer state, loss, what `loss_of` returns beside the loss).

    `loss_of` takes the params and returns (loss, anything). The caller is for `jit_step`.
    """
    (loss, aside), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss, aside

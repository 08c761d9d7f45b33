# SPDX-License-Identifier: Apache-2.0
"""One step of gradient descent."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def gradient_step(
    optimizer: optax.GradientTransformation,
    loss_of: Callable[[Any], tuple[jax.Array, Any]],
    params: Any,
    optimizer_state: Any,
) -> tuple[Any, Any, jax.Array, Any]:
    """(new params, new optimizer state, loss, what `loss_of` returns beside the loss).

    `loss_of` takes the params and returns (loss, anything). Jit the caller with the params and the
    optimizer's state donated, so that the new ones take their place in memory.
    """
    (loss, aside), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss, aside

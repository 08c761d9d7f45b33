# SPDX-License-Identifier: Apache-2.0
"""The state that a training step changes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from vivit_jax.models.build import abstract_params
from vivit_jax.train.sharding import like_params, param_shardings, replicated


@flax.struct.dataclass
class TrainState:
    """It holds no PRNG key: random numbers are functions of the seed and `step`."""

    step: jax.Array  # int32, batches seen
    params: Any
    optimizer: optax.OptState
    average: Any | None  # moving average of params
    bad_steps: jax.Array  # int32, the latest batches in a row that changed nothing
    skipped: jax.Array  # int32, all batches that changed nothing


def new_state(
    params: Any, optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """The state before the first step. It copies `params`, since steps donate their state."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        optimizer=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if averaged else None,
        bad_steps=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )


def state_shapes(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, *, averaged: bool = False
) -> TrainState:
    """The state as ShapeDtypeStructs, each leaf with its sharding on the mesh."""
    params, shardings = abstract_params(model), param_shardings(model, mesh)
    state = jax.eval_shape(lambda params: new_state(params, optimizer, averaged=averaged), params)
    placed = like_params(state, params, shardings, replicated(mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        placed,
    )

# SPDX-License-Identifier: Apache-2.0
"""All that a training step changes."""

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
    """Random numbers are functions of a seed and of `step`, so that there is no key in it."""

    step: jax.Array  # int32, batches seen
    params: Any
    optimizer: optax.OptState
    average: Any | None  # moving average of params
    bad_steps: jax.Array  # int32, batches in a row, up to now, that changed nothing
    skipped: jax.Array  # int32, such batches in all


def new_state(
    params: Any, optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """The state before the first step; shares no memory with `params`, which steps would donate."""
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=copy(params),
        optimizer=optimizer.init(params),
        average=copy(params) if averaged else None,
        bad_steps=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )


def state_shapes(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, *, averaged: bool = False
) -> TrainState:
    """The state as ShapeDtypeStructs with the sharding of each leaf on the mesh."""
    params, shardings = abstract_params(model), param_shardings(model, mesh)
    state = jax.eval_shape(lambda params: new_state(params, optimizer, averaged=averaged), params)
    placed = like_params(state, params, shardings, replicated(mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        placed,
    )

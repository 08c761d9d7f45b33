# SPDX-License-Identifier: Apache-2.0
"""From a recipe and a model to the training step; needs no clips and allocates nothing."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.models.build import abstract_params
from vivit_jax.models.flops import step_flops
from vivit_jax.models.registry import head_of, is_known
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.optim import learning_rate, make_optimizer
from vivit_jax.train.own import NOTHING, Own
from vivit_jax.train.sharding import batch_sharding
from vivit_jax.train.state import TrainState, state_shapes
from vivit_jax.train.step import OnMesh, draw_mask, make_step


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """The parts of a run that never change."""

    recipe: Recipe
    mesh: Mesh
    model: nn.Module
    processor: VideoProcessor
    validation: Dataset | None
    optimizer: optax.GradientTransformation
    shapes: TrainState  # with the sharding of each leaf
    step: OnMesh  # (state, batch, own.loss_arrays) -> (state, values)
    per_epoch: int
    own: Own = NOTHING

    @property
    def clips(self) -> int:
        """The clips of a step."""
        return self.recipe.train.batch_size * self.recipe.data.repeats

    @property
    def steps(self) -> int:
        """The steps of all epochs."""
        return self.recipe.train.epochs * self.per_epoch

    @property
    def last(self) -> int:
        """The last step of the run."""
        return min(self.steps, self.recipe.train.steps or self.steps)

    @property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch, with shardings."""
        config: Any = self.model.config
        place = batch_sharding(self.mesh)
        clips = (self.clips, config.num_frames, *config.frame_size, config.num_channels)
        shapes = {"clips": jax.ShapeDtypeStruct(clips, np.uint8, sharding=place)}
        if self.recipe.task == "finetune":
            heads = len(config.split_sizes)
            labels = (self.clips,) if heads == 1 else (self.clips, heads)
            shapes["labels"] = jax.ShapeDtypeStruct(labels, np.int32, sharding=place)
        return shapes

    @property
    def flops(self) -> float | None:
        """The matrix products of a step on each device, without what is computed twice.

        None for a model that is not of a family.
        """
        if not is_known(self.model):
            return None
        config: Any = self.model.config
        found = step_flops(config, head_of(self.model), *self.token_counts)
        return found * self.clips / self.mesh.size

    @property
    def token_counts(self) -> tuple[int | None, int | None]:
        """The tokens of a clip that the encoder sees and the decoder predicts; None for all."""
        if self.recipe.task != "pretrain":
            return None, None
        mask, grid = self.recipe.mask, self.model.config.grid

        def tokens():
            drawn = draw_mask(mask, jax.random.key(0), 1, grid)
            return drawn.visible, drawn.predicted

        visible, predicted = jax.eval_shape(tokens)
        return visible.shape[1], predicted.shape[1]


def make_setup(
    recipe: Recipe,
    mesh: Mesh,
    model: nn.Module,
    processor: VideoProcessor,
    per_epoch: int,
    validation: Dataset | None = None,
    own: Own = NOTHING,
) -> TrainSetup:
    """The setup of a run on a mesh, with `per_epoch` steps in an epoch.

    Raises UserError if the mesh does not divide the batch or the model, and for a schedule without
    steps.
    """
    schedule = learning_rate(
        recipe.optim,
        batch_size=recipe.train.batch_size,
        steps_per_epoch=per_epoch,
        epochs=recipe.train.epochs,
    )
    optimizer = make_optimizer(recipe.optim, abstract_params(model), schedule)
    shapes = state_shapes(model, optimizer, mesh, averaged=recipe.optim.ema is not None)
    step = make_step(model, optimizer, schedule, recipe, processor, mesh, shapes, own)
    return TrainSetup(
        recipe, mesh, model, processor, validation, optimizer, shapes, step, per_epoch, own
    )

# SPDX-License-Identifier: Apache-2.0
"""The validation of a run: its views, its score, and the early stop that a recipe asks for."""

import dataclasses

from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.recipes.recipe import EvalSettings, Recipe
from vivit_jax.train.callbacks import Callback, EarlyStop
from vivit_jax.train.evaluation import Evaluation, evaluate, evaluate_reconstruction
from vivit_jax.train.metrics import checkpoint_score
from vivit_jax.train.setup import TrainSetup
from vivit_jax.train.state import TrainState

_CREEP = 0.003  # of exp(-loss), which is no progress on held-out clips


def one_view(setup: TrainSetup) -> EvalSettings:
    """The views of a validation."""
    one = dataclasses.replace(setup.recipe.evaluation, clips=1, crops=1)
    if setup.model.config.class_splits is not None:
        one = dataclasses.replace(one, average="logits")
    return one


def early_stop(recipe: Recipe, validation: Dataset | None) -> list[Callback]:
    """The callback that `train.patience` asks for."""
    if recipe.train.patience is None or validation is None:
        return []
    # A loss that creeps is no better: see `checkpoint_score`.
    margin = 0.0 if recipe.task == "pretrain" else _CREEP / (1 + len(validation))
    return [EarlyStop(recipe.train.patience, margin=margin)]


def validate(setup: TrainSetup, state: TrainState) -> Evaluation:
    """Evaluate the model, or its moving average, on the held-out clips."""
    recipe, dataset = setup.recipe, setup.validation
    assert dataset is not None
    params = state.params if state.average is None else state.average
    what = (setup.model, params, dataset, one_view(setup))
    mesh, threads = setup.mesh, recipe.data.threads
    if recipe.task == "pretrain":
        return evaluate_reconstruction(
            *what, recipe.mask, setup.processor, mesh=mesh, threads=threads
        )
    return evaluate(*what, setup.processor, mesh=mesh, threads=threads)


def scored(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with the score by which checkpoints are compared."""
    return metrics | {"score": checkpoint_score(metrics)}

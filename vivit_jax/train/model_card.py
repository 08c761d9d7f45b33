# SPDX-License-Identifier: Apache-2.0
"""What the card of a run's model says: where it started, its data, its last validation."""

import math
from collections.abc import Mapping
from pathlib import Path

from checkpoints_convert.card import Base, CardFacts, DataSummary, Metric, binomial_error
from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.errors import counted
from vivit_jax.train.held_out import one_view
from vivit_jax.train.protocol import protocol_text
from vivit_jax.train.setup import TrainSetup


def run_facts(
    setup: TrainSetup,
    dataset: Dataset,
    base: Base | None,
    step: int,
    metrics: Mapping[str, float] | None = None,
) -> CardFacts:
    """The facts of the model after `step` steps; `metrics` are those of its validation, if any."""
    recipe = setup.recipe
    task = "Trained" if base is None else "Fine-tuned"
    if recipe.task == "pretrain":
        task = "Pre-trained by masking, without labels,"
    started = "from random weights" if base is None else f"from {base.name}"
    epochs = step / setup.per_epoch
    how = [
        f"{task} {started} with vivit_jax by the recipe {recipe.name}: {counted(step, 'step')} of "
        f"{counted(recipe.train.batch_size, 'clip')} ({epochs:.4g} "
        f"{'epoch' if epochs == 1 else 'epochs'}), {recipe.optim.algorithm}.",
    ]
    data = [_summary("training", dataset)]
    if setup.validation is not None:
        data.append(_summary("validation", setup.validation))
        how.append("The validation clips also chose among the run's checkpoints.")
    return CardFacts(
        base=base,
        how=how,
        data=data,
        metrics=_metrics(setup, metrics or {}),
    )


def _summary(split: str, dataset: Dataset) -> DataSummary:
    classes = None if dataset.classes is None else len(dataset.classes)
    return DataSummary(split=split, name=data_name(dataset), clips=len(dataset), classes=classes)


def data_name(dataset: Dataset) -> str:
    """What a data set is called where its path is nobody's business: its last part."""
    return Path(dataset.source).name or dataset.source


def _metrics(setup: TrainSetup, metrics: Mapping[str, float]) -> list[Metric]:
    if setup.validation is None:
        return []
    videos = int(metrics.get("videos", 0))
    protocol = protocol_text(setup.model.config, one_view(setup))
    return [
        Metric(
            name="validation loss" if name == "loss" else name,
            value=value,
            data=data_name(setup.validation),
            videos=videos,
            protocol=protocol,
            standard_error=binomial_error(value, videos) if "accuracy" in name else None,
        )
        for name, value in metrics.items()
        if (name == "loss" or "accuracy" in name) and math.isfinite(value)
    ]

# SPDX-License-Identifier: Apache-2.0
"""What the card of a probed model says: the frozen model, the clips, and how right the head is."""

from typing import Any

from checkpoints_convert.card import CardFacts, DataSummary, Metric, base_of
from checkpoints_convert.source import Source
from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.inference.probe_data import Sides
from vivit_jax.inference.probe_record import Probe, Score
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train.model_card import data_name
from vivit_jax.train.protocol import protocol_text


def probe_facts(
    result: Probe, source: Source, sides: Sides, config: Any, views: EvalSettings
) -> CardFacts:
    """The facts of the model that a probe of `source` wrote."""
    base, held = base_of(source.checkpoint), result.held_out
    how = (
        f"vivit_jax probed {base.name}: its weights are unchanged, and the head ({result.head}, "
        f"weight decay {result.weight_decay:g}) was trained on its features."
    )
    data = [_summary("training", sides.train, result.train.clips, result)]
    metrics = []
    if sides.held_out is not None and held is not None:
        data.append(_summary("held out", sides.held_out, held.clips, result))
        metrics.append(_metric(held, sides.held_out, protocol_text(config, views)))
    return CardFacts(base=base, how=[how], data=data, metrics=metrics)


def _summary(split: str, dataset: Dataset, clips: int, result: Probe) -> DataSummary:
    name, classes = data_name(dataset), len(result.classes)
    return DataSummary(split=split, name=name, clips=clips, classes=classes)


def _metric(score: Score, dataset: Dataset, protocol: str) -> Metric:
    return Metric(
        name="accuracy",
        value=score.accuracy,
        data=f"{data_name(dataset)} (held out)",
        videos=score.clips,
        protocol=protocol,
        standard_error=score.standard_error,
    )

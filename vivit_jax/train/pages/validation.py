# SPDX-License-Identifier: Apache-2.0
"""The file validation.json of a run: what the best model answered for each held-out clip."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from vivit_jax.data.datasets.dataset import Dataset, Example
from vivit_jax.errors import UserError
from vivit_jax.files.json_files import read_json
from vivit_jax.files.reading import absolute
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train.evaluation import Evaluation, outcomes_of
from vivit_jax.train.metrics import TOP_K
from vivit_jax.train.outcomes import Outcomes
from vivit_jax.train.pages.outcome_page import Shown
from vivit_jax.train.protocol import protocol_text, protocol_values


@dataclasses.dataclass(frozen=True)
class Validation:
    """The best validation of a run, of a classifier."""

    step: int
    score: float
    protocol: str
    heads: tuple[Outcomes, ...]
    shown: tuple[Shown, ...]  # of the clips


def summary(config, settings: EvalSettings, heads: list[Outcomes]) -> dict[str, Any]:
    """The main numbers and their protocol as JSON values, of each head if there are several."""
    values = {"protocol": protocol_values(config, settings)}
    if len(heads) == 1 and not heads[0].head:
        return heads[0].summary(TOP_K) | values
    return {"heads": {each.head: each.summary(TOP_K) for each in heads}} | values


def shown_clips(dataset: Dataset, evaluation: Evaluation) -> list[Shown]:
    """The frames that the model saw of each readable clip, in all of its views, in order."""
    pairs = zip(dataset.examples, evaluation.answers, strict=True)
    return [Shown(e, np.unique(a.indices)) for e, a in pairs if a.indices is not None]


def validation_record(
    config, settings: EvalSettings, dataset: Dataset, found: Evaluation
) -> dict[str, Any]:
    """The contents of validation.json besides its step and score."""
    heads, clips = outcomes_of(config, dataset, found), shown_clips(dataset, found)
    return {
        "summary": summary(config, settings, heads),
        "protocol": protocol_text(config, settings),
        "clips": [_clip(name, shown) for name, shown in zip(heads[0].clips, clips, strict=True)],
        "heads": [_head(each) for each in heads],
    }


def _clip(name: str, shown: Shown) -> dict[str, Any]:
    example = shown.example
    values = {"name": name, "path": absolute(example.path), "frames": shown.frames.tolist()}
    where = {name: getattr(example, name) for name in ("start", "total", "frame_name")}
    return values | {name: value for name, value in where.items() if value}


def _head(found: Outcomes) -> dict[str, Any]:
    sure = [round(value, 6) if math.isfinite(value) else None for value in found.confidences]
    return {
        "head": found.head,
        "classes": list(found.classes),
        "labels": found.labels.tolist(),
        "answers": found.answers.tolist(),
        "confidences": sure,
        "ranks": found.ranks.tolist(),
    }


def read_validation(path: Path) -> Validation:
    """The contents of a validation.json. UserError if it is not as it was written."""
    hint = "remove it"
    values: Any = read_json(path, hint=hint)
    try:
        clips = values["clips"]
        shown = tuple(_read_clip(each) for each in clips)
        names = tuple(str(each["name"]) for each in clips)
        heads = tuple(_read_head(each, names) for each in values["heads"])
        return Validation(
            int(values["step"]), float(values["score"]), str(values["protocol"]), heads, shown
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} has changed since it was written ({error}); {hint}") from None


def _read_clip(values: dict[str, Any]) -> Shown:
    start, total, name = (values.get(key) for key in ("start", "total", "frame_name"))
    whole = all(isinstance(each, int | None) for each in (start, total))
    if not (whole and isinstance(values["path"], str) and isinstance(name, str | None)):
        raise ValueError("a clip without its path and frames")
    example = Example(values["path"], None, start or 0, total, name)
    return Shown(example, np.array(values["frames"], np.int64))


def _read_head(values: dict[str, Any], clips: tuple[str, ...]) -> Outcomes:
    classes = tuple(str(name) for name in values["classes"])
    labels, answers, ranks = (
        np.array(values[name], np.int64).reshape(len(clips))
        for name in ("labels", "answers", "ranks")
    )
    sure = np.array(values["confidences"], np.float64).reshape(len(clips))
    low = min(labels.min(), answers.min() + 1)
    if not 0 <= low <= max(labels.max(), answers.max()) < len(classes):
        raise ValueError("a class that it does not name")
    return Outcomes(
        classes, clips, labels, answers, sure, ranks, answers[:, None], str(values["head"])
    )

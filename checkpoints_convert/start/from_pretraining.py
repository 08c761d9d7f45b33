# SPDX-License-Identifier: Apache-2.0
"""Starts fine-tuning from masked pre-training, as VideoMAE's authors do."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.layouts.videomae_authors import config_differences
from checkpoints_convert.pretrained import InitialisedModel, plan_load
from checkpoints_convert.source import Source, open_source
from checkpoints_convert.start.changes import Changes, sort_changes
from vivit_jax import param_tree
from vivit_jax.config import VideoMAEConfig
from vivit_jax.errors import ConfigError, UserError

logger = logging.getLogger(__name__)


def init_from_pretraining(
    source: str | Path | Source,
    config: Mapping[str, Any],
    *,
    init_scale: float = 0.001,
    revision: str | None = None,
    seed: int = 0,
) -> InitialisedModel:
    """Make a VideoMAE classifier from a pre-trained model: (model, params, report).

    The encoder's patch embedding and blocks are kept. Its final norm is dropped, and `fc_norm`, on
    the mean of all tokens, starts at scale 1 and bias 0. The classifier is drawn from `seed`,
    normal with `initializer_range`, and multiplied, with its bias, by `init_scale`. Decoder and
    mask token are dropped. The report lists all of it, and where the checkpoint's config differs
    from the authors' (epsilons, heads), which is kept; it is logged.

    `source` is a HuggingFace directory or hub id, an authors' .pth file, or an opened `Source`.
    `config` sets fields of the classifier: `num_labels` (or `id2label`, `class_splits`), and
    whatever fine-tuning changes, for example drop_path_rate, head_dropout, num_frames, image_size,
    dtype. Raises ConfigError for other fields or sizes, UserError for a checkpoint that is not a
    pre-trained VideoMAE.

    Source: VideoMAE and VideoMAE V2, fine-tuning. They draw the classifier from a normal
    distribution truncated at 100 standard deviations, which is the same.
    """
    labels, execution, settings = _checked(config)
    held = open_source(source, revision=revision, settings=settings)
    if held.family != VideoMAEConfig.model_type or held.head == "classification":
        raise UserError(
            f"{source} holds {held.architecture}, expected a pre-trained "
            "VideoMAE; load it with from_pretrained(source, num_labels=...)"
        )
    changes = {"use_mean_pooling": True}
    plan = plan_load(held, "classification", changes=changes, labels=labels, **execution)
    params = plan.read(plan.model.config.param_dtype, seed)
    for path in ("head/kernel", "head/bias"):
        params[path] = params[path] * init_scale
    notes = [
        f"the classifier is multiplied by {init_scale:g}",
        "the encoder's norm is left out: fc_norm, on the mean of all tokens, starts at 1 and 0",
        *plan.report.notes,
    ]
    differs = config_differences(plan.model.config, "classification")
    if differs:
        kept = ", ".join(f"{name}={getattr(plan.model.config, name)}" for name in differs)
        theirs = ", ".join(f"{name}={value}" for name, value in differs.items())
        notes.append(f"kept as the checkpoint has them: {kept}; the authors have {theirs} (config)")
    report = dataclasses.replace(plan.report, notes=tuple(notes))
    logger.warning("%s", report.brief)
    return InitialisedModel(plan.model, param_tree.unflatten(params), report)


def _checked(config: Mapping[str, Any]) -> Changes:
    """The changes to the config; ConfigError unless they make the authors' classifier."""
    if not isinstance(config, Mapping):
        raise ConfigError(
            'config must be a mapping of fields, such as {"num_labels": 400}, got '
            f"{type(config).__name__}"
        )
    changes = sort_changes(VideoMAEConfig, config)
    labels = changes.labels
    if labels.num_labels is None and labels.id2label is None and labels.class_splits is None:
        raise ConfigError(
            "config does not say which classes to fine-tune on; give num_labels, id2label or "
            "class_splits"
        )
    if changes.settings.pop("use_mean_pooling", True) is False:
        raise ConfigError(
            "use_mean_pooling=False keeps the encoder's norm and reads the first token, unlike the "
            "authors' classifier; load it with from_pretrained(source, 'classification')"
        )
    return changes

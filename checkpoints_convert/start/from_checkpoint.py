# SPDX-License-Identifier: Apache-2.0
"""Makes the model that training starts from of an opened checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.layouts.registry import layout_of
from checkpoints_convert.pretrained import InitialisedModel, plan_load
from checkpoints_convert.source import Source, open_source
from checkpoints_convert.start.changes import sort_changes
from checkpoints_convert.start.from_pretraining import init_from_pretraining
from checkpoints_convert.start.from_video import SIZES, init_from_video_model
from vivit_jax.config import VivitConfig


def open_start(checkpoint: Checkpoint, num_frames: int) -> Source:
    """Read an opened checkpoint, assuming square frames if its file leaves sizes open.

    Clips have `num_frames` unless the file says otherwise. The assumed sizes are the `settings` of
    the source.
    """
    layout = layout_of(checkpoint)
    sizes: dict[str, int] = {}
    if layout.square_sizes is not None and not checkpoint.has_config:
        tensors, _ = layout.parameters(checkpoint.path, checkpoint.tensors)
        sizes = layout.square_sizes(tensors, num_frames)
    return open_source(checkpoint, layout=layout.name, settings=sizes)


def hands_over(source: Source, head: str) -> bool:
    """Whether a model with this head starts from the encoder of a pre-trained model."""
    return head == "classification" and source.head == "pretraining"


def start_from(
    source: Source, changes: Mapping[str, Any], *, head: str, seed: int = 0
) -> InitialisedModel:
    """The model of an opened checkpoint with `changes` to its config, made to fit.

    A pre-trained VideoMAE becomes a classifier as `init_from_pretraining` makes it, a ViViT of
    other sizes is resized by `init_from_video_model`, and everything else is loaded as it is.
    """
    if hands_over(source, head):
        return init_from_pretraining(source, changes, seed=seed)
    if isinstance(source.config, VivitConfig) and _resized(source.config, changes):
        return init_from_video_model(source, changes, head=head, seed=seed)
    labels, execution, settings = sort_changes(type(source.config), changes)
    plan = plan_load(source, head, settings=settings, labels=labels, **execution)
    return plan.load(execution.get("param_dtype", "float32"), seed)


def _resized(held: VivitConfig, changes: Mapping[str, Any]) -> bool:
    """Whether the changes give a ViViT other positions or another depth in time."""
    wanted = dataclasses.replace(held, **{n: changes[n] for n in SIZES if n in changes})
    return (wanted.grid, wanted.temporal_layers) != (held.grid, held.temporal_layers)

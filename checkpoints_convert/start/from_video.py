# SPDX-License-Identifier: Apache-2.0
"""Starts a ViViT from a ViViT with other clip sizes or another temporal depth."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.pretrained import InitialisedModel, plan_load
from checkpoints_convert.source import Source
from checkpoints_convert.start.changes import sort_changes
from checkpoints_convert.start.from_image import complete_params, resize_table
from vivit_jax import param_tree
from vivit_jax.config import VivitConfig
from vivit_jax.errors import UserError
from vivit_jax.models.build import build_model

logger = logging.getLogger(__name__)

# Fields that may differ: they set the number of learned positions and of temporal blocks.
SIZES = ("image_size", "num_frames", "num_temporal_layers")
_TEMPORAL = re.compile(r"(?:backbone/)?temporal/layers_(\d+)/.+")


def init_from_video_model(
    source: str | Path | Source,
    config: Mapping[str, Any],
    *,
    source_config: Mapping[str, Any] | None = None,
    head: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> InitialisedModel:
    """Make a ViViT from one of another size: (model, params, report).

    `source` is a HuggingFace directory, a hub id, a scenic file or an opened `Source`. `config`
    changes fields of its configuration: the sizes (`image_size`, `num_frames`,
    `num_temporal_layers`), labels, rates, execution. `source_config` gives sizes of the source that
    a scenic file leaves open. `head` is as in `from_pretrained`.

    Positions are resized separably along time, height and width, linearly with aligned corners, as
    scenic does (scipy.ndimage.zoom of order 1); class tokens keep theirs. For a joint table scenic
    takes the square root of all tokens as the side of one frame, which is right only for images;
    here the table has its three axes.

    Block i of the temporal stage is block i of the source, as in scenic. Blocks beyond
    `num_temporal_layers` are left out, where scenic's public code fails; blocks that the source
    lacks are drawn from `seed`. The stage's last norm is the source's.

    The report lists what is left out, drawn and resized, and which blocks were kept; it is logged.
    Raises ConfigError for fields that do not exist, UserError for a source that is not a ViViT,
    CheckpointError for other sizes that do not fit.

    Source: scenic, projects/vivit/model_utils.py, initialise_from_train_state.
    """
    labels, execution, settings = sort_changes(VivitConfig, config)
    settings = {name: value for name, value in settings.items() if name not in SIZES}
    settings = {**(source_config or {}), **settings}
    plan = plan_load(
        source, head, settings=settings, labels=labels, revision=revision, **execution
    )  # fmt: skip
    old = plan.model.config
    if not isinstance(old, VivitConfig):
        raise UserError(f"{source} holds a {old.model_type}, expected a ViViT")
    new = dataclasses.replace(old, **{name: config[name] for name in SIZES if name in config})
    head = "none" if type(plan.model).__name__ == "VivitModel" else "classification"
    model = build_model(new, head, getattr(plan.model, "add_pooling_layer", False))
    flat = plan.read(new.param_dtype, seed)
    entries = {
        path: np.asarray(flat[slot.leaf] if slot.layer is None else flat[slot.leaf][slot.layer])
        for path, slot in param_tree.slots(param_tree.shapes_of(flat)).items()
    }
    entries, left_out = _resized(entries, old, new)
    params, fresh = complete_params(model, entries, seed, f"{source} resized,")
    dropped = [row.src for row in plan.rows if left_out.intersection(row.dst)]
    report = dataclasses.replace(
        plan.report,
        fresh=(*plan.report.fresh, *fresh),
        dropped=tuple(sorted((*plan.report.dropped, *dropped))),
        notes=(*_notes(old, new), *plan.report.notes),
    )
    logger.warning("%s", report.brief)
    return InitialisedModel(model, params, report)


def _resized(
    entries: Mapping[str, np.ndarray], old: VivitConfig, new: VivitConfig
) -> tuple[dict[str, np.ndarray], set[str]]:
    """The entries resized for a model of the config `new`, and the paths left out."""
    left_out = {
        path
        for path in entries
        if (block := _TEMPORAL.fullmatch(path)) and int(block[1]) >= new.temporal_layers
    }
    kept = {path: value for path, value in entries.items() if path not in left_out}
    first = int(old.pooling == "cls")
    staged = old.attention_type == "factorised_encoder"
    # The axes of the token grid that each table has.
    axes = {"spatial/": slice(1, 3), "temporal/": slice(0, 1)} if staged else {"": slice(0, 3)}
    for stage, which in axes.items():
        for path in (f"backbone/{stage}pos_embed", f"{stage}pos_embed"):
            if path in kept:
                table = kept[path][0]
                patches = resize_table(table[first:], old.grid[which], new.grid[which])
                kept[path] = np.concatenate([table[:first], patches])[None]
    return kept, left_out


def _notes(old: VivitConfig, new: VivitConfig) -> list[str]:
    """What was resized and which blocks were kept, in one line; empty if sizes are equal."""
    changed = [
        f"{name} {getattr(new, name)} (there {getattr(old, name)})"
        for name in SIZES
        if getattr(new, name) != getattr(old, name)
    ]
    done = []
    if old.grid != new.grid:
        there, here = ("x".join(map(str, config.grid)) for config in (old, new))
        done.append(f"positions of {there} tokens (t x h x w) resized to {here}, linearly")
    before, after = old.temporal_layers, new.temporal_layers
    if after < before:
        done.append(f"temporal layers 0 to {after - 1} of {before} taken")
    elif after > before:
        done.append(f"temporal layers 0 to {before - 1} taken, {before} to {after - 1} drawn")
    return [f"{', '.join(changed)}: {'; '.join(done)}"] if done else []

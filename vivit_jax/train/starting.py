# SPDX-License-Identifier: Apache-2.0
"""The model that a run trains, from its recipe, and back from a run's directory."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from vivit_jax.config import VideoMAEConfig, VivitConfig, config_from_dict
from vivit_jax.errors import UserError
from vivit_jax.files import read_json
from vivit_jax.pretrained import LoadReport, abstract_params, build_model, fresh_params
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.train.initial import papers_params
from vivit_jax.train.pixels import arithmetic

logger = logging.getLogger(__name__)
# Of a preset, what belongs to the data and not to the weights that training starts from.
_OF_THE_DATA = ("num_labels", "class_splits", "split_names")
# What fixes the names and shapes of weights, in each family.
_SIZES = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_channels", "patch_size",
    "tubelet_size", "num_temporal_layers", "decoder_hidden_size", "decoder_num_hidden_layers",
    "decoder_intermediate_size", "qkv_bias",
)  # fmt: skip
# What no trained network computes with: labels, first values, rates of training, and the pooler,
# which has no part in training. Dropout and execution are told by the config itself.
_NO_FUNCTION = (
    *_OF_THE_DATA, "id2label", "problem_type", "initializer_range", "zero_init_temporal_attention",
    "drop_path_rescale", "pooler_output_size", "pooler_act",
)  # fmt: skip
# What only masked pre-training computes with, besides the decoder.
_OF_PRETRAINING = ("norm_pix_loss", "image_mean", "image_std")
_NORMALISATION = (
    "do_rescale", "rescale_factor", "offset", "do_normalize", "image_mean", "image_std",
)  # fmt: skip


class Start(NamedTuple):
    """A model, its first parameters, and what was taken from where."""

    model: nn.Module
    params: dict[str, Any]
    report: str


def starting_model(recipe: Recipe, classes: tuple[str, ...] | None = None) -> Start:
    """The recipe's model with fresh parameters, or those of `model.start`.

    `start` may hold the same kind of model (whose configuration then counts, with the recipe's
    changes), for fine-tuning also a masked autoencoder, as its authors hand it over, or, for a
    ViViT, an image ViT. What it does not hold is drawn as `model.initial` says (`papers_params`).
    Sizes or heads of the recipe that are not those of `start` are refused; what else of its
    function or of its pixels the recipe changes is logged and stands in the report.
    `classes` names what the data are labelled with and so how many there are. Raises ConfigError
    and CheckpointError as the loaders do.
    """
    config, head = model_config(recipe), HEADS[recipe.task]
    if recipe.task == "pretrain" and not isinstance(config, VideoMAEConfig):
        raise UserError(
            f"model.preset {recipe.model.preset!r} is a ViViT, which has no masked pre-training; "
            "use a videomae preset"
        )
    if classes is not None and config.class_splits is None:
        config = dataclasses.replace(config, num_labels=len(classes), id2label=classes)
    if recipe.model.start is None:
        return _fresh(recipe, config, head)
    changes = dict(recipe.model.config)
    if recipe.task == "finetune":
        for name in (*_OF_THE_DATA, *(("id2label",) if classes is not None else ())):
            if getattr(config, name) is not None:
                changes[name] = getattr(config, name)
    return _loaded(recipe, config, head, changes)


def _fresh(recipe: Recipe, config, head: str) -> Start:
    model, seed = build_model(config, head), recipe.train.seed
    if recipe.model.initial == "huggingface":
        params, values = fresh_params(model, seed), f"normal({config.initializer_range:g})"
    else:
        params, values = papers_params(model, abstract_params(model), seed), "the paper's values"
    return Start(model, params, f"{type(model).__name__}, fresh, {values}, seed {seed}")


def _completed(
    recipe: Recipe, model: nn.Module, params: Any, report: LoadReport, notes: Sequence[str]
) -> Start:
    """The start from a file, whose loader drew what is not in it as HuggingFace does.

    `notes` are what the loader did not log.
    """
    for note in notes:
        logger.warning("model.start %s: %s", recipe.model.start, note)
    report = dataclasses.replace(report, notes=(*report.notes, *notes))
    if recipe.model.initial == "paper":
        params = papers_params(model, params, recipe.train.seed, report.fresh)
    return Start(model, params, str(report))


def _loaded(recipe: Recipe, config, head: str, changes: Mapping[str, Any]) -> Start:
    from checkpoints_convert.config_json import config_path
    from checkpoints_convert.io import open_checkpoint
    from checkpoints_convert.layouts import IMAGE
    from checkpoints_convert.source import layout_of, open_source
    from vivit_jax.handover import init_from_pretraining
    from vivit_jax.hub import resolve_checkpoint
    from vivit_jax.image_init import init_from_image_model
    from vivit_jax.pretrained import from_pretrained, load_report

    source, seed = recipe.model.start, recipe.train.seed
    place = resolve_checkpoint(source, None)  # once: a push to the hub must not mix commits
    image = layout_of(open_checkpoint(place)) == IMAGE
    if image:
        if not isinstance(config, VivitConfig) or head != "classification":
            raise UserError(
                f"model.start {source} holds an image model, from which only a ViViT classifier "
                f"starts; model.preset is {recipe.model.preset!r}"
            )
        model, params, report = init_from_image_model(place, config, seed=seed)
        return _completed(recipe, model, params, report, _pixel_notes(recipe, place, image))
    opened = open_source(place)
    held = opened.layout
    if held.family != config.model_type:
        raise UserError(
            f"model.start {source} holds a {held.family}, model.preset {recipe.model.preset!r} is "
            f"a {config.model_type}; use weights of that family"
        )
    handed_over = head == "classification" and held.head == "pretraining"
    notes = _pixel_notes(recipe, place, image)
    if config_path(place).is_file():  # else the recipe says what the file does not
        skipped = ("use_mean_pooling",) if handed_over else ()
        names = [name for name in of_the_function(config, head) if name in changes]
        differing = _differing(config, opened.config, [n for n in names if n not in skipped])
        notes = _config_notes(source, differing, _fixed(config, opened.config)) + notes
    if handed_over:
        model, params, report = init_from_pretraining(place, changes, seed=seed)
        return _completed(recipe, model, params, report, notes)
    labels = {name: changes.pop(name) for name in (*_OF_THE_DATA, "id2label") if name in changes}
    execution = {
        field.name: changes.pop(field.name)
        for field in dataclasses.fields(config)
        if field.metadata.get("execution") and field.name in changes
    }
    asked = dict(head=head, config=changes, **labels)
    report = load_report(place, **asked)
    model, params = from_pretrained(place, **asked, **execution, seed=seed)
    return _completed(recipe, model, params, report, notes)


def of_the_function(config, head: str) -> list[str]:
    """The fields of a config that change what a trained network computes, without its decoder."""
    left_out = {*_NO_FUNCTION, *config.probabilities}
    left_out |= {"fc_norm_eps"} if head == "pretraining" else set(_OF_PRETRAINING)
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in left_out
        and not field.metadata.get("execution")
        and not (head != "pretraining" and field.name.startswith("decoder_"))
    ]


def _differing(ours: Any, theirs: Any, names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two dataclasses differ, with both values."""
    values = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    return {name: both for name, both in values.items() if _plain(both[0]) != _plain(both[1])}


def _plain(value: Any) -> Any:
    """A size of equal sides or statistics of equal channels as the one number they may be too."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _fixed(ours: Any, theirs: Any) -> tuple[str, ...]:
    """The fields in which a model cannot differ from the weights that it starts from."""
    # A ViViT learns its positions, of which the clip's size is the number.
    learned = isinstance(ours, VivitConfig) and ours.grid != theirs.grid
    heads = ("num_attention_heads", "decoder_num_attention_heads")
    return (*_SIZES, *heads, *(("num_frames", "image_size") if learned else ()))


def _told(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {a!r} (there {b!r})" for name, (a, b) in differing.items())


def _config_notes(
    source: str, differing: Mapping[str, tuple[Any, Any]], fixed: Sequence[str]
) -> list[str]:
    """What to tell of fields that differ. UserError for those of `fixed`, before anything loads."""
    refused = {name: both for name, both in differing.items() if name in fixed}
    if refused:
        of_heads = all(name.endswith("heads") for name in refused)
        why = "other heads make another function of the same weights; " if of_heads else ""
        values = {name: json.dumps(b, separators=(",", ":")) for name, (_, b) in refused.items()}
        # As --set reads lists: without brackets.
        way_out = " ".join(f"model.config.{name}={v.strip('[]')}" for name, v in values.items())
        raise UserError(
            f"model.start {source} does not fit the recipe's model.config: {_told(refused)}; "
            f"{why}take the checkpoint's: --set {way_out}"
        )
    return [f"config differs from the checkpoint's: {_told(differing)}"] if differing else []


def _pixel_notes(recipe: Recipe, place: Path, image: bool) -> list[str]:
    """What to tell where the processor beside a checkpoint makes other pixels of the same bytes."""
    from vivit_jax.data.processor import VIDEOMAE, VideoProcessor, processor_file

    folder = place if place.is_dir() else place.parent
    decides = f"the recipe's processor={recipe.processor} decides"
    # ViTImageProcessor normalises as VideoMAE's does, with the same defaults.
    known_as = {"image_processor_type": VIDEOMAE} if image else {}
    try:
        if processor_file(folder) is None:
            return []
        theirs = VideoProcessor.from_pretrained(folder, **known_as)
    except UserError as error:
        return [f"pixels are not compared with the checkpoint's: {error}; {decides}"]
    ours = VideoProcessor.named(recipe.processor)
    pairs = zip(arithmetic(ours), arithmetic(theirs), strict=True)
    # Written with fewer digits, or in other steps, it is the same function.
    if all(_close(a, b) for a, b in pairs):
        return []
    told = _told(_differing(ours, theirs, _NORMALISATION))
    return [f"pixels differ from those of the checkpoint's processor: {told}; {decides}"]


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    broadcast = a.ndim == 0 or b.ndim == 0 or a.shape == b.shape
    return broadcast and np.allclose(a, b, rtol=1e-5, atol=1e-6)


def description(start: Start, task: str) -> dict[str, Any]:
    """What `described_model` needs to build the model again without its weights, as JSON values."""
    config = start.model.config
    fields = dataclasses.fields(config)
    execution = {f.name: getattr(config, f.name) for f in fields if f.metadata.get("execution")}
    values = {"head": HEADS[task], "config": config.to_dict(), "execution": execution}
    return values | {"start": start.report}


def described_model(path: Path) -> nn.Module:
    """The model whose `description` a file holds."""
    values = read_json(path)
    return build_model(config_from_dict(values["config"], **values["execution"]), values["head"])

# SPDX-License-Identifier: Apache-2.0
"""The model that a run trains: made from its recipe, or read from a run's directory."""

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn

from checkpoints_convert.card import Base, base_of
from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.layouts.registry import layout_of
from checkpoints_convert.pretrained import InitialisedModel
from checkpoints_convert.source import Source, find_checkpoint
from checkpoints_convert.start.from_checkpoint import hands_over, open_start, start_from
from checkpoints_convert.start.from_image import init_from_image_model
from checkpoints_convert.start.from_video import SIZES
from vivit_jax import param_tree
from vivit_jax.config import Config, VivitConfig, config_from_dict
from vivit_jax.config_base import READING
from vivit_jax.data.settings import MOST_CLASSES
from vivit_jax.errors import UserError, counted
from vivit_jax.files.json_files import read_json
from vivit_jax.models.build import abstract_params, build_model, fresh_params, initialise
from vivit_jax.recipes.checks import model_config, preset_named
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.train.start.initial_params import papers_params
from vivit_jax.train.start.preprocessing import (
    Preprocessing,
    described,
    differences_text,
    differing,
    preprocessing,
)

logger = logging.getLogger(__name__)
# Fields of a preset that belong to the data, not to the weights that training starts from.
_OF_THE_DATA = ("num_labels", "class_splits", "split_names")
# Fields that fix the names and shapes of weights, or what weights of the same shapes compute.
# `init_from_video_model` changes learned positions and the depth of ViViT's temporal stage.
_FIXED = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_channels", "patch_size",
    "tubelet_size", "decoder_hidden_size", "decoder_num_hidden_layers",
    "decoder_intermediate_size", "qkv_bias", "num_attention_heads", "head_dim",
    "decoder_num_attention_heads",
)  # fmt: skip
# Fields that do not change what a trained network computes: labels, initial values, rates of
# training, how clips are read, and the pooler, which is not trained. The config marks dropout and
# execution itself.
_NO_FUNCTION = (
    "drop_path_rate",
    *_OF_THE_DATA, "id2label", "problem_type", "initializer_range", "zero_init_temporal_attention",
    "drop_path_rescale", "pooler_output_size", "pooler_act", *READING,
)  # fmt: skip
# Fields that only masked pre-training uses, besides the decoder's.
_OF_PRETRAINING = ("norm_pix_loss", "image_mean", "image_std")


class Start(NamedTuple):
    """A model, its initial parameters, a report of their sources, and the preprocessing.

    `base` is the model that the parameters come from, for the card; None for fresh ones.
    """

    model: nn.Module
    params: dict[str, Any]
    report: str
    preprocessing: Preprocessing
    base: Base | None = None


def starting_model(
    recipe: Recipe, classes: tuple[str, ...] | None = None, labels: int | None = None
) -> Start:
    """The recipe's model with fresh parameters, or with those of `model.start`.

    `start` may hold the same kind of model; its configuration then applies, with the recipe's
    changes. Fine-tuning may also start from a masked autoencoder, or a ViViT from an image ViT. A
    ViViT for other clips or with another temporal depth is adapted by `init_from_video_model`.
    Parameters that `start` lacks are drawn as `model.initial` says (`papers_params`). A recipe
    whose sizes or heads differ from those of `start` is refused; other differences in the function
    or the pixels are logged and reported. Frames are prepared by the processor beside `start`, see
    `preprocessing`.

    `classes` are the names of the data's classes; `labels` is their number if they are numbers.
    `model.classes` "checkpoint" ignores both. Raises UserError if the recipe's `given` classes
    differ, ConfigError and CheckpointError as the loaders do.
    """
    config, head = _config(recipe), HEADS[recipe.task]
    kept = recipe.task == "finetune" and recipe.model.classes == "checkpoint"
    if kept and recipe.model.start is None:
        raise no_classes(recipe, "there is no model.start")
    if not kept and config.class_splits is None:
        config = labelled_config(recipe, config, classes, labels)
    if recipe.model.start is None:
        return _fresh(recipe, config, head)
    changes = dict(recipe.model.config)
    of_labels = (*_OF_THE_DATA, *(("id2label",) if classes is not None else ()))
    if kept:
        _of_the_checkpoint(recipe, changes)
    elif recipe.task == "finetune":
        for name in of_labels:
            if getattr(config, name) is not None:
                changes[name] = getattr(config, name)
    return _loaded(recipe, config, head, changes, by_number=labels is not None)


def planned_model(recipe: Recipe) -> tuple[nn.Module, Preprocessing]:
    """The recipe's model without a start, and its preprocessing; makes no parameters.

    A classifier has the recipe's number of classes. UserError for what cannot be trained.
    """
    config = _config(recipe)
    return build_model(config, HEADS[recipe.task]), preprocessing(recipe, config)


def _config(recipe: Recipe) -> Config:
    config = model_config(recipe)
    if recipe.task == "pretrain" and not config.has_pretraining:
        raise UserError(
            f"model.preset {recipe.model.preset!r} is a {config.title}, which has no masked "
            "pre-training; "
            "use a videomae preset"
        )
    return config


def no_classes(recipe: Recipe, why: str) -> UserError:
    """The error of a start without the classifier that `model.classes` keeps."""
    return UserError(
        f"model.classes is 'checkpoint', which keeps the classifier of model.start, but {why}; set "
        "model.classes=data, which makes one for the data's classes"
    )


def labelled_config(recipe: Recipe, config, classes: tuple[str, ...] | None, labels: int | None):
    """The config with the classes of the data's names or numbers; see `starting_model`."""
    data, given = recipe.data.train, recipe.given
    if "model.config.id2label" in given:
        return config  # names and numbers are then compared with these names
    number, set_by_hand = config.num_labels, "model.config.num_labels" in given
    if classes is not None:
        if set_by_hand and number != len(classes):
            shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise UserError(
                f"model.config.num_labels is {number}, but {data or 'the data set'} names "
                f"{counted(len(classes), 'class')} ({shown}): leave model.config.num_labels out, "
                "or change the folders, which may be empty, or the file of class names"
            )
        return dataclasses.replace(config, num_labels=len(classes), id2label=classes)
    if labels is None or set_by_hand or (config.id2label is not None and labels <= number):
        return config
    if labels > MOST_CLASSES:
        raise UserError(
            f"{data}: its labels go up to {labels - 1}, which would make as many classes; expected "
            f"numbers from 0, below {MOST_CLASSES}, or set model.config.num_labels={labels}"
        )
    return dataclasses.replace(config, num_labels=labels, id2label=None)


def _of_the_checkpoint(recipe: Recipe, changes: dict[str, Any]) -> None:
    """Drop the recipe's classes from `changes`. UserError if they are `given`."""
    for name in (*_OF_THE_DATA, "id2label"):
        value = changes.pop(name, None)
        if f"model.config.{name}" in recipe.given:
            raise UserError(
                f"model.config.{name} is {value!r}, but model.classes 'checkpoint' keeps the "
                f"classes of {recipe.model.start}: leave one of them out"
            )


def _fresh(recipe: Recipe, config, head: str) -> Start:
    model, seed = build_model(config, head), recipe.train.seed
    frames = preprocessing(recipe, config)
    for note in frames.notes:
        logger.warning("%s", note)
    if recipe.model.initial == "huggingface":
        params, values = fresh_params(model, seed), f"normal({config.initializer_range:g})"
    else:
        params, values = papers_params(model, abstract_params(model), seed), "the paper's values"
    report = f"{type(model).__name__}, fresh, {values}, seed {seed}"
    return Start(model, params, "\n  ".join((report, *frames.notes)), frames)


def _completed(
    recipe: Recipe, found: InitialisedModel, start: Checkpoint, held, notes: Sequence[str] = ()
) -> Start:
    """The start from a file; its loader drew the missing parameters as HuggingFace does.

    `held` is the config of the file's model, None for an image model. `notes` are those that the
    loader did not log.
    """
    model, params, report = found
    own_size = None if held is None else held.frame_size
    frames = preprocessing(recipe, model.config, start.path, own_size, image=held is None)
    notes = (*notes, *frames.notes)
    for note in notes:
        logger.warning("model.start %s: %s", recipe.model.start, note)
    report = dataclasses.replace(report, notes=(*report.notes, *notes))
    if recipe.model.initial == "paper":
        params = papers_params(model, params, recipe.train.seed, report.fresh)
    return Start(model, params, str(report), frames, base_of(start))


def _loaded(recipe: Recipe, config, head: str, changes: dict[str, Any], by_number: bool) -> Start:
    source, seed = recipe.model.start, recipe.train.seed
    assert source is not None
    kept = recipe.task == "finetune" and recipe.model.classes == "checkpoint"
    checkpoint = find_checkpoint(source)  # once: a push to the hub must not mix commits
    opened = _opened(recipe, checkpoint, config, head)
    if opened is None:
        if kept:
            raise no_classes(recipe, f"{source} holds an image model")
        found = init_from_image_model(checkpoint, config, seed=seed)
        return _completed(recipe, found, checkpoint, None)
    if kept and opened.head != "classification":
        raise no_classes(recipe, f"{source} holds no classifier")
    notes = _source_notes(recipe, opened, config, head, changes)
    fresh_head = False
    if opened.head == head == "classification" and not kept:
        fresh_head, of_classes = _other_classes(opened.config, config, changes, by_number)
        notes += of_classes
    found = start_from(opened, changes, head=head, seed=seed)
    if fresh_head:
        found = _fresh_head(found, seed)
    return _completed(recipe, found, checkpoint, opened.config, notes)


def _opened(recipe: Recipe, checkpoint: Checkpoint, config, head: str) -> Source | None:
    """The opened start; None for an image model. UserError if the recipe cannot start from it."""
    source = recipe.model.start
    if layout_of(checkpoint).image:
        if not isinstance(config, VivitConfig) or head != "classification":
            raise UserError(
                f"model.start {source} holds an image model, from which only a ViViT classifier "
                f"starts; model.preset is {recipe.model.preset!r}"
            )
        return None
    opened = open_start(checkpoint, config.num_frames)
    if opened.family != config.model_type:
        raise UserError(
            f"model.start {source} holds a {opened.family}, model.preset {recipe.model.preset!r} "
            f"is a {config.model_type}; use weights of that family"
        )
    return opened


def check_start(recipe: Recipe) -> None:
    """UserError if `model.start` cannot be opened or is of another kind; reads no weights."""
    if recipe.model.start is not None:
        config = _config(recipe)
        _opened(recipe, find_checkpoint(recipe.model.start), config, HEADS[recipe.task])


def _source_notes(
    recipe: Recipe, opened: Source, config, head: str, changes: Mapping[str, Any]
) -> list[str]:
    """The sizes assumed for a file without a config, or how its config differs."""
    if opened.config_json is None:
        assumed = opened.settings if isinstance(opened.settings, Mapping) else {}
        sizes = ", ".join(f"{name} {value}" for name, value in assumed.items())
        return [f"{sizes}: taken of square frames, since the file does not say"] if sizes else []
    handed_over = hands_over(opened, head)
    skipped = ("use_mean_pooling",) if handed_over else ()
    # The loader reports the sizes that it changes.
    sizes = SIZES if isinstance(config, VivitConfig) else ()
    names = [name for name in of_the_function(config, head) if name in changes]
    names = [name for name in names if name not in (*skipped, *sizes)]
    notes = _config_notes(recipe, differing(config, opened.config, names))
    notes += _reading_notes(recipe, opened.config)
    return notes + _preset_notes(recipe, opened.config, (*changes, *skipped))


def _reading_notes(recipe: Recipe, held) -> list[str]:
    """A note where frames are not as far apart as the checkpoint says that it was trained."""
    stride, theirs = recipe.data.stride, held.frame_stride
    if not held.has_own_stride or stride == theirs or recipe.data.sampler == "segments":
        return []
    return [
        f"frames of a clip are {stride} apart (data.stride), and were {theirs} apart where the "
        f"checkpoint was trained; --set data.stride={theirs} evaluation.stride={theirs} takes those"
    ]


def _other_classes(
    held, config, changes: dict[str, Any], by_number: bool
) -> tuple[bool, list[str]]:
    """Whether as many classes as the checkpoint's are different ones, so that the head is fresh.

    Also returns notes. Labels that are numbers drop the checkpoint's names, since nothing says that
    they mean the same classes.
    """
    unnamed = tuple(f"LABEL_{i}" for i in range(held.num_labels))
    number, way_out = changes.get("num_labels"), "--set model.classes=checkpoint keeps them"
    if by_number and number is not None and number < held.num_labels:
        return False, [
            f"the data's labels are numbers up to {number - 1}, so that the {held.num_labels} "
            f"classes of the checkpoint's classifier are left out; {way_out}"
        ]
    if number != held.num_labels or held.labels == unnamed:
        return False, []
    names = changes.get("id2label")
    if names is not None and config.labels != held.labels:
        return True, [f"the data's classes are not the checkpoint's, in their order; {way_out}"]
    if names is None and by_number:
        changes["id2label"] = unnamed
        return False, [
            "the data's labels are numbers: the checkpoint's names of as many classes are left "
            f"out, its classifier is kept; {way_out}"
        ]
    return False, []


def _fresh_head(found: InitialisedModel, seed: int) -> InitialisedModel:
    """The model with a fresh classifier."""
    flat = param_tree.flatten(found.params)
    leaves = [path for path in flat if path.startswith("head/")]
    flat |= initialise(found.model, set(leaves), seed)
    fresh = tuple(dict.fromkeys((*found.report.fresh, *leaves)))
    report = dataclasses.replace(found.report, fresh=fresh)
    return InitialisedModel(found.model, param_tree.unflatten(flat), report)


def of_the_function(config, head: str) -> list[str]:
    """The fields of a config that change what a trained network computes.

    Without those of the decoder, unless `head` is "pretraining".
    """
    left_out = {*_NO_FUNCTION, *config.probabilities}
    left_out |= {"fc_norm_eps"} if head == "pretraining" else set(_OF_PRETRAINING)
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in left_out
        and not field.metadata.get("execution")
        and not (head != "pretraining" and field.name.startswith("decoder_"))
    ]


def _config_notes(recipe: Recipe, fields: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Notes on fields that differ. UserError for those of _FIXED, before anything is loaded."""
    refused = {name: both for name, both in fields.items() if name in _FIXED}
    if refused:
        of_heads = all(name.endswith("heads") for name in refused)
        why = "other heads change what the weights compute; " if of_heads else ""
        values = {name: json.dumps(b, separators=(",", ":")) for name, (_, b) in refused.items()}
        # As --set reads lists: without brackets.
        way_out = " ".join(f"model.config.{name}={v.strip('[]')}" for name, v in values.items())
        raise UserError(
            f"model.start {recipe.model.start} does not fit the recipe's model.config: "
            f"{differences_text(refused)}; {why}take the checkpoint's: --set {way_out}"
        )
    return [f"config differs from the checkpoint's: {differences_text(fields)}"] if fields else []


def _preset_notes(recipe: Recipe, held, said: Collection[str]) -> list[str]:
    """Notes on where the checkpoint's model, which applies, differs from the preset.

    `said` are fields that are reported elsewhere.
    """
    preset = preset_named(recipe.model.preset).config
    names = [n for n in of_the_function(preset, HEADS[recipe.task]) if n not in said]
    fields = differing(held, preset, names)
    if not fields:
        return []
    return [
        f"the model is the checkpoint's, not that of model.preset {recipe.model.preset}: "
        f"{differences_text(fields)}"
    ]


def description(start: Start, task: str, own: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The input of `described_model`, which rebuilds the model without weights, as JSON values.

    `own` are the names of what the caller gave in place of the recipe's, for `check_same`.
    """
    config = start.model.config
    values = {"head": HEADS[task], "config": config.to_dict(), "execution": execution_of(config)}
    values |= {"start": start.report, "preprocessing": described(start.preprocessing)}
    values |= {} if start.base is None else {"base": dataclasses.asdict(start.base)}
    return values | ({"own": dict(own)} if own else {})


def execution_of(config: Any) -> dict[str, Any]:
    """The fields of a config that config.json does not have."""
    fields = dataclasses.fields(config)
    return {f.name: getattr(config, f.name) for f in fields if f.metadata.get("execution")}


def check_same(path: Path, own: Mapping[str, str]) -> None:
    """UserError if a resumed run gets other functions of the caller's than it had.

    `path` holds its `description`, `own` are the names of what is given now.
    """
    values = _described(path)
    held = values.get("own", {})
    for name in sorted({*held, *own}):
        before, now = (each.get(name, "the recipe's own") for each in (held, own))
        if before != now:
            raise UserError(
                f"{name} was {before} in the run so far and is now {now}; resume it from Python "
                f"with what it had: vivit_jax.train.train(..., {name.partition('.')[0]}=...)"
            )


def _described(path: Path) -> dict[str, Any]:
    """The values of a file that holds a `description`; {} where they are others."""
    hint = "restore it as it was written"
    if not path.exists():
        raise UserError(f"there is no {path}, which describes the model of the run; {hint}")
    values = read_json(path, hint=hint)
    return values if isinstance(values, dict) else {}


def described_model(path: Path) -> nn.Module:
    """The model whose `description` a file holds. UserError for a file that was changed."""
    hint, values = "restore it as it was written", _described(path)
    config, execution = values.get("config"), values.get("execution")
    if not isinstance(config, dict) or not isinstance(execution, dict):
        raise UserError(f"{path} does not describe a model: expected config and execution; {hint}")
    known = {f.name for f in dataclasses.fields(VivitConfig) if f.metadata.get("execution")}
    if not execution.keys() <= known:
        raise UserError(
            f"{path}: execution sets {', '.join(execution)}, expected {', '.join(known)}; {hint}"
        )
    try:
        return build_model(config_from_dict(config, warn=False, **execution), values["head"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error}; {hint}") from None


def described_base(path: Path) -> Base | None:
    """The base of a `description`, None where it has none. UserError for one that was changed."""
    held = _described(path).get("base")
    if held is None:
        return None
    try:
        base = Base(**held)
        texts = [base.name, *base.licence, *base.licence.values()]
        texts += [] if base.hub_id is None else [base.hub_id]
        assert all(isinstance(text, str) for text in texts)
    except (TypeError, AttributeError, AssertionError):
        raise UserError(
            f"{path}: base is {held!r}, expected name, hub_id and licence; restore it as it was "
            "written, or remove base from it"
        ) from None
    return base

# SPDX-License-Identifier: Apache-2.0
"""The model that a run trains, from its recipe, and back from a run's directory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn

from vivit_jax.config import VideoMAEConfig, VivitConfig, config_from_dict
from vivit_jax.errors import UserError
from vivit_jax.files import read_json
from vivit_jax.pretrained import LoadReport, abstract_params, build_model, fresh_params
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.train.initial import papers_params

# Of a preset, what belongs to the data and not to the weights that training starts from.
_OF_THE_DATA = ("num_labels", "class_splits", "split_names")


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


def _completed(recipe: Recipe, model: nn.Module, params: Any, report: LoadReport) -> Start:
    """The start from a file, whose loader drew what is not in it as HuggingFace does."""
    if recipe.model.initial == "paper":
        params = papers_params(model, params, recipe.train.seed, report.fresh)
    return Start(model, params, str(report))


def _loaded(recipe: Recipe, config, head: str, changes: Mapping[str, Any]) -> Start:
    from checkpoints_convert.io import open_checkpoint
    from checkpoints_convert.layouts import IMAGE
    from checkpoints_convert.source import layout_of, open_source
    from vivit_jax.handover import init_from_pretraining
    from vivit_jax.hub import resolve_checkpoint
    from vivit_jax.image_init import init_from_image_model
    from vivit_jax.pretrained import from_pretrained, load_report

    source, seed = recipe.model.start, recipe.train.seed
    if layout_of(open_checkpoint(resolve_checkpoint(source, None))) == IMAGE:
        if not isinstance(config, VivitConfig) or head != "classification":
            raise UserError(
                f"model.start {source} holds an image model, from which only a ViViT classifier "
                f"starts; model.preset is {recipe.model.preset!r}"
            )
        model, params, report = init_from_image_model(source, config, seed=seed)
        return _completed(recipe, model, params, report)
    held = open_source(source).layout
    if held.family != config.model_type:
        raise UserError(
            f"model.start {source} holds a {held.family}, model.preset {recipe.model.preset!r} is "
            f"a {config.model_type}; use weights of that family"
        )
    if head == "classification" and held.head == "pretraining":
        model, params, report = init_from_pretraining(source, changes, seed=seed)
        return _completed(recipe, model, params, report)
    labels = {name: changes.pop(name) for name in (*_OF_THE_DATA, "id2label") if name in changes}
    execution = {
        field.name: changes.pop(field.name)
        for field in dataclasses.fields(config)
        if field.metadata.get("execution") and field.name in changes
    }
    asked = dict(head=head, config=changes, **labels)
    report = load_report(source, **asked)
    model, params = from_pretrained(source, **asked, **execution, seed=seed)
    return _completed(recipe, model, params, report)


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

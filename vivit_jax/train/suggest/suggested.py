# SPDX-License-Identifier: Apache-2.0
"""A recipe to fine-tune a checkpoint on clips, made for them and for this machine."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vivit_jax.data.datasets.check import Progress
from vivit_jax.data.datasets.dataset import Dataset, own_validation
from vivit_jax.data.datasets.hold_out import hold_out
from vivit_jax.errors import UserError
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.refusals import Refusal, refuse, with_values
from vivit_jax.recipes.settings import fields_set
from vivit_jax.train.agreement import run_rules
from vivit_jax.train.evaluation import model_labels
from vivit_jax.train.prepare import class_numbers, listed, reading
from vivit_jax.train.sharding import make_mesh
from vivit_jax.train.start.initial_model import labelled_config, no_classes
from vivit_jax.train.suggest.facts import (
    DataFacts,
    Machine,
    StartFacts,
    data_facts,
    start_facts,
    this_machine,
)
from vivit_jax.train.suggest.memory import fit_memory
from vivit_jax.train.suggest.rules import Choice, choose, first_recipe

HELD_OUT = 0.2  # share of each class
_SIZES = ("num_frames", "image_size", "tubelet_size", "patch_size")
_ANY = "demo-finetune"  # for the data settings of a start that cannot be opened


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A recipe, why its settings are what they are, and what was looked at."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    start: StartFacts
    data: DataFacts
    machine: Machine
    clips: tuple[Dataset, Dataset | None]  # to train on, and held out


def suggested(
    data: str,
    start: str,
    mesh_sizes: Mapping[str, int],
    settings: Sequence[str] = (),
    progress: Progress | None = None,
) -> Suggestion:
    """Settings that suit clips, a checkpoint and this machine.

    `settings` are those of `apply_settings`, and are kept. Unless they name held-out clips, those
    of a list or directory with splits are taken, or a fifth of each class is held out. Up to 500
    clips are opened (`progress` follows), and a step may be compiled to see whether it fits the
    memory.

    Raises one UserError with all reasons against the data and the checkpoint.
    """
    found, others = None, []
    try:
        found = start_facts(start)
    except UserError as error:
        others.append(Refusal(str(error)))
    given = fields_set(settings)
    try:
        first = recipe_named(_ANY) if found is None else first_recipe(found)
        first = with_values(first, {"data.train": data})
        recipe = apply_settings(first, settings, agree=False)
        if found is not None and (sizes := _sizes_set(recipe, given)):
            config = dataclasses.replace(found.config, **sizes)
            found = dataclasses.replace(found, config=config)
            first = with_values(first_recipe(found), {"data.train": data})
            recipe = apply_settings(first, settings, agree=False)
        train, validation = listed(recipe)
        if not given & {"data.validation", "data.hold_out"}:
            recipe, train, validation = _held_out(recipe, train)
        clips = data_facts(train, validation, threads=recipe.data.threads, progress=progress)
    except UserError as error:
        others.append(Refusal(str(error)))
        refuse(recipe_named(_ANY), (), others)
        raise AssertionError("refuse raised") from error
    if found is None:
        refuse(recipe, (), others)
    assert found is not None  # else refuse raised
    others += _classes_differ(recipe, found, train, validation)
    machine = this_machine(mesh_sizes)
    chosen = choose(recipe, given, found, clips, machine)
    refuse(chosen.recipe, run_rules(mesh_sizes, (train, validation)), others)
    fit_memory(chosen, machine.memory, make_mesh(mesh_sizes))
    sides = train, validation
    return Suggestion(chosen.recipe, tuple(chosen.choices), found, clips, machine, sides)


def _classes_differ(
    recipe: Recipe, start: StartFacts, train: Dataset, validation: Dataset | None
) -> list[Refusal]:
    """Why a model cannot have the classes of the clips, or validation those of the model."""
    sides = [train] if validation is None else [train, validation]
    try:
        if recipe.model.classes == "checkpoint":
            if start.kind != "classification":
                raise no_classes(recipe, f"{start.name} holds no classifier")
            config = start.config
        else:
            numbers = class_numbers(train, validation)
            config = labelled_config(recipe, model_config(recipe), train.classes, numbers)
        for side in sides:
            if side.classes is None or config.id2label is not None:  # else it warns, once and later
                model_labels(side, config)
    except UserError as error:
        return [Refusal(str(error))]
    return []


def _sizes_set(recipe: Recipe, given: Collection[str]) -> dict[str, Any]:
    """The sizes of the model's clips that are set, which are not the checkpoint's then."""
    config = recipe.model.config
    return {name: config[name] for name in _SIZES if f"model.config.{name}" in given}


def _held_out(recipe: Recipe, train: Dataset) -> tuple[Recipe, Dataset, Dataset]:
    """A recipe with clips held out: the data's own, or a share of each class."""
    source = recipe.data.train
    own = own_validation(
        source, train, split=recipe.data.validation_split, **reading(recipe, source)
    )
    if own is not None:
        return with_values(recipe, {"data.validation": source}), train, own
    recipe = with_values(recipe, {"data.hold_out": HELD_OUT})
    return recipe, *hold_out(train, HELD_OUT, recipe.train.seed)

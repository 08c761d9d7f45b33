# SPDX-License-Identifier: Apache-2.0
"""A recipe to fine-tune a checkpoint on clips, made for them and for this machine."""

import dataclasses
from collections.abc import Mapping, Sequence

from vivit_jax.data.datasets.check import Progress
from vivit_jax.errors import UserError
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.refusals import Refusal, refuse, with_values
from vivit_jax.recipes.settings import fields_set
from vivit_jax.train.agreement import run_rules
from vivit_jax.train.prepare import listed
from vivit_jax.train.sharding import make_mesh
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
_ANY = "demo-finetune"  # for the data settings of a start that cannot be opened


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A recipe, why its settings are what they are, and what was looked at."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    start: StartFacts
    data: DataFacts
    machine: Machine


def suggested(
    data: str,
    start: str,
    mesh_sizes: Mapping[str, int],
    settings: Sequence[str] = (),
    progress: Progress | None = None,
) -> Suggestion:
    """Settings that suit clips, a checkpoint and this machine.

    `settings` are those of `apply_settings`, and are kept. Unless they name held-out clips, a fifth
    of each class is held out. Up to 500 clips are opened (`progress` follows), and a step may be
    compiled to see whether it fits the memory.

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
        if not given & {"data.validation", "data.hold_out"}:
            first = with_values(first, {"data.hold_out": HELD_OUT})
        recipe = apply_settings(first, settings, agree=False)
        train, validation = listed(recipe)
        clips = data_facts(train, validation, threads=recipe.data.threads, progress=progress)
    except UserError as error:
        others.append(Refusal(str(error)))
        refuse(recipe_named(_ANY), (), others)
        raise AssertionError("refuse raised") from error
    refuse(recipe, (), others)
    assert found is not None  # else refuse raised
    machine = this_machine(mesh_sizes)
    chosen = choose(recipe, given, found, clips, machine)
    refuse(chosen.recipe, run_rules(mesh_sizes, (train, validation)))
    fit_memory(chosen, machine.memory, make_mesh(mesh_sizes))
    return Suggestion(chosen.recipe, tuple(chosen.choices), found, clips, machine)

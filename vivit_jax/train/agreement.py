# SPDX-License-Identifier: Apache-2.0
"""What a recipe must agree on with its clips, its start and the devices, all reasons at once."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.data.pipeline import few_clips, unshared
from vivit_jax.errors import UserError
from vivit_jax.recipes.checks import AGREEMENTS
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.refusals import Refusal, Rule, refuse, rounded
from vivit_jax.train.batch_size import suited_batch
from vivit_jax.train.prepare import listed
from vivit_jax.train.sharding import batch_shards
from vivit_jax.train.start.initial_model import check_start
from vivit_jax.train.step import undivided


def checked_clips(
    recipe: Recipe,
    mesh_sizes: Mapping[str, int],
    dataset: Any = None,
    validation: Any = None,
    *,
    new: bool = True,
) -> tuple[Dataset, Dataset | None]:
    """The clips of `listed`, of a run that its recipe, its clips and the devices agree on.

    Otherwise raises UserError with every reason against it, and the settings that fit. Of a `new`
    run the start is opened too, though not read, if there is another reason.
    """
    data, others = None, []
    try:
        data = listed(recipe, dataset, validation)
    except UserError as error:
        others.append(Refusal(str(error)))
    rules = run_rules(mesh_sizes, data)
    if new and (others or any(True for rule in rules for _ in rule(recipe))):
        try:
            check_start(recipe)
        except UserError as error:
            others.append(Refusal(str(error)))
    refuse(recipe, rules, others)
    assert data is not None  # else refuse raised
    return data


def run_rules(
    mesh_sizes: Mapping[str, int], data: tuple[Dataset, Dataset | None] | None
) -> list[Rule]:
    """The rules of a run for a mesh, and for the clips of `listed` if they are known."""
    rules: list[Rule] = [*AGREEMENTS, functools.partial(_divides, sizes=mesh_sizes)]
    if data is not None:
        rules.insert(0, functools.partial(_suits, dataset=data[0], sizes=mesh_sizes))
        rules += [_without_validation] if data[1] is None else []
    return rules


def _unit(recipe: Recipe, sizes: Mapping[str, int], parts: int) -> int:
    """Batches are multiples of it, with so many parts."""
    clips = batch_shards(sizes) * parts
    of_videos = clips // math.gcd(clips, recipe.data.repeats)
    return math.lcm(of_videos, parts, jax.process_count())


def _suits(recipe: Recipe, dataset: Dataset, sizes: Mapping[str, int]) -> Iterator[Refusal]:
    """The clips of a batch are all different."""
    batch, clips = recipe.train.batch_size, len(dataset)
    if batch <= clips:
        return
    text = few_clips(dataset, batch)
    parts = recipe.train.accumulate
    found = suited_batch(clips, _unit(recipe, sizes, parts))
    settings = {}
    if not found and parts > 1:
        found, settings = suited_batch(clips, _unit(recipe, sizes, 1)), {"train.accumulate": 1}
    if not found:
        yield Refusal(text)
        return
    settings["train.batch_size"] = found
    optim = recipe.optim
    if optim.lr_batch is not None and found < batch:
        # In proportion to the batch, as recipes scale it, a few clips would hardly move it.
        peak = optim.lr * batch / optim.lr_batch
        settings |= {"optim.lr": rounded(peak * math.sqrt(found / batch)), "optim.lr_batch": None}
        floor = optim.min_lr * found / optim.lr_batch
        settings |= {"optim.min_lr": rounded(floor)} if floor else {}
    yield Refusal(text, settings)


def _divides(recipe: Recipe, sizes: Mapping[str, int]) -> Iterator[Refusal]:
    """The devices, and the processes, divide the batch."""
    train, processes = recipe.train, jax.process_count()
    if train.batch_size % train.accumulate:
        return  # has a reason of its own
    yield from undivided(recipe, sizes)
    if train.batch_size % processes:
        unit = _unit(recipe, sizes, train.accumulate)
        settings = {"train.batch_size": max(train.batch_size // unit, 1) * unit}
        yield Refusal(unshared(train.batch_size, processes), settings)


def _without_validation(recipe: Recipe) -> Iterator[Refusal]:
    if recipe.train.patience is not None and recipe.data.hold_out is None:
        text = (
            f"train.patience {recipe.train.patience} ends a run by its scores on held-out clips, "
            "of which there are none: set data.validation or data.hold_out"
        )
        yield Refusal(text, {"data.hold_out": 0.2})

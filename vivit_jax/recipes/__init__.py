# SPDX-License-Identifier: Apache-2.0
"""Training recipes, published ones and the demo's: plain functions that return a `Recipe`.

`recipe_named("videomae-v1-base-kinetics400-finetune")`, then change what differs with
`apply_settings(recipe, ["data.train=list.txt", "train.batch_size=64", "augment.mix_group=8"])`.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from vivit_jax.errors import UserError, closest
from vivit_jax.recipes import demo, videomae_v1, videomae_v2, vivit
from vivit_jax.recipes.checks import check, model_config
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.settings import apply_settings, from_dict, to_dict

__all__ = [
    "RECIPES", "apply_settings", "check", "from_dict", "model_config", "recipe_named", "summary",
    "to_dict",
]  # fmt: skip

RECIPES: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        function.__name__.replace("_", "-"): function
        for module in (vivit, videomae_v1, videomae_v2, demo)
        for function in module.RECIPES
    }
)


def recipe_named(name: str) -> Recipe:
    """The published recipe of this name. Raises UserError with the closest names for another."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}{closest(name, RECIPES, short=True)}")
    return RECIPES[name]()


def summary(name: str) -> str:
    """The recipe of this name in one line. Raises KeyError for a name that is not in RECIPES."""
    return (inspect.getdoc(RECIPES[name]) or "").partition("\n")[0]

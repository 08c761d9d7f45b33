# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax recipes`: the published training recipes."""

import inspect
import json as json_module
from typing import Annotated

import tyro

from vivit_jax.progress import format_table
from vivit_jax.recipes import RECIPES, recipe_named, summary, to_dict


def recipes(
    name: Annotated[str | None, tyro.conf.Positional] = None, /, *, json: bool = False
) -> None:
    """List the published recipes, or one with its source and fields.

    Args:
        name: The recipe to show.
        json: Print the fields as JSON, as a run's recipe.json holds them.
    """
    if name is None:
        rows = [(known, summary(known)) for known in RECIPES]
        print("\n".join(format_table(rows, align="left")))
        return
    values = to_dict(recipe_named(name))
    if json:
        print(json_module.dumps(values, indent=2))
        return
    print(f"{inspect.getdoc(RECIPES[name])}\n")
    for section, fields in values.items():
        if not isinstance(fields, dict):
            print(f"{section} = {fields}")
            continue
        for field, value in fields.items():
            print(f"{section}.{field} = {json_module.dumps(value)}")

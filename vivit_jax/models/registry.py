# SPDX-License-Identifier: Apache-2.0
"""The model families that are known, and the one of a config or a model."""

from flax import linen as nn

from vivit_jax.config import Config, register_config
from vivit_jax.errors import UserError
from vivit_jax.models import videomae, vivit
from vivit_jax.models.family import Family

FAMILIES: list[Family] = [vivit.FAMILY, videomae.FAMILY]


def register_family(family: Family) -> None:
    """Add a family to those that every function and command knows.

    `checkpoints_convert.layouts.registry.register_table` adds its weight tables.
    Raises UserError for names that are taken, and if the models are not those that the config names
    for its heads.
    """
    named = {head: cls.__name__ for head, cls in family.models.items()}
    if named != dict(family.config.heads):
        raise UserError(
            f"{family.config.__name__} names the models {dict(family.config.heads)}, the record "
            f"has {named}; make them equal"
        )
    register_config(family.config)
    FAMILIES.append(family)


def family_of(config: Config) -> Family:
    """The family of a config. Raises UserError for one that is not registered."""
    known = {family.config: family for family in FAMILIES}
    for cls in type(config).__mro__:  # the nearest: a family's config may extend another's
        if cls in known:
            return known[cls]
    raise UserError(
        f"{type(config).__name__} is the config of no family; add it with register_family"
    )


def is_known(model: nn.Module) -> bool:
    """Whether a model is of a registered family."""
    return any(type(model) is cls for family in FAMILIES for cls in family.models.values())


def head_of(model: nn.Module) -> str:
    """The head of a model: "none", "classification" or "pretraining"."""
    for family in FAMILIES:
        for head, cls in family.models.items():
            if type(model) is cls:
                return head
    known = [cls.__name__ for family in FAMILIES for cls in family.models.values()]
    raise UserError(f"{type(model).__name__} is not a model; expected one of {known}")

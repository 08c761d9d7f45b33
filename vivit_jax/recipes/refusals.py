# SPDX-License-Identifier: Apache-2.0
"""Why recipes cannot run, all reasons at once, each with settings that mend it."""

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vivit_jax.errors import UserError
from vivit_jax.recipes.recipe import Recipe

_ROUNDS = 8  # of mending: each may reveal what the one before hid


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A reason against a recipe, and the settings that mend it; none if no setting does."""

    text: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Rule = Callable[[Recipe], Iterable[Refusal]]


def refuse(recipe: Recipe, rules: Iterable[Rule], others: Iterable[Refusal] = ()) -> None:
    """Raises UserError with every reason against a recipe, and the settings that fit.

    `others` are reasons that no setting mends. Settings that mend one reason may reveal another,
    such as a smaller batch that mixing cannot divide: those are mended and listed too.
    """
    rules, others = tuple(rules), tuple(others)
    found: dict[str, None] = {}
    mended, settings = recipe, dict[str, Any]()
    for _ in range(_ROUNDS):
        now = [refusal for rule in rules for refusal in rule(mended)]
        found |= dict.fromkeys(refusal.text for refusal in now)
        fits = not now
        new = {name: value for each in reversed(now) for name, value in each.settings.items()}
        if fits or not new:
            break
        settings |= new
        mended = with_values(mended, new)
    else:
        fits = False
    texts = [*(refusal.text for refusal in others), *found]
    if not texts:
        return
    fitting = f"--set {set_text(settings)}" if fits and settings else ""
    if len(texts) == 1:
        raise UserError(f"{texts[0]}; what fits: {fitting}" if fitting else texts[0])
    lines = [f"{len(texts)} reasons against this run:", *(f"  - {text}" for text in texts)]
    lines += [f"  what fits: {fitting}"] if fitting else []
    raise UserError("\n".join(lines))


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with fields such as "train.batch_size" changed, unchecked."""
    for path, value in values.items():
        section, _, name = path.partition(".")
        part = getattr(recipe, section)
        if not name:
            part = value
        elif section == "model" and name.startswith("config."):
            config = {**part.config, name.removeprefix("config."): value}
            part = dataclasses.replace(part, config=config)
        else:
            part = dataclasses.replace(part, **{name: value})
        recipe = dataclasses.replace(recipe, **{section: part})
    return recipe


def value_of(recipe: Recipe, path: str) -> Any:
    """The value of a field such as "train.batch_size"."""
    section, _, name = path.partition(".")
    if name.startswith("config."):
        return recipe.model.config.get(name.removeprefix("config."))
    return getattr(getattr(recipe, section), name) if name else getattr(recipe, section)


def set_text(values: Mapping[str, Any]) -> str:
    """Values as `--set` reads them, in one shell line."""
    return " ".join(f"{name}={shlex.quote(value_text(v))}" for name, v in values.items())


def value_text(value: Any) -> str:
    """A value as `--set` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:.6g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, tuple):
        numbers = value and not any(isinstance(entry, str | tuple) for entry in value)
        return ",".join(map(value_text, value)) if numbers else _entry_text(value)
    return str(value)


def _entry_text(value: Any) -> str:
    """An entry of a list, in whose texts a backslash is a backslash."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_entry_text, value))}]"
    if isinstance(value, str):
        return f'"{value}"' if "'" in value else f"'{value}'"
    return value_text(value)


def rounded(value: float) -> float:
    """A number with two digits, for settings that people read."""
    return float(f"{value:.2g}")

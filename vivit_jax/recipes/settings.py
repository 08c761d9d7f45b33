# SPDX-License-Identifier: Apache-2.0
"""Recipes as text: `--set section.field=value`, and JSON in both directions."""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vivit_jax.config import FAMILIES
from vivit_jax.errors import UserError, closest, similar
from vivit_jax.recipes.checks import check, check_values, config_fields, wrong
from vivit_jax.recipes.recipe import Given, Recipe
from vivit_jax.typed import TypeMismatch, expected, from_json, from_text

_FIELDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Recipe)}
_DECIDED = typing.get_args(Given)
_SECTIONS = {
    name: {field.name: field.type for field in dataclasses.fields(kind)}
    for name, kind in _FIELDS.items()
    if dataclasses.is_dataclass(kind)
}
# Defaults of fields that the files of older runs lack.
_LATER = {
    "given": (), "model.classes": "data", "data.hold_out": None, "train.patience": None,
}  # fmt: skip


def apply_settings(recipe: Recipe, assignments: Sequence[str], *, agree: bool = True) -> Recipe:
    """The recipe with fields set as typed: "optim.lr=1e-4", "model.config.drop_path_rate=0.2".

    Values are read by the type of their field, see `typed.from_text`; the fields of the model's
    configuration are those of the preset, including one that is set here. All settings are applied
    before the result is checked, so fields that must agree can be set together. Fields that a
    checkpoint or the data would decide are added to `given`. Without `agree` each field is checked
    by itself, and the caller sees to it that they agree.

    Raises UserError for text that is not an assignment, an unknown field, a field set twice, a
    value of another type, and as `check` does.
    """
    texts: dict[str, str] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = path.strip()
        if not equals or not path:
            raise UserError(f"{assignment!r} is not a setting, expected section.field=value")
        if path in texts:
            raise UserError(f"{path} is set twice, to {texts[path]!r} and to {text!r}")
        texts[path] = text
    preset = from_text(str, texts.get("model.preset", recipe.model.preset))
    changes: dict[str, Any] = {}
    for path, text in texts.items():
        wanted = _type_of(path, preset)
        try:
            value = from_text(wanted, text)
        except TypeMismatch:
            raise wrong(path, text, expected(wanted)) from None
        *parents, name = path.split(".")
        place = changes
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    given = (*changes.get("given", recipe.given), *(p for p in texts if p in _DECIDED))
    changes["given"] = tuple(dict.fromkeys(given))
    changed = _replaced(recipe, changes)
    if agree:
        return check(changed)
    check_values(changed)
    return changed


def fields_set(assignments: Sequence[str]) -> set[str]:
    """The full names of the fields that assignments set."""
    return {assignment.partition("=")[0].strip() for assignment in assignments}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All fields of a recipe except `given`, as plain JSON values; `from_dict` reads them back."""
    values = _plain(recipe)
    del values["given"]
    return values


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The checked recipe that `to_dict` wrote, with `given` if it is there.

    Raises UserError with the full name of a field that is unknown, missing or of another type, and
    as `check` does.
    """
    values = _check_keys("", values, _FIELDS)
    read = {
        name: _section(name, values[name]) if name in _SECTIONS else _read(name, kind, values[name])
        for name, kind in _FIELDS.items()
    }
    return check(Recipe(**read))


def _section(name: str, values: Any) -> Any:
    known = dict(_SECTIONS[name])
    values = _check_keys(f"{name}.", values, known)
    read = {}
    if name == "model":
        del known["config"]
        config = values["config"]
        fields = config_fields(_read("model.preset", str, values["preset"]))
        _check_keys("model.config.", config, fields, all_of_them=False)
        read["config"] = {k: _read(f"model.config.{k}", fields[k], v) for k, v in config.items()}
    read |= {key: _read(f"{name}.{key}", kind, values[key]) for key, kind in known.items()}
    return _FIELDS[name](**read)


def _type_of(path: str, preset: str) -> Any:
    """The type of a field, by its full name. Raises UserError if there is no such field."""
    section, _, name = path.partition(".")
    if section not in _SECTIONS:
        if path in _FIELDS:
            return _FIELDS[path]
        raise UserError(f"there is no field {path!r}{_meant(path)}")
    if section == "model" and name.partition(".")[0] == "config":
        key, known = name.partition(".")[2], config_fields(preset)
        if not key:
            raise UserError(
                "model.config is set field by field, as in model.config.drop_path_rate=0.2"
                f"{closest('', known)}"
            )
        if key not in known:
            raise UserError(f"model.config of {preset} has no field {key!r}{closest(key, known)}")
        return known[key]
    known = _SECTIONS[section]
    if not name:
        raise UserError(f"{section} is a section{closest('', known)}")
    if name not in known:
        raise UserError(f"{section} has no field {name!r}{closest(name, known)}")
    return known[name]


def _meant(path: str) -> str:
    """The end of a message about a name that is neither a section nor a field of one."""
    name = path.rpartition(".")[2]
    full = [f"{section}.{name}" for section, known in _SECTIONS.items() if name in known]
    if full:
        return f"; did you mean {' or '.join(full)}?"
    return closest(path.partition(".")[0], _FIELDS)


def fields_like(name: str) -> list[str]:
    """The full names of at most three fields that a single word may mean, such as max_epochs.

    Those of this name, else those whose name are its initials (lr for learning_rate), else those
    of which it has all words, or that have all of its words, else those that are alike.
    """
    full = [f"{section}.{field}" for section, known in _SECTIONS.items() for field in known]
    of_models = {field.name for each in FAMILIES for field in dataclasses.fields(each)}
    full += [f"model.config.{field}" for field in sorted(of_models)]
    last = {path: path.rpartition(".")[2] for path in full}
    words, alike = set(name.split("_")), similar(name, last.values())
    initials = "".join(word[:1] for word in name.split("_"))
    meant: tuple[Callable[[str], bool], ...] = (
        lambda field: field == name,
        lambda field: len(words) > 1 and field == initials,
        lambda field: set(field.split("_")) <= words,
        lambda field: words <= set(field.split("_")),
        lambda field: field in alike,
    )
    found = ([path for path, field in last.items() if fits(field)] for fits in meant)
    return next((paths for paths in found if paths), [])[:3]


def _replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {**value, **changes}
    replaced = {
        name: _replaced(getattr(value, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(value, **replaced)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _check_keys(
    prefix: str, values: Any, known: Mapping[str, Any], all_of_them: bool = True
) -> Mapping[str, Any]:
    """The values, completed by those of `_LATER` that an older file lacks."""
    if not isinstance(values, Mapping):
        raise wrong(prefix.rstrip(".") or "a recipe", values, "an object of fields")
    for key in values:
        if key not in known:
            raise UserError(f"{prefix}{key}: there is no such field{closest(str(key), known)}")
    if not all_of_them:
        return values
    later = {key: _LATER[prefix + key] for key in known if prefix + key in _LATER}
    missing = [f"{prefix}{key}" for key in known if key not in values and key not in later]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; a recipe's file must have all fields")
    return later | dict(values)


def _read(path: str, wanted: Any, value: Any) -> Any:
    try:
        return from_json(wanted, value)
    except TypeMismatch:
        raise wrong(path, value, expected(wanted)) from None

# SPDX-License-Identifier: Apache-2.0
"""Values of annotated fields, from JSON and from what is typed on a command line."""

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from vivit_jax.config import Config
from vivit_jax.config_base import number
from vivit_jax.errors import ConfigError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class Misfit(Exception):
    """A value that is not of a field's type; the caller knows the field's name."""


def expected(wanted: Any) -> str:
    """What values of an annotation are, in words."""
    if wanted is types.NoneType:
        return "none"
    arguments = typing.get_args(wanted)
    if _is_union(wanted):
        return " or ".join(map(expected, arguments))
    if typing.get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if typing.get_origin(wanted) is tuple:
        if Ellipsis in arguments:
            return f"a list, each entry {expected(arguments[0])}"
        return f"[{', '.join(map(expected, arguments))}]"
    return _NAMES[wanted]


def from_json(wanted: Any, value: Any) -> Any:
    """A JSON value as a field of this annotation holds it: lists as tuples, 1 as 1.0.

    Raises Misfit for one of another type, and for numbers that are not finite.
    """
    arguments = typing.get_args(wanted)
    if _is_union(wanted):
        return _first(from_json, arguments, value)
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, list | tuple):
            items = arguments[:1] * len(value) if Ellipsis in arguments else arguments
            if len(items) == len(value):
                return tuple(map(from_json, items, value))
    elif typing.get_origin(wanted) is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif wanted is float:
        if number(value):
            return float(value)
    elif type(value) is wanted:
        return value
    raise Misfit


def from_text(wanted: Any, text: str) -> Any:
    """What was typed, as a field of this annotation holds it.

    "none" where there may be none, "true" and "false", "1e-4", "1e3" also where a whole number is
    wanted. Texts need no quotes. Lists are "0.9,1.33" or "[0.9, 1.33]"; entries that are quoted, as
    those with commas in them must be, or that are lists themselves, are written as in Python, but
    backslashes stand for themselves. Raises Misfit for what cannot be read so.
    """
    text = text.strip()
    arguments = typing.get_args(wanted)
    if _is_union(wanted):
        # None first: every text is a text.
        return _first(from_text, sorted(arguments, key=lambda a: a is not types.NoneType), text)
    if typing.get_origin(wanted) is tuple:
        return _tuple_from_text(wanted, text)
    if wanted is str or typing.get_origin(wanted) is Literal:
        return from_json(wanted, _unquoted(text))
    lower = text.lower()
    if wanted is types.NoneType and lower in ("none", "null"):
        return None
    if wanted is bool and lower in ("true", "false"):
        return lower == "true"
    if wanted in (int, float):
        return from_json(wanted, _number_from_text(wanted, text))
    raise Misfit


def _is_union(wanted: Any) -> bool:
    return isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union


def _first(read: Callable, options: typing.Iterable, value: Any) -> Any:
    for option in options:
        try:
            return read(option, value)
        except Misfit:
            continue
    raise Misfit


def _number_from_text(wanted: type, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        raise Misfit from None
    return int(value) if wanted is int and value.is_integer() else value


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _tuple_from_text(wanted: Any, text: str) -> tuple:
    arguments = typing.get_args(wanted)
    nested = any(typing.get_origin(item) is tuple for item in arguments)
    if nested or "'" in text or '"' in text:
        try:
            # Else the "\b" of a regular expression would become a backspace.
            value = ast.literal_eval(text.replace("\\", "\\\\"))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Misfit from None
        return from_json(wanted, [value] if isinstance(value, str) else value)
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "":
        parts.pop()
    items = arguments[:1] * len(parts) if Ellipsis in arguments else arguments
    if len(items) != len(parts):
        raise Misfit
    return tuple(map(from_text, items, parts))


Settings = Iterable[str] | Mapping[str, Any]  # key=value, or values by the names of fields


def override(config: Config, settings: Settings) -> Config:
    """Apply settings, see `parse_settings`."""
    changes = parse_settings(type(config), settings)
    if changes.get("num_labels", config.num_labels) != config.num_labels:
        changes.setdefault("id2label", None)
        changes.setdefault("class_splits", None)
        if changes["class_splits"] is None:
            changes.setdefault("split_names", None)
    return dataclasses.replace(config, **changes)


def reusable(settings: Settings | None) -> Settings:
    """Settings that can be read more than once; none for None. ConfigError for other types."""
    if settings is None:
        return ()
    kept: Any = settings
    if isinstance(settings, Mapping):
        kept = dict(settings)
    elif isinstance(settings, Iterable) and not isinstance(settings, str):
        kept = tuple(settings)
    if isinstance(kept, dict | tuple) and all(isinstance(name, str) for name in kept):
        return kept
    raise ConfigError(f"config must be fields by name or a list of 'key=value' texts, got {kept!r}")


def names_set(settings: Settings) -> set[str]:
    """The fields that settings name, not checked."""
    return {setting.partition("=")[0] for setting in settings}


def parse_settings(cls: type[Config], settings: Settings) -> dict[str, Any]:
    """Fields by name from `key=value` settings, or a mapping, with config.json's field names.

    In a text values are JSON, bare words are strings, `2,16,16` and `noun,verb` are lists; class
    names and splits set `num_labels` if nobody does. Raises ConfigError for an unknown key, for one
    that is set twice and for a value of the wrong type.
    """
    fields = {f.name: f.type for f in dataclasses.fields(cls) if not f.metadata.get("execution")}
    parsed, where, what = map(_split, settings), "--config", cls.model_type
    if isinstance(settings, Mapping):
        parsed, where, what = settings.items(), "config", cls.__name__
    changes = {}
    for name, value in parsed:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(fields)}"
            if name in {f.name for f in dataclasses.fields(cls)}:
                hint = ": it says how a model runs, not what it computes, and is an argument"
            raise ConfigError(f"{where}: {what} has no field {name!r}{hint}")
        if name in changes:
            raise ConfigError(f"{where}: {name} is set twice")
        changes[name] = _typed(where, name, value, fields[name])
    if "num_labels" not in changes:
        # Names and splits say how many classes there are.
        if isinstance(changes.get("id2label"), dict | tuple):
            changes["num_labels"] = len(changes["id2label"])
        elif isinstance(changes.get("class_splits"), tuple):
            changes["num_labels"] = sum(changes["class_splits"])
    return changes


@dataclasses.dataclass(frozen=True)
class _Text:
    """A value as it was typed."""

    text: str

    def __repr__(self):
        return repr(self.text)


def _split(setting: str) -> tuple[str, _Text]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"config takes texts of the form key=value, got {setting!r}")
    return name, _Text(text)


def _typed(where: str, name: str, given: Any, wanted: Any) -> Any:
    value = given
    if isinstance(given, _Text):
        value = _parse(given.text)
        if isinstance(value, str) and _fits((value,), wanted):
            value = tuple(value.split(","))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    if name != "id2label" and not _fits(value, wanted):
        expected = getattr(wanted, "__name__", None) if wanted in (int, float, bool, str) else None
        raise ConfigError(f"{where}: {name} must be {expected or wanted}, got {given!r}")
    return value


def _parse(text: str) -> Any:
    for candidate in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return {"True": True, "False": False, "None": None}.get(text, text)


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is None or wanted is types.NoneType:
        return value is None
    arguments = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        return any(_fits(value, option) for option in arguments)
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, tuple):
            return False
        items = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        return len(value) == len(items) and all(map(_fits, value, items))
    kind = int | float if wanted is float else wanted
    return isinstance(value, kind) and not (wanted is not bool and isinstance(value, bool))

# SPDX-License-Identifier: Apache-2.0
"""Values of annotated fields, from JSON and from a command line.

`--config KEY=VALUE` and `--set KEY=VALUE` share one grammar. A value is read by the type of its
field, without the spaces around it:

    none  null                      None, where the field may be None; in any case, as the next
    true  false                     a truth value
    12  1e3  -0.5                   a number; 1e3 and 8.0 are whole numbers too
    relu  'relu'  "relu"            a text, with or without quotes
    2,16,16  (2,16,16)  [2, 16, 16] a list; an empty value and [] are an empty list
    ['layers_\\d{1,2}', 'head']     texts with commas, in quotes; a backslash is a backslash
    [['head/.*', 10], ('.*', 1)]    lists of lists, texts in quotes
    {"0": "cat", "1": "dog"}        names by number, a JSON object
"""

import ast
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from vivit_jax.config import Config
from vivit_jax.config_base import number
from vivit_jax.errors import ConfigError, closest

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# An entry of a list that begins with a quote.
_QUOTED_ENTRY = re.compile(r"""(?:^|[\[(,])\s*['"]""")


class TypeMismatch(Exception):
    """A value that does not have its field's type; the caller knows the field's name."""


def expected(wanted: Any) -> str:
    """An annotation in words."""
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

    An object is the list of its pairs. Raises TypeMismatch for a value of another type, and for
    numbers that are not finite.
    """
    arguments = typing.get_args(wanted)
    if _is_union(wanted):
        return _first(from_json, arguments, value)
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, Mapping) and typing.get_origin(arguments[0]) is tuple:
            key, entry = typing.get_args(arguments[0])
            return tuple((_key(key, k), _entry(entry, v)) for k, v in value.items())
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
    elif isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    raise TypeMismatch


def from_text(wanted: Any, text: str) -> Any:
    """A value from a command line as a field of this annotation holds it.

    The module's docstring has the grammar. Raises TypeMismatch for a text that cannot be read so.
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
    raise TypeMismatch


def _is_union(wanted: Any) -> bool:
    return isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union


def _first(read: Callable[[Any, Any], Any], options: Iterable[Any], value: Any) -> Any:
    for option in options:
        try:
            return read(option, value)
        except TypeMismatch:
            continue
    raise TypeMismatch


def _key(wanted: Any, key: Any) -> Any:
    """A key of an object, which JSON writes as a text."""
    return from_text(wanted, key) if isinstance(key, str) else from_json(wanted, key)


def _entry(wanted: Any, value: Any) -> Any:
    """A value of an object; numbers are good names."""
    named = wanted is str and number(value)
    return str(value) if named else from_json(wanted, value)


def _number_from_text(wanted: type, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        raise TypeMismatch from None
    return int(value) if wanted is int and value.is_integer() else value


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _tuple_from_text(wanted: Any, text: str) -> tuple:
    arguments = typing.get_args(wanted)
    if text.startswith("{"):
        return from_json(wanted, _json_object(text))
    nested = any(typing.get_origin(item) is tuple for item in arguments)
    if nested or _QUOTED_ENTRY.search(text):
        try:
            # Else the "\b" of a regular expression would become a backspace.
            value = ast.literal_eval(text.replace("\\", "\\\\"))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise TypeMismatch from None
        return from_json(wanted, [value] if isinstance(value, str) else value)
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "":
        parts.pop()
    items = arguments[:1] * len(parts) if Ellipsis in arguments else arguments
    if len(items) != len(parts):
        raise TypeMismatch
    return tuple(map(from_text, items, parts))


def _json_object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise TypeMismatch from None


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
    """Settings that can be read more than once; () for None. ConfigError for other types."""
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
    """The names of the fields that are set, unchecked."""
    return {setting.partition("=")[0].strip() for setting in settings}


def parse_settings(cls: type[Config], settings: Settings) -> dict[str, Any]:
    """Fields by name from `key=value` settings, or a mapping, with config.json's field names.

    The module's docstring has the grammar of values in texts. Class names and splits set
    `num_labels` unless a setting does. Raises ConfigError for an unknown key, for one that is set
    twice and for a value of the wrong type.
    """
    fields = {f.name: f.type for f in dataclasses.fields(cls) if not f.metadata.get("execution")}
    if isinstance(settings, Mapping):
        given, read, where, what = settings.items(), from_json, "config", cls.__name__
    else:
        given, read, where, what = map(_split, settings), from_text, "--config", cls.model_type
    changes: dict[str, Any] = {}
    for name, value in given:
        if name not in fields:
            hint = closest(name, fields, short=True)
            if name in {f.name for f in dataclasses.fields(cls)}:
                hint = ": it sets how a model runs, not what it computes; pass it as an argument"
            raise ConfigError(f"{where}: {what} has no field {name!r}{hint}")
        if name in changes:
            raise ConfigError(f"{where}: {name} is set twice")
        try:
            changes[name] = read(fields[name], value)
        except TypeMismatch:
            wanted = expected(fields[name])
            raise ConfigError(f"{where}: {name} must be {wanted}, got {value!r}") from None
    if "num_labels" not in changes:
        # Names and splits say how many classes there are.
        if isinstance(changes.get("id2label"), tuple):
            changes["num_labels"] = len(changes["id2label"])
        elif isinstance(changes.get("class_splits"), tuple):
            changes["num_labels"] = sum(changes["class_splits"])
    return changes


def _split(setting: str) -> tuple[str, str]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"config takes texts of the form key=value, got {setting!r}")
    return name.strip(), text

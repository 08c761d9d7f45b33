# SPDX-License-Identifier: Apache-2.0
"""Values of annotated fields, from JSON and from what is typed on a command line."""

import ast
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from vivit_jax.config_base import number

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

# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON: plain values of bounded size or one error, whatever a file holds."""

import json
import math
from typing import Any

from vivit_jax.errors import UserError, first_line
from vivit_jax.files.addresses import Place
from vivit_jax.files.inputs import check_file
from vivit_jax.files.limits import check_unpacked
from vivit_jax.files.reading import content, is_directory, size_of

MAX_DEPTH = 64
_TEXT, _OBJECT = 5, 100  # bytes of memory for a byte of JSON, and for a value in it


class _TooLarge(UserError):
    """JSON whose values would take more memory than the limit."""


def read_json(path: str | Place, error: type[UserError] = UserError, hint: str = "") -> Any:
    """The value that a JSON file holds.

    Raises `error`, with `hint` as the way out, for a path that is not a file, for text that is not
    JSON, for values that take more memory than `unpack_limit`, for values nested deeper than
    MAX_DEPTH, for integers of more than 64 bits and for numbers beyond float64. Raises OSError if
    the file cannot be opened.
    """
    check_file(path, error)
    if is_directory(path):
        raise error(f"{path} is a directory, expected a JSON file")
    check_unpacked(f"{path}, read as JSON,", _TEXT * size_of(path), error=error)
    return parse_json(content(path), str(path), error, hint)


def parse_json(
    text: str | bytes, name: str, error: type[UserError] = UserError, hint: str = ""
) -> Any:
    """The value of a JSON text; `name` says where it is from. Raises as `read_json`."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        size = _TEXT * len(text) + _OBJECT * sum(map(text.count, ",:[{"))
        check_unpacked(f"{name}, read as JSON,", size, error=_TooLarge)
        value = json.loads(text, parse_int=_integer, parse_float=_float)
        _check_depth(value)
    except _TooLarge as reason:
        raise error(str(reason)) from None
    except (ValueError, RecursionError) as reason:
        deep = isinstance(reason, RecursionError)
        why = f"nested deeper than {MAX_DEPTH} levels" if deep else first_line(reason)
        raise error(f"{name} is not valid JSON: {why}{f'; {hint}' if hint else ''}") from None
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"the integer {_short(text)} is beyond 64 bits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {_short(text)} is beyond float64")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}... of {len(text)} characters"


def _check_depth(value: Any) -> None:
    """RecursionError for values that are nested too deep for their readers to walk."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            below
            for each in level
            for below in (each.values() if isinstance(each, dict) else each)
            if isinstance(below, dict | list)
        ]
        if not level:
            return
    raise RecursionError

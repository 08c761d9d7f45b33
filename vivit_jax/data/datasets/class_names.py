# SPDX-License-Identifier: Apache-2.0
"""Names of classes: files that give them in the order of their numbers, and near misses."""

import difflib
import io
import os
import re
from collections.abc import Iterable, Sequence

from vivit_jax.errors import UserError, quoted
from vivit_jax.files.inputs import check_file
from vivit_jax.files.json_files import read_json
from vivit_jax.files.reading import content

_EXPECTED = (
    "expected a name in each line, lines 'number name' as in UCF101's classInd.txt, or JSON as "
    "Something-Something's labels.json"
)
_NUMBERED = re.compile(r"([0-9]+)[\s,:]+(.*)").fullmatch
_SHOWN = 20


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """The names of classes 0, 1, ... in a file.

    A text file has a name in each line, or a number and a name, counted from 0 or 1. A JSON file
    has a list of names, or an object of names to numbers or of numbers to names.

    Raises UserError for a file that cannot be read, numbers with gaps and names that repeat.
    """
    path = os.fspath(path)
    try:
        if path.lower().endswith(".json"):
            names = _from_json(read_json(path))
        else:
            check_file(path)
            lines = io.StringIO(content(path).decode("utf-8-sig"), newline=None)
            names = _from_lines([line.strip() for line in lines if line.strip()])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {_EXPECTED}") from None
    except UserError:
        raise
    except ValueError as error:  # also text that is not UTF-8
        raise UserError(f"{path}: {error}; {_EXPECTED}") from None
    if not names:
        raise UserError(f"{path}: no names of classes; {_EXPECTED}")
    repeated = sorted({name for name in names if names.count(name) > 1}) if _repeat(names) else []
    if repeated:
        raise UserError(f"{path}: names two classes {quoted(repeated[0])}; {_EXPECTED}")
    return names


def describe_unknown(unknown: Sequence[str], known: Iterable[str]) -> str:
    """The unknown names, each with the known name that is closest to it, if one is close."""
    by_lower = {name.lower(): name for name in known}
    shown = []
    for name in unknown[:_SHOWN]:
        close = difflib.get_close_matches(name.lower().replace("_", " "), by_lower, 1)
        meant = f" (did you mean {quoted(by_lower[close[0]])}?)" if close else ""
        shown.append(f"{quoted(name)}{meant}")
    more = len(unknown) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _repeat(names: tuple[str, ...]) -> bool:
    return len(set(names)) < len(names)


def _from_lines(lines: list[str]) -> tuple[str, ...]:
    numbered = [_NUMBERED(line) for line in lines]
    pairs = [(int(found[1]), found[2]) for found in numbered if found]
    if len(pairs) < len(lines):
        return tuple(lines)
    return _in_order(pairs, first=min((number for number, _ in pairs), default=0))


def _from_json(value) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if not isinstance(value, dict):
        raise ValueError("neither a list of names nor an object")
    pairs = [(str(k), str(v)) for k, v in value.items()]
    if not all(number.isdecimal() for _, number in pairs):
        pairs = [(name, number) for number, name in pairs]
    if not all(number.isdecimal() for _, number in pairs):
        raise ValueError("its object maps neither names to numbers nor numbers to names")
    return _in_order([(int(number), name) for name, number in pairs], first=0)


def _in_order(pairs: list[tuple[int, str]], first: int) -> tuple[str, ...]:
    pairs = sorted(pairs)
    if first > 1 or [number for number, _ in pairs] != list(range(first, first + len(pairs))):
        raise ValueError(
            f"its {len(pairs)} numbers are not 0 to {len(pairs) - 1} or 1 to {len(pairs)}"
        )
    return tuple(name for _, name in pairs)

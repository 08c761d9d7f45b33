# SPDX-License-Identifier: Apache-2.0
"""List files: each line has a path, then integers for its label and its range of frames."""

import re
from typing import TextIO

from vivit_jax.data.datasets.columns import Builder, Columns, Entry, Label
from vivit_jax.errors import UserError, counted
from vivit_jax.files.inputs import check_file
from vivit_jax.files.reading import opened_text

SOURCES = (
    "expected a list file with lines 'path label' or columns 'path,label', a directory with a "
    "folder for each class, or one of clips"
)

# The largest label, since batches hold int32, and the largest end of a clip's frames.
LARGEST = 2**31 - 1

# A field may hold several labels, as in "3,7", unless commas separate the fields.
_NUMBERS = re.compile(r"-?[0-9]+(?:,-?[0-9]+)*").fullmatch
_NUMBER = re.compile(r"-?[0-9]+").fullmatch


# A line "path label" as most lists have it, which every reading takes alike. They are read
# together, in pieces of so many characters.
_PLAIN = re.compile(r'^(?!["#])(\S*[^\s,]) ([0-9]{1,9})\n', re.MULTILINE)
_PIECE = 1 << 22


def read_list(path: str, labels: int | None = None) -> Columns:
    """The clips of a text file, one per line; skips empty lines and those that begin with "#".

    `labels` is that of `parse_line`. A line that repeats an earlier one counts, with a warning.

    Raises UserError if the file cannot be read or has no clip, a line is malformed, only some clips
    are labelled, or a clip has two labels.
    """
    found = Builder()
    check_file(path)
    try:
        with opened_text(path) as file:
            _add_lines(found, path, file, labels)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {SOURCES}") from None
    if not len(found):
        raise UserError(f"{path}: a list without a clip; {SOURCES}")
    return found.columns(path)


def _add_lines(found: Builder, path: str, file: TextIO, labels: int | None) -> None:
    first = 1
    while text := file.read(_PIECE) + file.readline():
        text += "" if text.endswith("\n") else "\n"
        count = text.count("\n")
        plain = _PLAIN.findall(text) if labels in (None, 0, 1) and "\0" not in text else []
        if len(plain) == count:
            paths, numbers = zip(*plain, strict=True)
            found.add_lines(paths, [] if labels == 0 else [*map(int, numbers)], first)
        else:
            for number, line in enumerate(text.split("\n")[:-1], first):
                _add_line(found, path, number, line.strip(), labels)
        first += count


def _add_line(found: Builder, path: str, number: int, line: str, labels: int | None) -> None:
    if not line or line.startswith("#"):
        return
    if "\0" in line:
        raise UserError(f"{path}: {_other_text(line)}; {SOURCES}")
    try:
        found.add(parse_line(line, labels), number)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {line[:200]!r}: {error}") from None


def first_content(path: str) -> tuple[int, str]:
    """The number and the text of a file's first line that is neither empty nor a comment.

    Raises UserError as `read_list` does.
    """
    check_file(path)
    try:
        with opened_text(path) as lines:
            for number, line in enumerate(lines, 1):
                line = line.strip()
                if "\0" in line:
                    raise UserError(f"{path}: {_other_text(line)}; {SOURCES}")
                if line and not line.startswith("#"):
                    return number, line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {SOURCES}") from None
    raise UserError(f"{path}: a list without a clip; {SOURCES}")


def _other_text(line: str) -> str:
    """What a file is, of whose first line this is what UTF-8 makes."""
    utf16 = line[:2] in ("\udcff\udcfe", "\udcfe\udcff")  # its byte order mark
    return "UTF-16 text, save it as UTF-8" if utf16 else "not a text file"


def is_label(text: str) -> bool:
    """Whether a text is an integer, or several that are separated by commas."""
    return bool(_NUMBERS(text))


def parse_label(text: str) -> Label:
    """The label of a text for which `is_label` holds. Raises ValueError with the reason."""
    return _label(text.split(","))


def count_labels(label: Label) -> int:
    """The number of labels of a clip, 0 for None."""
    return len(label) if isinstance(label, tuple) else int(label is not None)


def parse_line(line: str, labels: int | None = None) -> Entry:
    """Parses a stripped line: `path [[start] total] label [label...]`.

    Fields are separated by tabs if there are any, otherwise by white space or commas, whichever
    stands before the last field. A path may contain white space and commas, and be in double
    quotes.

    Args:
        line: not empty.
        labels: number of labels that end the line; the last field may hold several, separated by
            commas. 0: none; lines are `path`, `path label` (dropped) or, as in VideoMAE's lists for
            pre-training, `path start total`. None: the labels are those of the last field, and no
            other fields are allowed, because `folder total label` and `folder start total` look
            alike.

    A label of -1 means unlabelled. `path 0 -1` is a bare path, whatever `labels` is. No number
    exceeds LARGEST.

    Raises ValueError with the reason.
    """
    path, fields = _split(line, most=(labels or 1) + 2)
    if len(path) > 1 and path[0] == path[-1] == '"':
        path = path[1:-1].replace('""', '"')
    if not path:
        raise ValueError("there is no path before the numbers")
    if fields == ["0", "-1"]:
        return Entry(path)
    if labels == 0:
        if len(fields) < 2 or fields[1].startswith("-"):
            return Entry(path)
        return Entry(path, None, *_extent(fields[:2]))
    if not fields:
        raise ValueError(
            "there is no label, an integer, at its end; for lists of bare paths pass labels=0"
        )
    several = fields[-1].split(",")
    count = labels or 1
    found, rest = fields[-count:], fields[:-count]
    if len(several) > 1:
        found, rest = several, fields[:-1]
    elif rest and labels is None:
        raise ValueError(
            "its numbers are ambiguous: pass labels=0 for 'folder start total', labels=1 for "
            "'folder total label', labels=2 for 'path label label'"
        )
    if labels not in (None, len(found)):
        raise ValueError(f"it has {counted(len(found), 'label')}; expected {labels}")
    return Entry(path, _label(found), *_extent(rest))


def _split(line: str, most: int) -> tuple[str, list[str]]:
    """The path, and the fields of numbers after it, at most `most` of them."""
    if "\t" in line:
        path, *fields = (field.strip() for field in line.split("\t"))
        wrong = [field for field in fields if not _NUMBERS(field)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not an integer")
        if len(fields) > most:
            raise ValueError(f"it has {len(fields)} numbers; expected at most {most}")
        return path, fields
    words, separator, is_field = line.rsplit(None, most), None, _NUMBERS
    if not is_field(words[-1]) or words[-2:-1] and words[-2].endswith(","):
        words, separator, is_field = line.rsplit(",", most), ",", _NUMBER
    count = 0
    while count < len(words) - 1 and is_field(words[-1 - count].strip()):
        count += 1
    if count < len(words) - 1:
        # The words in front belong to the path, with the separators between them.
        words = line.rsplit(separator, count)
    path, *fields = words
    return path.strip(), [field.strip() for field in fields]


def _label(found: list[str]) -> Label:
    numbers = tuple(_number(text, "label") for text in found)
    if set(numbers) == {-1}:
        return None
    if min(numbers) < 0:
        raise ValueError(f"label {min(numbers)}; expected at least 0, or -1 for unlabelled clips")
    first, *others = numbers
    return numbers if others else first


def _number(text: str, what: str) -> int:
    # Python itself refuses more than 4300 digits, with a message of its own.
    if len(text.lstrip("-").lstrip("0")) > len(str(LARGEST)) or int(text) > LARGEST:
        short = text if len(text) <= 24 else f"{text[:24]}..."
        raise ValueError(f"{what} {short}; expected at most {LARGEST}")
    return int(text)


def _extent(fields: list[str]) -> tuple[int | None, int | None]:
    """Start and total."""
    if not fields:
        return None, None
    if len(fields) > 2 or not all(_NUMBER(field) for field in fields):
        raise ValueError(f"{' '.join(fields)} before the label; expected '[start] total'")
    *starts, total = (_number(field, "a number of frames") for field in fields)
    start = starts[0] if starts else None
    if total < 1 or start is not None and start < 0:
        raise ValueError(
            f"it asks for {total} frames from {start or 0}; expected at least 1, from at least 0"
        )
    if (start or 0) + total > LARGEST:
        raise ValueError(
            f"it asks for {total} frames from {start}; expected at most {LARGEST} in all"
        )
    return start, total

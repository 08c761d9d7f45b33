# SPDX-License-Identifier: Apache-2.0
"""The formats of list files: one record each, in the order in which they are tried."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable

import numpy as np

from vivit_jax.data.datasets.class_names import read_class_names
from vivit_jax.data.datasets.columns import Columns
from vivit_jax.data.datasets.folders import ARRAYS, VIDEOS, ending
from vivit_jax.data.datasets.list_files import (
    SOURCES,
    first_content,
    is_label,
    parse_line,
    read_list,
)
from vivit_jax.data.datasets.list_rows import (
    Listed,
    ListSource,
    Row,
    collected,
    column_of,
    content_lines,
    fields_of,
    header_of,
    located,
    row_error,
    table_rows,
)
from vivit_jax.errors import UserError, quoted
from vivit_jax.files.json_files import read_json
from vivit_jax.files.reading import is_file, names_in

logger = logging.getLogger(__name__)

_CLIP_ENDINGS = (*VIDEOS, *ARRAYS, ".webp")
PATH_COLUMNS = (
    "path", "video_path", "file_path", "filepath", "filename", "file_name", "file", "video",
    "video_name", "clip",
)  # fmt: skip
# Of several, the first holds the class: a column of names rather than one of numbers.
LABEL_COLUMNS = (
    "class_name", "label_name", "label", "class", "category", "action", "target", "label_id",
    "class_id",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset")
_KINETICS = ("youtube_id", "time_start", "time_end")
_UCF101 = re.compile(r"(?:train|test|val)list[0-9]*\.txt").fullmatch
_UCF101_CLIP = re.compile(r"v_.+_g[0-9]+_c[0-9]+\.\w+").fullmatch
_HMDB51 = re.compile(r"(.+)_test_split([0-9])\.txt").fullmatch
_HMDB51_LINE = re.compile(r"(.*\S)\s+([012])").fullmatch
_HMDB51_CODES = {"1": "train", "2": "test"}  # 0: in neither


@dataclasses.dataclass(frozen=True)
class ListFormat:
    """A format of list files.

    Attributes:
        name: for messages.
        misfit: why a file, of which it gets the first line with content, is of another format;
            None if it is of this one.
        read: its clips.
    """

    name: str
    misfit: Callable[[ListSource, str], str | None]
    read: Callable[[ListSource], Listed]


def read_listed(source: ListSource) -> Listed:
    """The clips of a list file in any of the `FORMATS`.

    Raises UserError as `read_list` does, and for a file in none of them, with the reason for each.
    """
    number, line = first_content(source.path)
    misfits = []
    for each in FORMATS:
        why = each.misfit(source, line)
        if why is None:
            entries, classes = each.read(source)
            if source.labels == 0:
                return Listed(entries.unlabelled(), None)
            classes = _checked_names(source, entries, classes)
            _check_text(source, classes)
            return Listed(entries, classes)
        misfits.append(f"{each.name}: {why}")
    *others, lines = misfits
    lines = lines.removeprefix(f"{FORMATS[-1].name}: ")
    raise UserError(
        f"{source.path}, line {number}: {line[:200]!r}: {lines}. Other formats do not fit: "
        f"{'; '.join(others)}"
    )


def _checked_names(
    source: ListSource, entries: Columns, classes: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """The classes of a list, which may name them itself or only number them."""
    names = source.class_names
    labels = entries.labels
    if classes is not None or names is None or not labels.size:
        return classes
    wrong = np.flatnonzero((labels >= len(names)).any(axis=1) | (labels.shape[1] > 1))
    if wrong.size:
        wrong = entries[int(wrong[0])]
        raise UserError(
            f"{source.path}: {wrong.path} has label {wrong.label}, and the file of class names "
            f"names classes 0 to {len(names) - 1}; use the file that belongs to this list"
        )
    return names


def _check_text(source: ListSource, classes: tuple[str, ...] | None) -> None:
    """Raise UserError for names that no config.json can hold, as of files saved as Latin-1."""
    for name in classes or ():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{source.path}: class {quoted(name)} is not UTF-8 text; save the file as UTF-8"
            ) from None


def _not_kinetics(source: ListSource, line: str) -> str | None:
    missing = [name for name in _KINETICS if name not in header_of(line)]
    return f"no column {missing[0]}" if missing else None


def _read_kinetics(source: ListSource) -> Listed:
    table = table_rows(source)
    _, header = next(table)
    header = [name.lower() for name in header]
    name, start, end = (header.index(column) for column in _KINETICS)
    label, split = column_of(header, LABEL_COLUMNS), column_of(header, SPLIT_COLUMNS)

    def rows():
        for number, fields in table:
            try:
                first, last = (int(float(fields[k])) for k in (start, end))
            except (ValueError, OverflowError):
                times = f"{fields[start]!r} and {fields[end]!r}"
                raise row_error(source, number, f"times {times}; expected seconds") from None
            clip = f"{fields[name]}_{first:06}_{last:06}.mp4"
            yield Row(number, clip, _at_column(fields, label), _at_column(fields, split))

    return located(source, *collected(source, rows()))


def _at_column(fields: list[str], column: int | None) -> str | None:
    return None if column is None else fields[column]


def _not_named_columns(source: ListSource, line: str) -> str | None:
    header = header_of(line)
    # A single word may also be a path.
    if column_of(header, PATH_COLUMNS) is None or header in (["file"], ["video"], ["clip"]):
        return f"its first line names no column {', '.join(PATH_COLUMNS[:4])}, ..."
    if column_of(header, LABEL_COLUMNS) is None and source.labels != 0:
        return f"its first line names no column {', '.join(LABEL_COLUMNS[2:5])}, ..."
    return None


def _read_named_columns(source: ListSource) -> Listed:
    table = table_rows(source)
    _, header = next(table)
    header = [name.lower() for name in header]
    columns = [column_of(header, names) for names in (PATH_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)]
    unused = [name for k, name in enumerate(header) if k not in columns]
    if unused:
        logger.info("%s: columns without an effect: %s", source.path, ", ".join(unused))
    path, label, split = columns
    assert path is not None, "its first line names it"
    rows = (
        Row(number, fields[path], _at_column(fields, label), _at_column(fields, split))
        for number, fields in table
    )
    return collected(source, rows)[0]


def _clip_column(line: str) -> int | None:
    """Which of two fields is a clip's path, if the other may be the name of a class."""
    fields = fields_of(line)
    clips = [ending(field) in _CLIP_ENDINGS for field in fields]
    if len(fields) != 2 or clips.count(True) != 1:
        return None
    other = fields[clips.index(False)]
    return None if is_label(other) or not other else clips.index(True)


def _not_two_columns(source: ListSource, line: str) -> str | None:
    return "not a clip and a name" if _clip_column(line) is None else None


def _read_two_columns(source: ListSource) -> Listed:
    clip = _clip_column(first_content(source.path)[1])
    assert clip is not None, "its first line fits"
    rows = (Row(number, fields[clip], fields[1 - clip]) for number, fields in table_rows(source))
    return collected(source, rows)[0]


def _not_something(source: ListSource, line: str) -> str | None:
    return None if ending(source.path) == ".json" else "its name does not end in .json"


def _read_something(source: ListSource) -> Listed:
    try:
        items = read_json(source.path)
    except OSError as error:
        raise UserError(f"{source.path}: {error.strerror}; {SOURCES}") from None
    good = isinstance(items, list) and all(isinstance(i, dict) and "id" in i for i in items)
    if not good:
        raise UserError(
            f"{source.path}: JSON, but not the list of objects with 'id' and 'template' that "
            f"Something-Something v2 has; {SOURCES}"
        )

    def rows():
        for k, item in enumerate(items):
            label = item.get("template", item.get("label"))
            label = None if label is None else re.sub(r"[\[\]]", "", str(label))
            clip = str(item["id"])
            clip = clip if ending(clip) in _CLIP_ENDINGS else f"{clip}.webm"
            yield Row(f"item {k}", clip, label)

    beside = os.path.dirname(source.path)
    found = [os.path.join(beside, n) for n in ("labels.json", "something-something-v2-labels.json")]
    order = next((read_class_names(name) for name in found if is_file(name)), None)
    return collected(source, rows(), order)[0]


def _class_index(source: ListSource) -> str:
    return os.path.join(os.path.dirname(source.path), "classInd.txt")


def _ucf101_fields(line: str) -> tuple[str, str]:
    """A line's path, and its number from 1 or an empty text."""
    found = re.fullmatch(r"(.*\S)\s+([0-9]{1,9})", line)
    return (found[1], found[2]) if found else (line, "")


def _not_ucf101(source: ListSource, line: str) -> str | None:
    if not _UCF101(os.path.basename(source.path)):
        return "its name is not like trainlist01.txt"
    clip, _ = _ucf101_fields(line)
    if not os.path.dirname(clip):
        return "its clips are in no folders of classes"
    if not is_file(_class_index(source)) and not _UCF101_CLIP(os.path.basename(clip)):
        return "no classInd.txt is beside it"
    return None


def _read_ucf101(source: ListSource) -> Listed:
    index = _class_index(source)
    order = read_class_names(index) if is_file(index) else None

    def rows():
        for number, line in content_lines(source.path):
            clip, numbered = _ucf101_fields(line)
            label = os.path.basename(os.path.dirname(clip))
            if numbered and order is not None and source.class_names is None:
                if not 0 < int(numbered) <= len(order):
                    why = f"class {numbered}; expected 1 to {len(order)}, as in {index}"
                    raise row_error(source, number, why)
                label = order[int(numbered) - 1]
            yield Row(number, clip, label)

    return collected(source, rows(), order)[0]


def _not_hmdb51(source: ListSource, line: str) -> str | None:
    found = _HMDB51(os.path.basename(source.path))
    return None if found else "its name is not like wave_test_split1.txt"


def _read_hmdb51(source: ListSource) -> Listed:
    folder, name = os.path.split(source.path)
    wanted = _HMDB51(name)
    assert wanted is not None, "its name fits"
    siblings = [_HMDB51(each) for each in sorted(names_in(folder or "."))]
    files = [found for found in siblings if found and found[2] == wanted[2]]
    logger.info("%s: read with all %d files of split %s", source.path, len(files), wanted[2])

    def rows():
        for file in files:
            for number, line in content_lines(os.path.join(folder, file[0])):
                found, place = _HMDB51_LINE(line), f"line {number} of {file[0]}"
                if not found:
                    raise row_error(source, place, f"{line[:200]!r}; expected a clip and 0, 1 or 2")
                if found[2] in _HMDB51_CODES:
                    yield Row(place, found[1], file[1], _HMDB51_CODES[found[2]])

    return located(source, *collected(source, rows()))


def _not_lines(source: ListSource, line: str) -> str | None:
    try:
        parse_line(line, source.labels)
    except ValueError as error:
        return str(error)
    return None


def _read_lines(source: ListSource) -> Listed:
    return Listed(read_list(source.path, source.labels), None)


FORMATS = (
    ListFormat("Kinetics", _not_kinetics, _read_kinetics),
    ListFormat("columns with names", _not_named_columns, _read_named_columns),
    ListFormat("Something-Something v2", _not_something, _read_something),
    ListFormat("UCF101", _not_ucf101, _read_ucf101),
    ListFormat("HMDB51", _not_hmdb51, _read_hmdb51),
    ListFormat("columns 'path,class'", _not_two_columns, _read_two_columns),
    ListFormat("lines 'path label'", _not_lines, _read_lines),
)

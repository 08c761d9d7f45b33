# SPDX-License-Identifier: Apache-2.0
"""What the formats of list files share: rows, splits, names of classes, and where clips lie."""

import csv
import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vivit_jax.data.datasets.class_names import describe_unknown
from vivit_jax.data.datasets.columns import Builder, Columns, Entry
from vivit_jax.data.datasets.list_files import (
    SOURCES,
    first_content,
    is_label,
    parse_label,
)
from vivit_jax.errors import UserError, counted, quoted
from vivit_jax.files.addresses import is_address
from vivit_jax.files.inputs import check_file
from vivit_jax.files.reading import exists, opened_text

logger = logging.getLogger(__name__)

_WHOLE = re.compile(r"-?[0-9]+\.0+").fullmatch

_TEST = ("test", "testing")
_VALIDATION = ("validation", "val", "valid", "validate", "dev", "eval")
# The names of each split; many data sets validate with their test clips.
SPLITS = (("train", "training"), _VALIDATION, _TEST)
# Where a data set's clips lie below the root, for files that list only their names.
_LAYOUTS = (
    "{name}",
    "{label}/{name}",
    "{label_}/{name}",
    "{split}/{name}",
    "{split}/{label}/{name}",
)
_LOOKED_FOR, _ASKED_FOR = 1000, 20  # clips; in storage each is a request


class NoSuchSplit(UserError):
    """A data set with splits that has not the one that is wanted."""


@dataclasses.dataclass(frozen=True)
class ListSource:
    """A list file and what is wanted from it.

    Attributes:
        path: the file.
        root: the directory that relative paths start from.
        labels: see `read_dataset`.
        split: the rows that are wanted, where the file has several splits.
        class_names: names of classes 0, 1, ...; None if only the list names them.
    """

    path: str
    root: str
    labels: int | None = None
    split: str | None = None
    class_names: tuple[str, ...] | None = None


class Listed(NamedTuple):
    """The clips of a list, and the names of their classes by label, if they are named."""

    entries: Columns
    classes: tuple[str, ...] | None


class Row(NamedTuple):
    """What a file says of one clip, as texts; `place` is a line's number, or words."""

    place: int | str
    clip: str
    label: str | None
    split: str | None = None


def collected(
    source: ListSource, rows: Iterable[Row], order: tuple[str, ...] | None = None
) -> tuple[Listed, str | None]:
    """The clips of the wanted split, and its name in the file.

    Labels are all integers, or all names of classes, which are numbered as `order` has them, or in
    order of their names.
    """
    if source.labels is not None and source.labels > 1:
        raise UserError(
            f"{source.path}: gives one label for each clip; for labels={source.labels} write lines "
            "'path label label'"
        )
    splits: dict[str | None, Builder] = {}
    texts: dict[str, int] = {}  # by text, in order of appearance
    for row in rows:
        if not row.clip or "\0" in row.clip:
            raise row_error(source, row.place, "there is no path of a clip")
        label = texts.setdefault(row.label, len(texts)) if row.label else None
        if row.split not in splits:
            splits[row.split] = Builder()
        splits[row.split].add(Entry(row.clip, label), row.place)
    if not splits:
        raise UserError(f"{source.path}: a list without a clip; {SOURCES}")
    split = _wanted(source, {name: len(found) for name, found in splits.items()})
    found = splits[split]
    # pandas writes 3.0 where a column has gaps.
    whole = [text.partition(".")[0] if _WHOLE(text) else text for text in texts]
    numbered, classes = {text: is_label(text) for text in texts}, None
    if whole and all(map(is_label, whole)):
        try:
            new = [parse_label(text) for text in whole]
        except ValueError as error:
            raise UserError(f"{source.path}: {error}") from None
    elif any(numbered.values()):
        number = next(text for text in texts if numbered[text])
        name = next(text for text in texts if not numbered[text])
        raise UserError(
            f"{source.path}: labels are numbers such as {number} and names such as {quoted(name)}; "
            "write names only, or numbers only"
        )
    else:
        known = source.class_names or order
        used = {*found.unchecked().labels.ravel().tolist()}
        classes = known or tuple(sorted(text for text, k in texts.items() if k in used))
        places = {name: k for k, name in enumerate(classes)}
        unknown = sorted(text for text, k in texts.items() if text not in places and k in used)
        if unknown:
            raise UserError(
                f"{source.path}: {counted(len(unknown), 'class')} not in the file of class names: "
                f"{describe_unknown(unknown, classes)}"
            )
        new = [places.get(text, 0) for text in texts]  # 0: of a split that is not read
    numbers = [label for label in new if isinstance(label, int)]
    if len(numbers) < len(new):  # several labels, or -1 for none
        found, numbers = found.relabelled(new), None
    if source.labels == 0:
        return Listed(found.unchecked(numbers), classes or None), split
    return Listed(found.columns(source.path, numbers, classes), classes or None), split


def _wanted(source: ListSource, counts: dict[str | None, int]) -> str | None:
    """The split to read, of those in a file with numbers of rows."""
    if None in counts and len(counts) == 1:
        return None
    wanted = source.split
    if wanted is None and len(counts) == 1:
        return next(iter(counts))
    if wanted is not None:
        names = {name or "": name for name in counts}
        found = split_named(wanted, names, source.path)
        if found is not None:
            return names[found]
    listed = ", ".join(
        f"{quoted(name or '(empty)')} ({counted(n, 'row')})" for name, n in counts.items()
    )
    way_out = "say which: --split, or in training data.train_split and data.validation_split"
    if wanted is None:
        raise UserError(f"{source.path}: has several splits: {listed}; {way_out}")
    raise NoSuchSplit(f"{source.path}: has no rows of split {quoted(wanted)}: {listed}; {way_out}")


def split_named(wanted: str, names: Iterable[str], path: str) -> str | None:
    """Which of the names of splits means the wanted one, if any does.

    Warns where test clips stand in for those of validation.
    """
    by_lower = {name.lower(): name for name in names}
    others = next((names for names in SPLITS if wanted.lower() in names), ())
    for name in (wanted.lower(), *others, *(_TEST if others is _VALIDATION else ())):
        if name in by_lower:
            if others is _VALIDATION and name in _TEST:
                logger.warning(
                    "%s: has no clips of split %s; those of %s are used", path, wanted, name
                )
            return by_lower[name]
    return None


def located(source: ListSource, listed: Listed, split: str | None) -> Listed:
    """The clips of a list of mere names, below folders of their classes or not, as they lie."""
    entries, classes = listed

    def path(layout: str, entry: Entry) -> str:
        label = classes[entry.label] if classes and isinstance(entry.label, int) else ""
        values = {"label": label, "label_": label.replace(" ", "_"), "split": split or ""}
        return os.path.normpath(layout.format(name=entry.path, **values).lstrip("/"))

    most = _ASKED_FOR if is_address(source.root) else _LOOKED_FOR
    for entry in entries[:most]:
        for layout in _LAYOUTS:
            if exists(os.path.join(source.root, path(layout, entry))):
                return Listed(entries.moved(path(layout, each) for each in entries), classes)
    count = min(len(entries), most)
    raise UserError(
        f"{source.path}: none of {'its' if count == len(entries) else 'the first'} {count} clips, "
        f"such as {entries[0].path}, is in {source.root or '.'}, or there in a folder of its class "
        "or split; say where they are: --root, or in training data.root"
    )


def row_error(source: ListSource, place: int | str, why: str) -> UserError:
    where = f"line {place}" if isinstance(place, int) else place
    return UserError(f"{source.path}, {where}: {why}")


def _delimiter(line: str) -> str:
    return next((mark for mark in "\t,;" if mark in line), ",")


def fields_of(line: str) -> list[str]:
    """A line's fields."""
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=_delimiter(line)))]
    except csv.Error:
        return []


def header_of(line: str) -> list[str]:
    return [field.lower() for field in fields_of(line)]


def content_lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, line) for each stripped line with content, but not comments."""
    check_file(path)
    try:
        with opened_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and not line.startswith("#"):
                    yield number, line.strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {SOURCES}") from None


def table_rows(source: ListSource) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) for each row of a CSV or TSV file, all of one length.

    Lines that begin with "#" are comments; a warning counts those below the first line that look
    like rows. One whose first field is in quotes is none.
    """
    _, line = first_content(source.path)
    width, comments, begun = len(fields_of(line)), list[int](), False
    with opened_text(source.path, newline="") as file:
        lines = _Followed(file)
        reader = csv.reader(lines, delimiter=_delimiter(line), skipinitialspace=True)
        try:
            for fields in reader:
                fields, begins = [field.strip() for field in fields], lines.first()
                if not any(fields):
                    continue
                if begins.lstrip().startswith("#"):
                    comments += [reader.line_num] if begun and len(fields) == width else []
                    continue
                if len(fields) != width:
                    why = (
                        f"it has {counted(len(fields), 'field')}; expected {width}, as in the "
                        "first line"
                    )
                    raise row_error(source, reader.line_num, why)
                begun = True
                yield reader.line_num, fields
        except csv.Error as error:
            raise row_error(source, reader.line_num, str(error)) from None
    if comments:
        logger.warning(
            '%s: %s, such as line %d, left out as comments: they begin with "#"; write ./ before '
            "such a name, or put it in double quotes",
            source.path,
            counted(len(comments), "row"),
            comments[0],
        )


class _Followed:
    """The lines of a file; `first` is the first of those read since it was last asked for."""

    def __init__(self, lines: Iterable[str]):
        self._lines, self._first = iter(lines), ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._first = self._first or line
        return line

    def first(self) -> str:
        found, self._first = self._first, ""
        return found


def column_of(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)

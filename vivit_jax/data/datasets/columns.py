# SPDX-License-Identifier: Apache-2.0
"""The clips of a list file in columns: ten million take less than a gigabyte."""

import dataclasses
import itertools
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Int32, Int64

from vivit_jax.errors import UserError, quoted

logger = logging.getLogger(__name__)

Label = int | tuple[int, ...] | None
_NONE = -1  # in the place of a label, a start or a total
_PIECE = 1 << 16  # clips that are made at once
_TEXT = ("utf-8", "surrogateescape")  # paths need not be UTF-8


class Entry(NamedTuple):
    """What a list says of a clip; `start` and `total` are None if it does not say them."""

    path: str
    label: Label = None
    start: int | None = None
    total: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(Sequence[Entry]):
    """Entries, made on demand.

    Attributes:
        paths: all paths, one after the other.
        ends: where each path ends among them, after a 0.
        labels: those of each clip; -1 for one without; no columns if none has any.
        extents: start and total of each clip, -1 for None; None if no clip has any.
    """

    paths: bytes
    ends: Int64[np.ndarray, " ends"]
    labels: Int32[np.ndarray, "clips heads"]
    extents: Int32[np.ndarray, "clips 2"] | None

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> "Columns": ...

    def __getitem__(self, index: int | slice) -> "Entry | Columns":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = range(len(self))[index]
        start, total = (None, None) if self.extents is None else self.extents[place].tolist()
        return Entry(
            self.path(place),
            _label(self.labels[place].tolist()),
            None if start == _NONE else start,
            None if total == _NONE else total,
        )

    def __iter__(self) -> Iterator[Entry]:
        pairs = self.labelled_paths()
        if self.extents is None:
            return (Entry(path, label) for path, label in pairs)
        both = zip(pairs, self._said(), strict=True)
        return (Entry(*pair, *extent) for pair, extent in both)

    def _said(self) -> Iterator[tuple[int | None, int | None]]:
        """Start and total of each clip, where the list has any."""
        assert self.extents is not None
        for first in range(0, len(self), _PIECE):
            for start, total in self.extents[first : first + _PIECE].tolist():
                yield None if start == _NONE else start, None if total == _NONE else total

    def labelled_paths(self) -> Iterator[tuple[str, Label]]:
        """The path and the label of each clip."""
        for first in range(0, len(self), _PIECE):
            ends = self.ends[first : first + _PIECE + 1].tolist()
            paths = [self.paths[a:b].decode(*_TEXT) for a, b in itertools.pairwise(ends)]
            labels = self.labels[first : first + _PIECE]
            if labels.shape[1] == 1 and labels.min() >= 0:
                yield from zip(paths, labels[:, 0].tolist(), strict=True)
            else:
                yield from zip(paths, map(_label, labels.tolist()), strict=True)

    def path(self, place: int) -> str:
        """The path of a clip."""
        return self.paths[self.ends[place] : self.ends[place + 1]].decode(*_TEXT)

    def any_whole(self) -> bool:
        """Whether a path may be an address, or one from the root of the machine."""
        if os.name != "posix" or b":/" in self.paths:
            return True
        starts = np.frombuffer(self.paths, np.uint8)[self.ends[:-1]] if self.paths else []
        return bool(np.any(np.equal(starts, ord("/"))))

    def take(self, places: Int64[np.ndarray, " n"]) -> "Columns":
        """The clips at these places, in their order."""
        paths = [self.paths[self.ends[k] : self.ends[k + 1]] for k in places]
        return dataclasses.replace(
            self,
            paths=b"".join(paths),
            ends=_sums(map(len, paths), len(paths)),
            labels=self.labels[places],
            extents=None if self.extents is None else self.extents[places],
        )

    def labelled(self, labels: Int32[np.ndarray, "clips heads"]) -> "Columns":
        """The same clips with other labels."""
        return dataclasses.replace(self, labels=labels)

    def unlabelled(self) -> "Columns":
        """The same clips without labels."""
        return self.labelled(np.empty((len(self), 0), np.int32))

    def moved(self, paths: Iterator[str]) -> "Columns":
        """The same clips with other paths."""
        moved = [path.encode(*_TEXT) for path in paths]
        ends = _sums(map(len, moved), len(moved))
        return dataclasses.replace(self, paths=b"".join(moved), ends=ends)


def _label(found: list[int]) -> Label:
    if not found or found[0] == _NONE:
        return None
    return found[0] if len(found) == 1 else tuple(found)


def _sums(lengths: Iterator[int], count: int) -> Int64[np.ndarray, " ends"]:
    ends = np.zeros(count + 1, np.int64)
    np.cumsum(np.fromiter(lengths, np.int64, count), out=ends[1:])
    return ends


class Builder:
    """Collects the clips of a list; a place is the number of a line, or words."""

    def __init__(self):
        self._paths, self._ends = bytearray(), array("q", [0])
        self._labels, self._extents = array("i"), array("i")
        self._keys = array("q")  # hashes of what makes two clips the same
        self._places, self._words = array("q"), []
        self._counts: dict[int, int] = {}  # number of labels -> the first clip with so many

    def __len__(self) -> int:
        return len(self._places)

    def add(self, entry: Entry, place: int | str) -> None:
        """Add a clip."""
        path, label, start, total = entry
        labels = label if isinstance(label, tuple) else (label,)
        self._counts.setdefault(0 if label is None else len(labels), len(self))
        self._labels.extend(_NONE if each is None else each for each in labels)
        if start is not None or total is not None:
            self._extents.extend((_NONE,) * (2 * len(self) - len(self._extents)))
            self._extents.extend(_NONE if each is None else each for each in (start, total))
            self._keys.append(hash((path, start, total)))
        else:
            self._keys.append(hash(path))
        self._paths += path.encode(*_TEXT)
        self._ends.append(len(self._paths))
        if isinstance(place, str):
            self._words.append(place)
            place = -len(self._words)
        self._places.append(place)

    def add_lines(self, paths: Sequence[str], labels: Sequence[int], first: int) -> None:
        """Add clips of one label each, or of none, from successive lines."""
        whole = "".join(paths)
        lengths = map(len, paths)
        if not whole.isascii():
            lengths = (len(path.encode(*_TEXT)) for path in paths)
        ends = _sums(lengths, len(paths))[1:] + len(self._paths)
        self._counts.setdefault(1 if labels else 0, len(self))
        self._labels.extend(labels or (_NONE,) * len(paths))
        self._keys.extend(map(hash, paths))
        self._paths += whole.encode(*_TEXT)
        self._ends.frombytes(ends.tobytes())
        self._places.extend(range(first, first + len(paths)))

    def relabelled(self, labels: Sequence[Label]) -> "Builder":
        """The same clips with the labels that those which were added stand for, by their number."""
        found = Builder()
        for place, entry in zip(self._places, self.unchecked(), strict=True):
            label = labels[entry.label] if isinstance(entry.label, int) else None
            words = place if place >= 0 else self._words[-place - 1]
            found.add(entry._replace(label=label), words)
        return found

    def columns(
        self,
        source: str,
        numbers: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> Columns:
        """The clips of a list file `source`.

        With `numbers`, a label that was added stands for the one of that number; `classes` name
        labels in messages. Raises UserError if only some clips are labelled, or one has two labels,
        and warns of repeated ones.
        """
        found = self.unchecked(numbers)
        if len(self._counts) > 1:
            each = [f"{count} in {self._place(k)}" for count, k in self._counts.items()]
            raise UserError(
                f"{source}: differing numbers of labels: {' and '.join(each)}; split the list, or "
                "pass labels=0 to drop them all"
            )
        self._check_repeated(source, found, classes)
        return found

    def unchecked(self, numbers: Sequence[int] | None = None) -> Columns:
        """As `columns`, where labels do not matter in the end."""
        count, heads = len(self), max(self._counts, default=0)
        labels = np.array(self._labels, np.int32)
        if len(self._counts) > 1 and heads > 1:
            heads, labels = 0, labels[:0]  # `columns` refuses it
        labels = labels.reshape(count, heads) if heads else np.empty((count, 0), np.int32)
        if numbers is not None:
            labels = np.where(labels == _NONE, _NONE, np.array([*numbers, 0], np.int32)[labels])
        extents = None
        if self._extents:
            self._extents.extend((_NONE,) * (2 * count - len(self._extents)))
            extents = np.array(self._extents, np.int32).reshape(count, 2)
        return Columns(bytes(self._paths), np.array(self._ends, np.int64), labels, extents)

    def _check_repeated(self, source: str, found: Columns, classes: Sequence[str] | None) -> None:
        keys = np.frombuffer(self._keys, np.int64)
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        if not same.any():
            return
        alike = np.zeros(len(keys), bool)
        alike[order[1:][same]] = alike[order[:-1][same]] = True
        seen: dict[tuple, tuple[int, Label]] = {}
        repeated = 0
        for k in np.flatnonzero(alike):
            path, label, start, total = found[int(k)]
            first, other = seen.setdefault((path, start, total), (int(k), label))
            if other != label:
                one, two = (
                    quoted(classes[each]) if classes and isinstance(each, int) else each
                    for each in (other, label)
                )
                raise UserError(
                    f"{source}: {path} has label {one} in {self._place(first)} and {two} in "
                    f"{self._place(int(k))}: remove one of them"
                )
            repeated += first != k
        if repeated:
            logger.warning(
                "%s: %d lines repeat an earlier one, which counts again", source, repeated
            )

    def _place(self, k: int) -> str:
        place = self._places[k]
        return f"line {place}" if place >= 0 else self._words[-place - 1]

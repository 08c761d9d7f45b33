# SPDX-License-Identifier: Apache-2.0
"""The examples of a data set: each on its own, and those of a list in columns."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from jaxtyping import Int32

from vivit_jax.data.datasets.columns import Columns, Entry, Label
from vivit_jax.data.datasets.folders import ARRAYS, VIDEOS, ending
from vivit_jax.files.reading import joined

_NOT_FOLDERS = (*VIDEOS, *ARRAYS, ".webp")
Values = tuple[str, Label, int, int | None, str | None]  # of an example, in the order of its fields


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A clip of a data set.

    Attributes:
        path: a video file, a folder of frames, or an .npy or .npz file.
        label: its class; a tuple of one per head if there are several; None if it is unlabelled.
        start: the clip's first frame, counted from 0, or with `frame_name` the number in its name.
        total: number of frames; None: all from `start` on.
        frame_name: pattern of image names in a folder of known `total`, for `str.format` with the
            number. None: the images in the folder, in order of their names.
    """

    path: str
    label: Label
    start: int = 0
    total: int | None = None
    frame_name: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ListedExamples(Sequence[Example]):
    """The examples of a list, made on demand.

    Attributes:
        columns: what the list says.
        root: where relative paths start.
        frame_name: the pattern of image names in folders for which the list gives a count.
        first_frame: the number of such a folder's first image, if the list does not give it.
    """

    columns: Columns
    root: str
    frame_name: str
    first_frame: int

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "ListedExamples": ...

    def __getitem__(self, index: int | slice) -> "Example | ListedExamples":
        if isinstance(index, slice):
            return dataclasses.replace(self, columns=self.columns[index])
        return self._example(self._row(self.columns[int(index)]))

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self.rows())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        pairs = zip(self, other, strict=False)
        return len(self) == len(other) and all(ours == theirs for ours, theirs in pairs)

    def rows(self) -> Iterator[Values]:
        """The values of each example, with the path as the list has it."""
        if self.columns.extents is None:
            return ((clip, label, 0, None, None) for clip, label in self.columns.labelled_paths())
        return map(self._row, self.columns)

    def _example(self, row: Values) -> Example:
        clip, label, start, total, name = row
        return Example(joined(self.root, clip), label, start, total, name)

    def _row(self, entry: Entry) -> Values:
        clip, label, start, total = entry
        numbered = total is not None and ending(clip) not in _NOT_FOLDERS
        if start is None:
            start = self.first_frame if numbered else 0
        return clip, label, start, total, self.frame_name if numbered else None

    def labelled(self, labels: Int32[np.ndarray, "clips heads"]) -> "ListedExamples":
        """The same clips with other labels."""
        return dataclasses.replace(self, columns=self.columns.labelled(labels))


def described(examples: Sequence[Example], root: str) -> Iterator[Values]:
    """The values of each example; paths below `root` are relative to it."""
    base = os.path.join(root, "") if root else ""
    if (
        isinstance(examples, ListedExamples)
        and examples.root == root
        and not examples.columns.any_whole()
    ):  # then paths are as the list has them
        yield from examples.rows()
        return
    for e in examples:
        yield e.path.removeprefix(base), e.label, e.start, e.total, e.frame_name

# SPDX-License-Identifier: Apache-2.0
"""Splits a data set into clips to train on and clips that are held out, and writes lists."""

import csv
import dataclasses
import io
import logging
import os
from pathlib import Path
from typing import Any

from vivit_jax.data.datasets.check import (
    ClipFacts,
    class_name,
    clip_bytes,
    find_copies,
    split,
)
from vivit_jax.data.datasets.dataset import Dataset, Example, ObjectExample, read_dataset
from vivit_jax.errors import UserError, WriteError
from vivit_jax.files.addresses import is_address
from vivit_jax.files.atomic import whole_file
from vivit_jax.files.reading import absolute

logger = logging.getLogger(__name__)

MOST_COMPARED = 20_000  # clips among which copies are looked for: it reads the size of every file


def hold_out(dataset: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The clips to train on, and about `share` of each class held out, both in the list's order.

    A class of two clips or more has one on each side at least. Clips of one file, and among at most
    20,000 clips files with the same bytes, are never on both sides: they are trained on, unless a
    class has no others. A function of the list, the files' bytes and the seed. A warning says if
    copies are not looked for.

    Raises UserError if no clip can be held out.
    """
    copies: tuple[tuple[int, ...], ...] = ()
    if len(dataset) <= MOST_COMPARED:
        copies = find_copies([_sized(example) for example in dataset.examples])
    left_out = _not_compared(dataset)
    if left_out is not None:
        logger.warning(
            "%s: copies of a clip may be on both sides of the split: %s they are not looked for; "
            "`vivit-jax check-data --write-split` keeps them on one side",
            dataset.source,
            left_out,
        )
    facts = [ClipFacts(example) for example in dataset.examples]
    _, held_out = split(facts, copies, share, seed)
    if not held_out:
        raise UserError(
            f"{dataset.source}: no clip can be held out, since each class keeps one to train on, "
            "and copies are trained on; add clips, or name held-out ones, or none (--validation)"
        )
    held = {*held_out}
    sides = ([i for i in range(len(dataset)) if (i in held) == side] for side in (False, True))
    train, validation = (
        dataclasses.replace(dataset, examples=tuple(dataset.examples[i] for i in side))
        for side in sides
    )
    return train, validation


def _not_compared(dataset: Dataset) -> str | None:
    """Among which clips copies are not looked for; None if they are looked for among all."""
    if len(dataset) > MOST_COMPARED:
        return f"among more than {MOST_COMPARED:,} clips"
    return "in storage" if any(is_address(e.path) for e in dataset.examples) else None


def shared_clips(train: Dataset, held_out: Dataset) -> list[str] | None:
    """Paths of held-out clips that are trained on too: the same frames of a file, or equal files.

    None where nothing is compared: more than 20,000 clips together. Items of objects are not
    compared either, and in storage only the names.
    """
    if len(train) + len(held_out) > MOST_COMPARED:
        return None
    both = [*train.examples, *held_out.examples]
    copies = find_copies([_sized(example) for example in both])
    same = {both[i].path: group[0] for group in copies for i in group}

    def frames(example: Example) -> tuple:
        file = same.get(example.path, os.path.realpath(example.path))
        return file, example.start, example.total

    files = [each for each in train.examples if not isinstance(each, ObjectExample)]
    trained = {*map(frames, files)}
    found = [e for e in held_out.examples if not isinstance(e, ObjectExample)]
    return [example.path for example in found if frames(example) in trained]


def _sized(example: Example) -> ClipFacts:
    """The size of an example's files; an error for one without files to compare."""
    if isinstance(example, ObjectExample):
        return ClipFacts(example, "an item of an object")
    if is_address(example.path):  # a request for each, and then all their bytes
        return ClipFacts(example, "in storage")
    try:
        return ClipFacts(example, bytes=clip_bytes(example.path))
    except OSError as error:  # training reports it
        return ClipFacts(example, str(error))


def write_list(path: Path, dataset: Dataset, **how: Any) -> None:
    """Write a data set as a list file, which `read_dataset(path, **how)` reads back.

    Classes stand in it by name if they have names, else by number. Paths are absolute. Raises
    UserError for what a list cannot hold: items of objects, and paths with line breaks.
    """
    examples = [dataclasses.replace(e, path=absolute(e.path)) for e in dataset.examples]
    named = dataclasses.replace(dataset, examples=tuple(examples))
    numbered = dataclasses.replace(named, classes=None)
    for wanted, write in ((named, _named_lines), (numbered, _numbered_lines)):
        text = None if isinstance(examples[0], ObjectExample) else write(wanted)
        if text is None:
            continue
        try:
            with whole_file(path) as partial:
                partial.write_text(text, encoding="utf-8", errors="surrogateescape")
                if _said(read_dataset(partial, **how)) != _said(wanted):
                    raise UserError("it reads as other clips")
            return
        except WriteError:
            raise
        except UserError:
            continue
    raise UserError(f"{path}: a list cannot hold items of objects, nor paths with a line break")


def _said(dataset: Dataset) -> tuple[bool, list[tuple]]:
    """Whether a list names classes, and what it says of each clip."""
    return dataset.classes is not None, [
        (e.path, class_name(dataset, e.label), e.start, e.total, e.frame_name)
        for e in dataset.examples
    ]


def _named_lines(dataset: Dataset) -> str | None:
    """Columns path and label, the name of the class; None if that does not say everything."""
    classes, examples = dataset.classes, dataset.examples
    if classes is None or any(example.total is not None for example in examples):
        return None
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "label"])
    rows.writerows([example.path, class_name(dataset, example.label)] for example in examples)
    return text.getvalue()


def _numbered_lines(dataset: Dataset) -> str:
    return "".join(map(list_line, dataset.examples))


def list_line(example: Example) -> str:
    """`"path" [start total] [label]`, as a line of a list."""
    path = example.path.replace('"', '""')
    fields: list[Any] = [] if example.total is None else [example.start, example.total]
    label = example.label
    if label is not None:
        fields.append(",".join(map(str, label)) if isinstance(label, tuple) else label)
    return " ".join([f'"{path}"', *map(str, fields)]) + "\n"

# SPDX-License-Identifier: Apache-2.0
"""The clips of a probe: those that its head is trained on, and those that are held out."""

import dataclasses
from pathlib import Path
from typing import Any

from vivit_jax.data.datasets.dataset import Dataset, own_validation, read_dataset
from vivit_jax.data.datasets.hold_out import hold_out
from vivit_jax.data.settings import MOST_CLASSES
from vivit_jax.errors import UserError, counted
from vivit_jax.files.addresses import Place

SHARE = 0.2  # that is held out where the data say nothing

# A share of each class, a list or directory, a data set, or None for what the data say.
Validation = float | str | Path | Dataset | None


@dataclasses.dataclass(frozen=True)
class Sides:
    """Training clips, held-out clips, and how they were told apart."""

    train: Dataset
    held_out: Dataset | None
    how: str


def sides_of(
    data: str | Place | Dataset,
    validation: Validation,
    *,
    seed: int = 0,
    split: str = "train",
    **reading: Any,
) -> Sides:
    """The two sides of a data set; `split` and `reading` are arguments of `read_dataset`.

    Without `validation` the clips for it are taken of a list or directory with several splits, and
    a fifth of each class of anything else. A share is held out as in fine-tuning with this `seed`,
    see `hold_out`; 0 holds out none.

    Raises UserError for clips without exactly one label each, and as `read_dataset`.
    """
    reading = {"labels": 1, **reading}
    train = data if isinstance(data, Dataset) else read_dataset(data, split=split, **reading)
    _check_labels(train)
    if len({example.label for example in train.examples}) < 2:
        raise UserError(
            f"{train.source}: all {counted(len(train), 'clip')} are of one class, and there is "
            "nothing to tell apart; add clips of another"
        )
    if validation is None and not isinstance(data, Dataset):
        held = own_validation(data, train, **reading)
        if held is not None:
            _check_labels(held)
            return Sides(train, held, "the data's own split")
    if validation is None or isinstance(validation, float | int):
        share = SHARE if validation is None else validation
        if not 0 <= share < 1:
            raise UserError(
                "validation must be at least 0 and less than 1, or a list or directory "
                f"(--validation), got {share:g}"
            )
        return _by_share(train, share, seed) if share else Sides(train, None, "")
    held = validation
    if not isinstance(held, Dataset):
        held = read_dataset(held, split="validation", **reading)
    _check_labels(held)
    return Sides(train, held, str(held.source))


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """The names of the classes; LABEL_0 and so on for numbers."""
    if dataset.classes is not None:
        return dataset.classes
    number = 1 + max(
        example.label for example in dataset.examples if isinstance(example.label, int)
    )
    if number > MOST_CLASSES:
        raise UserError(
            f"{dataset.source}: its labels go up to {number - 1}, which would make as many "
            f"classes; expected numbers from 0, below {MOST_CLASSES}"
        )
    return tuple(f"LABEL_{i}" for i in range(number))


def _check_labels(dataset: Dataset) -> None:
    labels = dataset.labels_per_example
    if labels != 1:
        raise UserError(
            f"{dataset.source}: clips have {labels or 'no'} labels, and probing needs one each; "
            "sort the clips into a folder for each class, or write a list of paths and labels"
        )


def _by_share(dataset: Dataset, share: float, seed: int) -> Sides:
    try:
        train, held = hold_out(dataset, share, seed)
    except UserError:  # a single clip of each class, or copies only
        return Sides(dataset, None, "no clip can be held out")
    return Sides(train, held, f"{share:.0%} of each class")

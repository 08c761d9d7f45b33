# SPDX-License-Identifier: Apache-2.0
"""The directory of a training run: its files, its lock, and what resuming checks."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.data.datasets.hold_out import write_list
from vivit_jax.data.settings import DataSettings
from vivit_jax.errors import UserError, WriteError, counted
from vivit_jax.files.addresses import Place, place
from vivit_jax.files.alone import alone
from vivit_jax.files.atomic import check_directory, write_json
from vivit_jax.files.json_files import read_json
from vivit_jax.files.staging import names_in
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.settings import from_dict, to_dict

logger = logging.getLogger(__name__)

RECIPE, MODEL, BAD_CLIPS = "recipe.json", "model.json", "bad_clips.json"
VALIDATION = "validation.json"  # what the best model answered: vivit_jax.train.pages.validation
TRAIN_LIST, HELD_OUT_LIST = "train.csv", "validation.csv"  # of a run that holds clips out itself
_BAD_CLIPS = {"training": "clips", "validation": "validation"}  # kind of videos: key
# Fields that may change on resume: none changes what a step computes, except by rounding.
CHANGEABLE = (
    "data.train",  # the batches check that the clips are the same
    "data.validation",
    "data.root",
    "data.class_names",
    "data.threads",
    "data.workers",
    "data.cache_gib",
    "data.cache_dir",
    "data.cache_dir_gib",
    "data.max_bad_share",
    "train.patience",
    "train.accumulate",  # a batch that fits many devices may not fit a few
    "train.steps",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
)
_SHOWN = 8  # fields in a message


class RunDirectory:
    """A directory that holds one run.

    Without `resume` it must be new or empty; with it, it must hold a run of `recipe`, except for
    CHANGEABLE fields. Raises UserError. Nothing is written before `begin`, so that a run that
    cannot be set up leaves no trace. The directory is locked from `begin` (with `resume` from the
    start) until `close`; `undo`, as the exit of a context within that, takes a new run back.
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool):
        self.path, self.model_file, self._recipe = path, path / MODEL, recipe
        self._first, self._resumed = jax.process_index() == 0, resume
        self._lock = contextlib.ExitStack()
        self._best: float | None = None  # score of the validation that is written
        self._made: list[Path] = []  # directories of a new run before its first step
        self._undoes = False  # whether an error takes back what was written
        held = path / RECIPE
        # Several processes do not probe an empty directory, or one might see another's probe.
        if resume or jax.process_count() == 1 or not os.path.isdir(path):
            check_directory(path, (RECIPE, MODEL))
        if resume:
            differs = differences(to_dict(saved_recipe(path)), to_dict(recipe))
            fixed = {name: both for name, both in differs.items() if name not in CHANGEABLE}
            if fixed:
                each = [f"{name} {a!r} there, {b!r} now" for name, (a, b) in fixed.items()]
                more = f"; and {len(each) - _SHOWN} more" if len(each) > _SHOWN else ""
                raise UserError(
                    f"{held} differs from this recipe: {'; '.join(each[:_SHOWN])}{more}; leave "
                    "these as they were, or train into another directory"
                )
            if self._first:  # read again at the next checkpoint and validation, hours later
                self._held_bad_clips()
                self._held_validation()
            self._hold()
        else:
            self._check_new()

    def _check_new(self) -> None:
        if (self.path / RECIPE).exists():
            raise UserError(
                f"--out {self.path} holds a run; continue it with --resume, or choose another "
                "directory"
            )
        if self.path.is_dir() and names_in(self.path):
            raise UserError(f"--out {self.path} is not empty; choose a new directory")

    def _hold(self) -> None:
        """Lock the directory, in the first process of a run; the lock ends with that process."""
        if not self._first:
            return
        if not self._lock.enter_context(alone(self.path)):
            self.close()
            raise UserError(
                f"--out {self.path}: another process is training into it; wait for its end, or "
                "choose another directory"
            )

    def close(self) -> None:
        """Unlock the directory."""
        self._lock.close()

    def begin(self, model: Mapping[str, Any] | None) -> None:
        """Write recipe.json, and model.json unless the run is resumed (`model` is None).

        `model` is a `vivit_jax.train.start.initial_model.description`.
        """
        if jax.process_count() > 1:  # none is to see what the first has just written
            sync_global_devices("the directory of the run is checked")
        if not self._first:
            return
        self._made = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._resumed:
            self._hold()
            self._check_new()  # another run may have begun during the setup
            self._undoes = True
        # Needed again if the run is killed before its first checkpoint.
        given = {"given": list(self._recipe.given)} if self._recipe.given else {}
        write_json(self.path / RECIPE, to_dict(self._recipe) | given)
        if model is not None:
            write_json(self.model_file, dict(model))

    def keep(self) -> None:
        """Say that a step was taken: from now on there is something to look at, and to resume."""
        self._undoes = False

    def undo(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Remove what a new run wrote if it ends by an error of this kind before its first step.

        A run that was killed or interrupted stays, as it can be resumed.
        """
        if not self._undoes or kind is None or not issubclass(kind, Exception):
            return
        # It was empty, and is locked.
        for name in names_in(self.path):
            each = self.path / name
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            else:
                each.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for each in self._made:
                each.rmdir()

    def write_lists(self, settings: DataSettings, train: Dataset, held_out: Dataset | None) -> None:
        """Write the clips that are trained on and those that are held out as two lists."""
        for name, dataset in ((TRAIN_LIST, train), (HELD_OUT_LIST, held_out)):
            if not self._first or dataset is None:
                return
            how = {"frame_name": settings.frame_name, "first_frame": settings.first_frame}
            try:
                write_list(self.path / name, dataset, labels=dataset.labels_per_example, **how)
            except WriteError:
                raise
            except UserError as error:
                logger.warning("the split is not written: %s", error)

    def write_bad_clips(
        self, states: Mapping[str, Any], validation: Mapping[str, str] | None = None
    ) -> None:
        """Write the clips that could not be read, from `Batches.state()` of all processes.

        `validation` is path -> why of the last validation; None (no validation yet) keeps what the
        file says.
        """
        if not self._first:
            return
        held = self._held_bad_clips()
        validation = dict(held.get("validation", {}) if validation is None else validation)
        found = {path: why for state in states.values() for path, why in state["bad"].items()}
        if not (found or validation or held):
            return
        values = {
            "read": sum(state["read"] for state in states.values()),
            "left_out": sum(state["left_out"] for state in states.values()),
            "clips": found,
            "validation": validation,
        }
        write_json(self.path / BAD_CLIPS, values)

    def write_validation(
        self, step: int, score: float, record: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Write what became of the held-out clips, unless an earlier step had a better score."""
        if not self._first or not math.isfinite(score):
            return
        path = self.path / VALIDATION
        if self._best is None and (held := self._held_validation()):
            known = isinstance(held.get("step"), int) and isinstance(held.get("score"), float)
            # Later steps are of before a resume from an earlier one.
            self._best = held["score"] if known and held["step"] <= step else None
        if self._best is None or score >= self._best:
            self._best = score
            write_json(path, {"step": step, "score": score, **record()})

    def _held_validation(self) -> dict[str, Any]:
        """The contents of validation.json, {} if there is none. UserError if it is no JSON."""
        path = self.path / VALIDATION
        found = read_json(path, hint="remove it") if path.exists() else {}
        return found if isinstance(found, dict) else {}

    def _held_bad_clips(self) -> dict[str, Any]:
        """The contents of bad_clips.json, {} if there is none. UserError if it was changed."""
        path = self.path / BAD_CLIPS
        found = read_json(path, hint="remove it") if path.exists() else {}
        sound = isinstance(found, dict)
        if not sound or not all(isinstance(found.get(n, {}), dict) for n in _BAD_CLIPS.values()):
            raise UserError(f"{path} has changed since it was written; remove it")
        return found

    def bad_clips(self) -> str:
        """The number of clips that could not be read, in words; "" if all could."""
        found = self._held_bad_clips()
        counts = {kind: len(found.get(name, {})) for kind, name in _BAD_CLIPS.items()}
        return " and ".join(
            f"{counted(count, 'clip')} of {kind}" for kind, count in counts.items() if count
        )


def resumes(path: str | Path | Place, resume: bool | int | str) -> bool:
    """Whether a run is continued: with "auto", if the directory holds one. Raises UserError."""
    if not isinstance(resume, bool) and resume != "auto":
        raise UserError(f"resume is {resume!r}; expected True, False or 'auto'")
    return (place(path) / RECIPE).exists() if resume == "auto" else bool(resume)


def saved_recipe(path: Place) -> Recipe:
    """The recipe of the run in a directory. UserError if there is none."""
    file = path / RECIPE
    if not file.is_file():
        raise UserError(f"{path} holds no run to resume: there is no {RECIPE} in it")
    hint = "restore it as it was written"
    values = read_json(file, hint=hint)
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{file}: {error}; {hint}") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """name -> (old, new) of the fields that differ between two recipes, given as dicts."""
    found = {}
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[f"{prefix}{name}"] = (a, b)
    return found

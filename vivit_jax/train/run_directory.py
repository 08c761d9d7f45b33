# SPDX-License-Identifier: Apache-2.0
"""The directory of a training run: what is in it, who may write to it, and how one goes on."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

from vivit_jax.errors import UserError
from vivit_jax.files.atomic import check_directory, write_json
from vivit_jax.files.json_files import read_json
from vivit_jax.files.staging import names_in
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.settings import from_dict, to_dict

logger = logging.getLogger(__name__)

RECIPE, MODEL, BAD_CLIPS = "recipe.json", "model.json", "bad_clips.json"
_BAD_CLIPS = {"training": "clips", "validation": "validation"}  # of which videos, by key
# What a run that goes on may have otherwise: nothing of it changes what a step computes, but for
# rounding in float32.
CHANGEABLE = (
    "data.train",  # that the clips are the same is seen when they are listed
    "data.validation",
    "data.root",
    "data.threads",
    "data.workers",
    "data.cache_gib",
    "data.max_bad_share",
    "train.accumulate",  # what fits on many devices may not fit on few
    "train.steps",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
)
_SHOWN = 8  # fields in a message


class RunDirectory:
    """A directory that holds one run: `recipe.json` first, and what the parts of a run write.

    Without `resume` it must be new or empty; with it, it must hold a run of `recipe`, but for
    CHANGEABLE. Raises UserError. Nothing is written before `begin`, so that a run that cannot be
    set up leaves no trace. From then on, or with `resume` from the start, and until `close` the
    directory is this process's alone.
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool):
        self.path, self.model_file, self._recipe = path, path / MODEL, recipe
        self._first, self._resumed = jax.process_index() == 0, resume
        self._lock: int | None = None
        held = path / RECIPE
        # Else one of several processes might see what another tries in a directory that is empty.
        if resume or jax.process_count() == 1 or not os.path.isdir(path):
            check_directory(path, (RECIPE, MODEL))
        if resume:
            differs = differences(to_dict(saved_recipe(path)), to_dict(recipe))
            fixed = {name: both for name, both in differs.items() if name not in CHANGEABLE}
            if fixed:
                each = [f"{name} {a!r} there, {b!r} now" for name, (a, b) in fixed.items()]
                more = f"; and {len(each) - _SHOWN} more" if len(each) > _SHOWN else ""
                raise UserError(
                    f"{held} is of another recipe: {'; '.join(each[:_SHOWN])}{more}; leave these "
                    "as they were, or train into another directory"
                )
            self._hold()
        else:
            self._check_new()

    def _check_new(self) -> None:
        if (self.path / RECIPE).exists():
            raise UserError(
                f"--out {self.path} holds a run; go on with it by --resume, or choose another "
                "directory"
            )
        if self.path.is_dir() and names_in(self.path):
            raise UserError(f"--out {self.path} is not empty; choose a new directory")

    def _hold(self) -> None:
        """Lock the directory, of all processes of a run by the first; the lock ends with it."""
        if not self._first:
            return
        try:
            import fcntl
        except ImportError:  # Windows
            logger.warning(
                "--out %s: %s cannot lock a directory; let no other process train into it",
                self.path,
                sys.platform,
            )
            return
        lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"--out {self.path}: another process is training into it; wait for its end, or "
                "choose another directory"
            ) from None
        self._lock = lock

    def close(self) -> None:
        """Leave the directory to others."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, model: Mapping[str, Any] | None) -> None:
        """Write down the recipe, and what the model is, but for a run that goes on (None).

        `model` is a `vivit_jax.train.initial_model.description`.
        """
        _together(f"checked {self.path}")
        if not self._first:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._resumed:
            self._hold()
            self._check_new()  # another run may have begun while this one was set up
        # What is given decides again where the run is killed before its first checkpoint.
        given = {"given": list(self._recipe.given)} if self._recipe.given else {}
        write_json(self.path / RECIPE, to_dict(self._recipe) | given)
        if model is not None:
            write_json(self.model_file, model)

    def write_bad_clips(
        self, states: Mapping[str, Any], validation: Mapping[str, str] | None = None
    ) -> None:
        """Name the clips that could not be read, of all processes' `Batches.state()`.

        `validation` is path -> why of the last validation, None where there was none yet: then what
        the file says of one before stays.
        """
        if not self._first:
            return
        held = self._held_bad_clips()
        if validation is None:
            validation = held.get("validation", {})
        found = {path: why for state in states.values() for path, why in state["bad"].items()}
        if not (found or validation or held):
            return
        values = {
            "read": sum(state["read"] for state in states.values()),
            "left_out": sum(state["left_out"] for state in states.values()),
            "clips": found,
            "validation": dict(validation),
        }
        write_json(self.path / BAD_CLIPS, values)

    def _held_bad_clips(self) -> dict[str, Any]:
        """What the file of bad clips says, {} if there is none; UserError if it was changed."""
        path = self.path / BAD_CLIPS
        found = read_json(path, hint="remove it") if path.exists() else {}
        sound = isinstance(found, dict)
        if not sound or not all(isinstance(found.get(n, {}), dict) for n in _BAD_CLIPS.values()):
            raise UserError(f"{path} is not as it was written; remove it")
        return found

    def bad_clips(self) -> str:
        """How many clips could not be read, in words; "" where all could."""
        found = self._held_bad_clips()
        counts = {f"of {of}": found.get(name, {}) for of, name in _BAD_CLIPS.items()}
        named = lambda count: f"{count} clip{'s' if count > 1 else ''}"  # noqa: E731
        return " and ".join(f"{named(len(each))} {of}" for of, each in counts.items() if each)


def saved_recipe(path: Path) -> Recipe:
    """The recipe of the run in a directory. UserError where there is none."""
    file = path / RECIPE
    if not file.is_file():
        raise UserError(f"{path} holds no run to go on with: there is no {RECIPE} in it")
    return from_dict(read_json(file, hint="put it back as it was written"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """name -> (old, new) of the fields in which two recipes, as dicts, differ."""
    found = {}
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[f"{prefix}{name}"] = (a, b)
    return found


def _together(what: str) -> None:
    """Wait until all processes are here, so that none looks at what another has just written."""
    if jax.process_count() > 1:
        sync_global_devices(what)

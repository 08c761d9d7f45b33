# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: its whole state by Orbax, and its model as a HuggingFace directory."""

import contextlib
import datetime
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vivit_jax.errors import CheckpointError, UserError, WriteError, first_line
from vivit_jax.files.addresses import Place
from vivit_jax.files.atomic import writing
from vivit_jax.files.json_files import read_json
from vivit_jax.files.staging import clear_leftovers
from vivit_jax.train.processes.first import of_first
from vivit_jax.train.storage.checksums import damage, handlers
from vivit_jax.train.storage.stored_state import (
    check_state,
    flat,
    from_arrays,
    storage,
    to_arrays,
)

logger = logging.getLogger(__name__)
_DROPPED = "dropped"
_UNFINISHED = re.compile(r".*\.orbax-checkpoint-tmp.*")
_MODEL = re.compile(r"\d+")


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that does not hold what was written."""


class UnwrittenCheckpoint(CheckpointError, WriteError):
    """A checkpoint that could not be written; earlier ones are intact."""


class Checkpoints:
    """The checkpoints in directory/checkpoints/<step>, and models in directory/models/<step>.

    Keeps the last `keep` checkpoints and the one with the highest score (the latest of equal ones).
    A checkpoint exists whole or not at all, whenever the process is killed. Nothing on disk changes
    before the first `save`, since until then another process may be writing to the directory. The
    first save removes what a killed run left behind: unfinished checkpoints, and models without a
    checkpoint. Each checkpoint has checksums, which are compared when it is restored.

    Every process of a run calls every method. `asynchronous` saves write while training continues;
    the next call raises their errors. `directory` is on a file system that all processes share.
    With `alone` the first process alone calls methods, with numpy arrays:
    `vivit_jax.train.storage.gathered_checkpoints`. Messages name `place` where it is given: the
    store that the directory is copied to.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        asynchronous: bool = True,
        alone: bool = False,
        place: Place | None = None,
    ):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise UserError(f"keep is {keep}; expected to keep 1 or more checkpoints")
        directory = Path(directory).resolve()
        self._checkpoints, self._models = directory / "checkpoints", directory / "models"
        self._place = place or directory
        self._saved = False
        self._scores: dict[int, float | None] = {}
        self._pending = -1  # the step that is being written
        self._rewound: int | None = None
        self._steps_named = _names()
        # Without this Orbax does not know what a checkpoint of another process holds.
        known = ocp.handlers.DefaultCheckpointHandlerRegistry()
        self._of_first = _called if alone else of_first
        processes = ocp.options.MultiprocessingOptions(
            active_processes={0} if alone else None,
            barrier_sync_key_prefix="first" if alone else None,
        )
        self._arrays, plain = handlers(processes)
        known.add("state", ocp.args.StandardSave, self._arrays)
        known.add("run", ocp.args.JsonSave, plain)
        self._manager = ocp.CheckpointManager(
            self._checkpoints,
            handler_registry=known,
            options=ocp.CheckpointManagerOptions(
                create=False,
                enable_async_checkpointing=asynchronous,
                preservation_policy=_LastAndBest(keep, self._scores),
                step_name_format=self._steps_named,
                # Renamed before deletion: a half-deleted directory would pass for a checkpoint.
                todelete_subdir=_DROPPED,
                multiprocessing_options=processes,
            ),
        )
        steps = self._manager.all_steps()
        for step in steps:
            try:
                self._scores[step] = _score(self._run(step)["metrics"])
            except DamagedCheckpoint as error:
                self._scores[step] = None
                if step != max(steps):  # `restore` reports the latest
                    _warn(f"{error}; the score of step {step} is not known")

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        """Save a tree of jax arrays, which may hold typed PRNG keys, and plain JSON `data`.

        The arrays may be donated as soon as this returns. The checkpoint with the highest finite
        `metrics["score"]` is the best. The process that passes `export(path)` writes the model of
        this step with it, whole or not at all; it is called first, so that a checkpoint never lacks
        its model. Raises UserError for a step that is not after the latest, and for values that
        cannot be stored.
        """
        self.save_arrays(step, *to_arrays(state), data, metrics, export)

    def save_arrays(
        self,
        step: int,
        arrays: Mapping[str, Any],
        keys: Mapping[str, str],
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        """Save what `to_arrays` returns of a tree, like `save`."""
        import orbax.checkpoint as ocp

        latest = self.latest()
        if latest is not None and step <= latest:
            raise UserError(
                f"{self._named()} has a checkpoint of step {latest}, and step {step} is not "
                "after it; remove the later ones, or train into another directory"
            )
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        run = {"data": data, "metrics": finite, "keys": keys, "checksums": True}
        try:
            # Also copies it: the caller may update its counts while this is written.
            run = json.loads(json.dumps(run, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"data of step {step} is not plain JSON: {error}") from error
        self._saved = True
        self._drop_later()
        self._tidy()
        self.write_model(step, export)
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._scores[step] = _score(finite)
        saved: Any = dict(arrays)
        args = ocp.args.Composite(state=ocp.args.StandardSave(saved), run=ocp.args.JsonSave(run))
        self._pending = step
        try:
            with self._writing():
                # By force, or Orbax decides whether a save is due.
                self._manager.save(step, args=args, force=True)
        except KeyboardInterrupt:
            self._saved = False  # Orbax's threads keep writing, so nothing may be tidied
            raise

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order, after waiting for the last save."""
        with self._writing():
            self._manager.wait_until_finished()
        return sorted(step for step in self._manager.all_steps() if not self._is_later(step))

    def latest(self) -> int | None:
        """The last step that has a checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest score, the latest of equal ones; None if none has a score."""
        return _best(self.steps(), self._scores)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that a step was saved with; {} without a validation."""
        return {n: v for n, v in self._run(step)["metrics"].items() if v is not None}

    def check_step(self, step: int) -> None:
        """Raises UserError if a step has no checkpoint."""
        steps = self.steps()
        if step not in steps:
            raise UserError(
                f"{self._named()} holds no checkpoint of step {step}; it has "
                + (", ".join(map(str, steps)) or "none")
            )

    def rewind(self, step: int) -> None:
        """Continue from `step`: later checkpoints no longer count, and the next save removes them.

        A warning names them.
        """
        later = [each for each in self.steps() if each > step]
        self._rewound = step
        if later:
            _warn(
                f"resuming from step {step}: the next checkpoint replaces the later "
                f"{', '.join(map(str, later))} in {self._named()}"
            )

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any], int]:
        """(state, data, step) of a checkpoint, by default the latest that is not damaged.

        `abstract_state` is a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings of any
        mesh. A warning names each damaged checkpoint that is skipped. Raises UserError if there is
        no such checkpoint or if it differs from the state, naming the paths; DamagedCheckpoint if
        `step`, or every checkpoint, is damaged.
        """
        arrays, run, found = self.restore_arrays(abstract_state, step)
        return from_arrays(abstract_state, arrays, run["keys"]), run["data"], found

    def restore_arrays(
        self, abstract_state: Any, step: int | None = None, *, in_memory: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any], int]:
        """(arrays, run, step) of a checkpoint, like `restore`, for `from_arrays`.

        `run` has its `data` and `keys`. The arrays are jax's on the devices of their shardings,
        or numpy's `in_memory`.
        """
        steps = self.steps()
        if step is None and not steps:
            raise UserError(f"{self._named()} holds no checkpoint; start a new run")
        if step is not None:
            self.check_step(step)
        for each in (step,) if step is not None else reversed(steps):
            try:
                return *self._restored(abstract_state, each, in_memory), each
            except DamagedCheckpoint as error:
                if step is not None:
                    others = ", ".join(str(s) for s in steps if s != step) or "none"
                    raise DamagedCheckpoint(f"{error}; other steps there: {others}") from error
                _warn(str(error))
        raise DamagedCheckpoint(
            f"{self._named()}: all checkpoints are damaged ({', '.join(map(str, steps))}); "
            "start a new run in another directory"
        )

    def _restored(
        self, abstract_state: Any, step: int, in_memory: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        import orbax.checkpoint as ocp

        where = self._checkpoints / str(step)
        self._check_sums(step)
        run = self._run(step)
        wanted = flat(abstract_state)
        try:
            stored = self._arrays.metadata(where / "state").tree
            stored = {path: stored[path] for path in stored}
        except _DAMAGE as error:
            raise self._damaged(step, error) from error
        check_state(stored, run["keys"], wanted, where)
        target: dict[str, Any] = {path: storage(leaf) for path, leaf in wanted.items()}
        if in_memory:
            target = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in target.items()}
        args = ocp.args.StandardRestore(target)
        try:
            arrays = self._arrays.restore(where / "state", args=args)
        except _DAMAGE as error:
            raise self._damaged(step, error) from error
        return arrays, run

    def _check_sums(self, step: int) -> None:
        """Raises DamagedCheckpoint in all processes if the first finds changed files."""
        name = f"{step}/_CHECKPOINT_METADATA"
        if not _is_object(self._checkpoints / name):
            where = self._named() / name
            _warn(f"{where} is damaged; resuming from step {step} does not need it")
        found, unknown = self._of_first(lambda: self._damage(step))
        if found:
            raise self._damaged(step, found)
        if unknown:
            if self._run(step).get("checksums"):
                raise self._damaged(step, "its checksums.json is missing")
            _warn(f"{self._named(step)} has no checksums; damage in it goes unnoticed")

    def _damage(self, step: int) -> tuple[str | None, bool]:
        """How a checkpoint differs from what was written, and whether that is not known."""
        found, unknown = None, False
        for part in ("run", "state"):
            try:
                found = found or damage(self._checkpoints / str(step) / part)
            except FileNotFoundError:
                unknown = True
        return found, unknown

    def wait(self) -> None:
        """Return once every save is on disk and every dropped checkpoint is removed."""
        with self._writing():
            self._manager.wait_until_finished()
        if self._saved:
            self._tidy()

    def close(self) -> None:
        """Waits, and stops the threads that save."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of Orbax's threads into one UnwrittenCheckpoint that names the step."""
        try:
            yield
        except Exception as error:  # file systems' libraries raise errors of any kind
            # Orbax forgets the step, although it may have been written and only the removal of an
            # older one failed.
            self._manager.reload()
            there = self._pending in self._manager.all_steps()
            if not there:
                self._scores.pop(self._pending, None)
            if self._saved:
                with contextlib.suppress(OSError):
                    self._tidy()
            what = (
                f"step {self._pending} is in {self._named()}, but what it replaces could not "
                "be removed"
                if there
                else f"a checkpoint of step {self._pending} could not be written to {self._named()}"
            )
            raise UnwrittenCheckpoint(
                f"{what}: {first_line(error)}; the checkpoints that are there are whole: fix the "
                "cause, such as a full disk, and continue with --resume"
            ) from error

    def lacks_model(self, step: int) -> bool:
        """Whether a checkpoint's model is missing, with a warning; all processes agree."""
        gone = self._of_first(lambda: not (self._models / str(step)).is_dir())
        if gone:
            where = self._place / "models" / str(step)
            _warn(f"{where} is gone; it is written again from the checkpoint")
        return gone

    def write_model(self, step: int, export: Callable[[Path], None] | None) -> None:
        """Write the model of a step; an error ends all processes, not just one."""

        def write() -> None:
            if export is not None:
                with writing(self._models):
                    self._models.mkdir(parents=True, exist_ok=True)
                export(self._models / str(step))

        self._of_first(write)

    def _is_later(self, step: int) -> bool:
        """Whether a step is later than the one the run was rewound to."""
        return self._rewound is not None and step > self._rewound

    def _drop_later(self) -> None:
        """Remove the checkpoints later than the one the run was rewound to."""
        later = [step for step in self._manager.all_steps() if self._is_later(step)]
        with self._writing():
            for step in later:
                self._manager.delete(step)
                self._scores.pop(step, None)
        self._rewound = None

    def _run(self, step: int) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        path = self._checkpoints / str(step) / "run" / "metadata"
        try:
            run = read_json(path)
            for name in ("data", "metrics", "keys"):
                if not isinstance(run[name], dict):
                    raise TypeError(f"run/metadata holds no {name}")
            return run
        except _DAMAGE as error:
            raise self._damaged(step, error) from error

    def _named(self, step: int | None = None) -> Place:
        """The directory of all checkpoints, or of one, as messages have it."""
        found = self._place / "checkpoints"
        return found if step is None else found / str(step)

    def _damaged(self, step: int, error: Exception | str) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            f"the checkpoint of step {step}, {self._named(step)}, is damaged: {first_line(error)}"
        )

    def _tidy(self) -> None:
        """Remove leftovers; only called while nothing is being saved."""
        if jax.process_index():
            return
        leftovers = [self._checkpoints / _DROPPED]
        if self._checkpoints.is_dir():
            leftovers += [p for p in self._checkpoints.iterdir() if _UNFINISHED.fullmatch(p.name)]
        if self._models.is_dir():
            clear_leftovers(self._models)
            # Read from the disk, since Orbax forgets a step if removing an older one fails.
            kept = {str(found.step) for found in self._steps_named.find_all(self._checkpoints)}
            leftovers += [
                path
                for path in self._models.iterdir()
                if _MODEL.fullmatch(path.name) and path.name not in kept
            ]
        for path in leftovers:
            if path.exists():
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a directory that the threads of a failed save may still be writing to."""
    for seconds in (0.1, 0.4, 1.5):
        try:
            return shutil.rmtree(path)
        except OSError:
            time.sleep(seconds)
    shutil.rmtree(path)


class _LastAndBest:
    """Orbax's policy: keep the last `keep` checkpoints and the best."""

    def __init__(self, keep: int, scores: Mapping[int, float | None]):
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self._keep :], _best(steps, self._scores)}
        return [step in kept for step in steps]


# What Orbax and TensorStore raise for missing, truncated or changed files.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        logger.warning("%s", text)


def _called(call: Callable[[], Any]) -> Any:
    return call()


def _is_object(path: Path) -> bool:
    """Whether a file holds a JSON object."""
    try:
        return isinstance(read_json(path), dict)
    except (OSError, ValueError):
        return False


def _names() -> Any:
    """Orbax's names of steps, without reading _CHECKPOINT_METADATA, which may be damaged."""
    import orbax.checkpoint as ocp

    plain = ocp.path.step.standard_name_format()

    class Step(ocp.path.step.Metadata):
        @property
        def commit_timestamp(self):
            return datetime.datetime.fromtimestamp(self.path.stat().mtime, tz=datetime.UTC)

    class Names(ocp.path.step.NameFormat):
        def build_name(self, step):
            return plain.build_name(step)

        def find_all(self, base_path):
            return (Step(found.step, found.path) for found in plain.find_all(base_path))

        def find_step(self, base_path, step):
            found = plain.find_step(base_path, step)
            return Step(found.step, found.path)

    return Names()


def _score(metrics: Mapping[str, float | None]) -> float | None:
    return metrics.get("score")


def _best(steps: Sequence[int], scores: Mapping[int, float | None]) -> int | None:
    scored = [(scores[step], step) for step in steps if scores.get(step) is not None]
    return max(scored)[1] if scored else None

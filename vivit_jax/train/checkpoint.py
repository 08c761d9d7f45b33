# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: its whole state through Orbax, and its model as a HuggingFace directory."""

import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vivit_jax.errors import CheckpointError, UserError, first_line

_DROPPED = "dropped"
_UNFINISHED = re.compile(r".*\.orbax-checkpoint-tmp.*")
# A model's directory, or what its writer leaves beside it when it is killed.
_MODEL = re.compile(r"(\d+)|\.(\d+)\.[0-9a-f]+\.(?:new|old)")
_SHOWN = 8  # paths in a message


class Checkpoints:
    """The checkpoints in directory/checkpoints/<step>, and models in directory/models/<step>.

    The last `keep` are kept, and the one of the highest score (of equal ones the latest). Each is
    there whole or not at all, whenever the process is killed. Nothing on disk changes before the
    first `save`: until then another process may be writing to the directory. That first save
    removes what a killed run left behind: unfinished checkpoints, and models of steps that have
    none.

    All processes of a run call every method alike. `asynchronous` saves write while training goes
    on; an error of theirs is raised by the next call. `directory` is a path of a file system that
    all processes share.
    """

    def __init__(self, directory: str | Path, *, keep: int, asynchronous: bool = True):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise UserError(f"keep is {keep}; expected 1 or more last checkpoints")
        directory = Path(directory).resolve()
        self._checkpoints, self._models = directory / "checkpoints", directory / "models"
        self._saved = False
        self._scores: dict[int, float | None] = {}
        # Else Orbax cannot tell what a checkpoint that another process saved holds.
        known = ocp.handlers.DefaultCheckpointHandlerRegistry()
        arrays, plain = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        for name, args, handler in (
            ("state", ocp.args.StandardSave, arrays),
            ("state", ocp.args.StandardRestore, arrays),
            ("run", ocp.args.JsonSave, plain),
            ("run", ocp.args.JsonRestore, plain),
        ):
            known.add(name, args, handler)
        self._manager = ocp.CheckpointManager(
            self._checkpoints,
            handler_registry=known,
            options=ocp.CheckpointManagerOptions(
                create=False,
                enable_async_checkpointing=asynchronous,
                preservation_policy=_LastAndBest(keep, self._scores),
                # Moved there in one go: a directory being deleted would pass for a checkpoint.
                todelete_subdir=_DROPPED,
            ),
        )
        for step in self._manager.all_steps():
            self._scores[step] = _score(self._run(step)["metrics"])

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        """Save a tree of jax arrays, typed PRNG keys included, and plain JSON `data`.

        The arrays may be donated as soon as this returns. `metrics["score"]`, higher is better and
        ignored if not finite, decides which checkpoint is the best. `export(path)`, in the process
        that passes one, writes the model of this step to `path`, whole or not at all; it is called
        first, so that a checkpoint never lacks its model. Raises UserError for a step that is not
        after the latest, and for what cannot be stored.
        """
        import orbax.checkpoint as ocp

        latest = self.latest()
        if latest is not None and step <= latest:
            raise UserError(
                f"{self._checkpoints} has a checkpoint of step {latest}, and step {step} is not "
                "after it; remove the later ones, or train into another directory"
            )
        arrays, keys = _to_arrays(state)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        run = {"data": data, "metrics": finite, "keys": keys}
        try:
            # A copy too: the caller may go on with its counts while this is written.
            run = json.loads(json.dumps(run, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"data of step {step} is not plain JSON: {error}") from error
        self._saved = True
        self._tidy()
        if export is not None:
            self._models.mkdir(parents=True, exist_ok=True)
            export(self._models / str(step))
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._scores[step] = _score(finite)
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), run=ocp.args.JsonSave(run))
        try:
            with self._writing():
                # By force, else Orbax decides whether it is time.
                self._manager.save(step, args=args, force=True)
        except KeyboardInterrupt:
            self._saved = False  # Orbax's threads go on with what they began: nothing is tidied
            raise

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, in order, after waiting for the last save."""
        with self._writing():
            self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last step there is a checkpoint of, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the highest score, the latest of equal ones; None if none has a score."""
        return _best(self.steps(), self._scores)

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any], int]:
        """(state, data, step) of a checkpoint, by default the latest.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` with shardings, of any mesh and number
        of devices, or of arrays. Raises UserError if there is no such checkpoint, or naming the
        paths that the checkpoint has otherwise than the state, CheckpointError if it is damaged.
        """
        import orbax.checkpoint as ocp

        steps = self.steps()
        if step is None and not steps:
            raise UserError(f"{self._checkpoints} holds no checkpoint; start the run anew")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(
                f"{self._checkpoints} holds no checkpoint of step {step}; it has "
                + (", ".join(map(str, steps)) or "none")
            )
        run = self._run(step)
        wanted = _flat(abstract_state)
        try:
            stored = self._manager.item_metadata(step)["state"]
        except _DAMAGE as error:
            raise self._damaged(step, error) from error
        if stored is None:
            raise self._damaged(step, "it does not say what it holds")
        _check(stored.tree, run["keys"], wanted, self._checkpoints / str(step))
        target = {path: _storage(leaf) for path, leaf in wanted.items()}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        try:
            arrays = self._manager.restore(step, args=args)["state"]
        except _DAMAGE as error:
            raise self._damaged(step, error) from error
        leaves = [
            jax.random.wrap_key_data(arrays[path], impl=run["keys"][path])
            if path in run["keys"]
            else arrays[path]
            for path in wanted
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), run["data"], step

    def wait(self) -> None:
        """Return once everything that was saved is on disk, and what was dropped is not."""
        with self._writing():
            self._manager.wait_until_finished()
        if self._saved:
            self._tidy()

    def close(self) -> None:
        """`wait`, and stop the threads that save."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong in Orbax's threads, as one CheckpointError."""
        try:
            yield
        except Exception as error:  # of any kind: it comes from the file system's library
            raise CheckpointError(
                f"a checkpoint could not be written to {self._checkpoints}: {first_line(error)}; "
                "those that are there are whole: mend what it says, such as a full disk, and go on "
                "with --resume"
            ) from error

    def _run(self, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        try:
            args = ocp.args.Composite(run=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["run"]
        except _DAMAGE as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception | str) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoints / str(step)} cannot be read: {first_line(error)}; move it away to "
            "go on from an earlier checkpoint"
        )

    def _tidy(self) -> None:
        """Remove what no longer belongs; only while nothing is being saved."""
        if jax.process_index():
            return
        leftovers = [self._checkpoints / _DROPPED]
        if self._checkpoints.is_dir():
            leftovers += [p for p in self._checkpoints.iterdir() if _UNFINISHED.fullmatch(p.name)]
        if self._models.is_dir():
            kept = {str(step) for step in self._manager.all_steps()}
            leftovers += [
                path
                for path in self._models.iterdir()
                if _MODEL.fullmatch(path.name) and path.name not in kept
            ]
        for path in leftovers:
            if path.exists():
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a directory into which threads of a save that failed may still write for a moment."""
    for seconds in (0.1, 0.4, 1.5):
        try:
            return shutil.rmtree(path)
        except OSError:
            time.sleep(seconds)
    shutil.rmtree(path)


class _LastAndBest:
    """Which checkpoints Orbax keeps: the last `keep` and the best."""

    def __init__(self, keep: int, scores: Mapping[int, float | None]):
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self._keep :], _best(steps, self._scores)}
        return [step in kept for step in steps]


# What Orbax raises for files that are missing, cut off or changed.
_DAMAGE = (OSError, ValueError, KeyError)


def _score(metrics: Mapping[str, float | None]) -> float | None:
    return metrics.get("score")


def _best(steps: Sequence[int], scores: Mapping[int, float | None]) -> int | None:
    scored = [(scores[step], step) for step in steps if scores.get(step) is not None]
    return max(scored)[1] if scored else None


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by '/'-joined path."""
    leaves = jax.tree.leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise UserError("two leaves of the state have the same path; rename one")
    return flat


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_arrays(state: Any) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The state's leaves by path, keys as their data, and the kind of generator of each key."""
    flat = _flat(state)
    for path, leaf in flat.items():
        if not isinstance(leaf, jax.Array) or not leaf.size:
            raise UserError(
                f"state {path!r} is {type(leaf).__name__} {getattr(leaf, 'shape', '')}; expected a "
                "jax.Array that is not empty"
            )
    keys = {path: jax.random.key_impl(leaf) for path, leaf in flat.items() if _is_key(leaf)}
    return flat | {path: jax.random.key_data(flat[path]) for path in keys}, keys


def _storage(leaf: Any) -> jax.ShapeDtypeStruct:
    """What is stored of a leaf: a key's data, anything else as it is."""
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        struct = jax.eval_shape(jax.random.key_data, struct)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=leaf.sharding)


def _check(
    stored: Mapping[str, Any], keys: Mapping[str, str], wanted: Mapping[str, Any], where: Path
) -> None:
    """UserError unless the checkpoint has the paths, shapes and dtypes of the state."""
    unsharded = [path for path, leaf in wanted.items() if leaf.sharding is None]
    if unsharded:
        raise UserError(
            f"restore needs a sharding for every array; {_some(unsharded)} of the state has none"
        )
    for leaf in wanted.values():
        leaf.sharding.shard_shape(leaf.shape)  # else its ValueError would pass for damage
    differs = []
    for path in wanted.keys() & stored.keys():
        has, needs = _storage_text(stored[path], keys.get(path)), _text(wanted[path])
        if has != needs:
            differs.append(f"{path} ({has} there, {needs} here)")
    kinds = {
        "not in the checkpoint": sorted(wanted.keys() - stored.keys()),
        "only in the checkpoint": sorted(stored.keys() - wanted.keys()),
        "different": sorted(differs),
    }
    problems = [f"{title}: {_some(paths)}" for title, paths in kinds.items() if paths]
    if problems:
        raise UserError(
            f"{where} is of another training state; {'; '.join(problems)}. Resume with the recipe "
            "that the run was started with"
        )


def _text(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _storage_text(leaf: Any, impl: str | None) -> str:
    if impl is None:
        return _text(leaf)
    dtype = jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
    return f"{dtype}{list(leaf.shape[:-1])}"


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more

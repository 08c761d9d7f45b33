# SPDX-License-Identifier: Apache-2.0
"""Runs whose directory is in an object store: trained in a directory here, copied there.

Objects cannot be renamed or appended to, which checkpoints and metrics.jsonl need. So a run has a
directory on its machine, and the first process copies what is new at each checkpoint, while
training goes on, and at the end: first the small files, then the model, then the checkpoint, whose
last object, uploaded.json, names the others with their sizes. A checkpoint without it, or with
other sizes, does not count. Resuming copies the small files back, which each process reads in a
directory of its own, and to the first process's machine the checkpoints.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from vivit_jax.errors import StorageError, UserError
from vivit_jax.files import storage
from vivit_jax.files.addresses import Address, Place, place
from vivit_jax.files.alone import alone
from vivit_jax.files.json_files import parse_json
from vivit_jax.train.processes.first import of_first
from vivit_jax.train.storage.checkpoint import Checkpoints
from vivit_jax.train.storage.gathered_checkpoints import GatheredCheckpoints
from vivit_jax.train.storage.lease import OWNER, Lease, leased
from vivit_jax.train.storage.run_directory import RECIPE

logger = logging.getLogger(__name__)

UPLOADED = "uploaded.json"
_STEP = re.compile(r"(checkpoints|models)/(\d+)/(.+)")
_AT_ONCE = 8  # objects


class RunStore:
    """Where a run is kept: `place`, and the directory `path` on this machine that it is written to.

    For a local path both are the same, all processes see it, and the methods do nothing. Every
    process of a run calls every method.
    """

    is_remote = False

    def __init__(self, out: Place, path: Path):
        self.place, self.path = out, path

    def settle(self) -> None:
        """Return once what is being copied is there."""

    def publish(self) -> None:
        """Copy what is new, in the background."""

    def finish(self) -> None:
        """Copy what is new, and return once it is there."""

    def checkpoints(self, *, keep: int) -> Checkpoints | GatheredCheckpoints:
        """The run's checkpoints in `path`."""
        apart = self.is_remote and jax.process_count() > 1
        kind = GatheredCheckpoints if apart else Checkpoints
        return kind(self.path, keep=keep, place=self.place)


@contextlib.contextmanager
def run_store(out: str | Path | Place, *, resume: bool) -> Iterator[RunStore]:
    """The place of a run, with what is there where it is resumed.

    Raises UserError, before anything is written, if the place cannot be written to, holds a run
    that is not to be resumed, holds none that is, or if another run is training into it. Errors of
    the block name the place.
    """
    where = place(out)
    if isinstance(where, Path):
        yield RunStore(where, where)
        return
    path = _scratch(where)
    first, leases = jax.process_index() == 0, list[Lease]()
    with contextlib.ExitStack() as stack:
        if not first:
            stack.enter_context(_alone(where, path))

        def check() -> None:
            stack.enter_context(_alone(where, path))
            storage.check_writable(str(where), "--out")
            check_new(where, resume)
            leases.append(stack.enter_context(leased(where)))
            check_new(where, resume)  # again: its former owner may have written meanwhile

        of_first(check)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700, parents=True)
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        held = _pull(where, path, checkpoints=first) if resume else {}
        store = _Uploads(where, path, held, leases[0] if first else None)
        stack.callback(store.close)
        try:
            yield store
        except UserError as error:
            if str(path) not in str(error):
                raise
            raise type(error)(str(error).replace(str(path), str(where))) from error


def check_new(where: Address, resume: bool) -> None:
    """UserError unless an address holds a run to resume, or nothing."""
    if resume:
        if not (where / RECIPE).is_file():
            raise UserError(f"{where} holds no run to resume: there is no {RECIPE} in it")
    elif (where / RECIPE).is_file():
        raise UserError(
            f"--out {where} holds a run; continue it with --resume, or choose another directory"
        )
    elif where.is_dir() and {entry.name for entry in storage.entries(str(where))} - {OWNER}:
        raise UserError(f"--out {where} is not empty; choose a new directory")


class _Uploads(RunStore):
    is_remote = True

    def __init__(
        self,
        where: Address,
        path: Path,
        held: dict[str, tuple[int, ...]],
        lease: Lease | None,  # of the first process
    ):
        super().__init__(where, path)
        self.where, self._lease = where, lease
        # Directories of steps that are there, with what was here when they were copied.
        self._held = held
        self._pool = ThreadPoolExecutor(1, "upload")
        self._pending: Future | None = None

    def settle(self) -> None:
        of_first(self._settle)

    def publish(self) -> None:
        def begin() -> None:
            self._settle()
            # What the next steps append to is copied as it is now.
            self._pending = self._pool.submit(self._copy, self._small())

        of_first(begin)

    def finish(self) -> None:
        def end() -> None:
            self._settle()
            self._copy(self._small())

        of_first(end)

    def close(self) -> None:
        """Waits for what is being copied; the other processes need not take part."""
        with contextlib.suppress(UserError):  # raised before, or behind another error
            self._settle()
        self._pool.shutdown()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _small(self) -> dict[str, bytes]:
        """The files outside the directories of steps."""
        found = {}
        for file in _files_in(self.path):
            if not file.startswith(("checkpoints/", "models/")):
                found[file] = (self.path / file).read_bytes()
        return found

    def _copy(self, small: dict[str, bytes]) -> None:
        assert self._lease is not None  # else not the first process
        self._lease.check()
        for name, data in small.items():
            storage.write(data, str(self.where / name))
        steps = {
            f"{kind}/{each.name}": _identity(each)
            for kind in ("models", "checkpoints")
            if (self.path / kind).is_dir()
            for each in (self.path / kind).iterdir()
            if each.name.isdecimal()
        }
        # A step that a run was rewound before comes again.
        again = {name for name in steps if self._held.get(name, steps[name]) != steps[name]}
        for name in again:
            self._remove_step(name)
        for name in sorted(
            steps.keys() - self._held.keys(), key=lambda name: (name[0] == "c", name)
        ):
            self._copy_step(name)
            self._held[name] = steps[name]
        for name in self._held.keys() - steps.keys():
            self._remove_step(name)

    def _remove_step(self, name: str) -> None:
        storage.remove(str(self.where / name / UPLOADED))
        storage.remove(str(self.where / name))
        del self._held[name]

    def _copy_step(self, name: str) -> None:
        """Copy a directory; the object that makes it count comes last."""
        here, there = self.path / name, self.where / name
        sizes = {file: (here / file).stat().st_size for file in _files_in(here)}

        def put(file: str) -> None:
            storage.upload(here / file, str(there / file))

        with ThreadPoolExecutor(_AT_ONCE, "upload") as pool:
            list(pool.map(put, sizes))
        if name.startswith("checkpoints/"):
            text = json.dumps({"sizes": sizes}, indent=1) + "\n"
            storage.write(text.encode(), str(there / UPLOADED))


def _files_in(directory: Path) -> list[str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in files)


def _identity(directory: Path) -> tuple[int, ...]:
    """Changes when a directory is made again."""
    about = directory.stat()
    return about.st_ino, about.st_mtime_ns


def _pull(where: Address, path: Path, *, checkpoints: bool) -> dict[str, tuple[int, ...]]:
    """Copy the small files and, with `checkpoints`, those that are whole.

    Returns the directories of steps that are there.
    """
    there = storage.sizes_below(str(where))
    wanted, models = [], set[str]()
    whole: dict[str, bool] = {}
    for name in sorted(there):
        found = _STEP.fullmatch(name)
        if found is None:
            wanted += [name] if name != OWNER else []
            continue
        if not checkpoints:
            continue
        kind, step = found[1], f"{found[1]}/{found[2]}"
        if kind == "models":  # that it is there is all that a run needs
            (path / step).mkdir(parents=True, exist_ok=True)
            models.add(step)
            continue
        if step not in whole:
            whole[step] = _is_whole(where / step, step, there)
        if whole[step] and found[3] != UPLOADED:
            wanted.append(name)
    for step, sound in whole.items():
        if not sound:
            logger.warning("%s was not written to its end; it is left out", where / step)

    def get(name: str) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(str(where / name), path / name)

    with ThreadPoolExecutor(_AT_ONCE, "download") as pool:
        list(pool.map(get, wanted))
    # What is not whole has no identity here, so that it is replaced or removed.
    return {s: _identity(path / s) if s in models or whole[s] else () for s in (*models, *whole)}


def _is_whole(where: Address, step: str, there: dict[str, int]) -> bool:
    """Whether a checkpoint has all objects that were written."""
    if f"{step}/{UPLOADED}" not in there:
        return False
    try:
        sizes = parse_json((where / UPLOADED).read_bytes(), str(where / UPLOADED))["sizes"]
        return all(there.get(f"{step}/{name}") == size for name, size in sizes.items())
    except StorageError:
        raise
    except (UserError, KeyError, TypeError, AttributeError):
        return False


def _scratch(where: Address) -> Path:
    """The directory here of this process of a run there."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    name = hashlib.sha256(str(where).encode()).hexdigest()[:16]
    name += f"-{jax.process_index()}" if jax.process_index() else ""
    return Path(tempfile.gettempdir(), f"vivit-jax-runs-{user}", name)


@contextlib.contextmanager
def _alone(where: Address, path: Path) -> Iterator[None]:
    """Let no other process of this machine train into the same place."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone(path.with_name(f"{path.name}.lock")) as is_alone:
        if not is_alone:
            raise UserError(
                f"--out {where}: another process is training into it; wait for its end, or choose "
                "another directory"
            )
        yield

# SPDX-License-Identifier: Apache-2.0
"""Files that are moved into place together, once all of them are complete.

They are written in a hidden directory inside their destination, so that the destination may be a
mount point, belong to somebody else, or be the current directory, and every move stays in one file
system:

    .vivit-jax.<random>.partial/   the writer's alone (mode 700), locked while the writer lives
        new/                       the files being written
        old/                       the files they replace, once the swap has begun
        swap.json                  the names that leave and arrive, in order

A writer killed during a swap leaves no key file (a model's config.json), so that the remains cannot
be taken for a complete set. The next writer to the directory reports them, puts the old files back
and removes the rest.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vivit_jax.errors import UserError
from vivit_jax.files.json_files import read_json

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\.vivit-jax\.[0-9a-f]{16}\.partial")
_PLAN = "swap.json"
# Errors of file systems that cannot sync or lock, mostly directories.
_NOT_DONE_HERE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_PATIENCE = 30.0  # seconds to wait for the swap of another writer


class Staging:
    """A hidden directory in `directory`, whose `new` takes files for it; for a `with` statement.

    It first repairs what killed writers left in `directory`. At the end of the block it removes
    whatever was not moved in.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        clear_leftovers(directory)

    def __enter__(self) -> "Staging":
        while True:
            # mkdir follows no link and reuses no directory; no other user can write in it.
            self._path = self._directory / f".vivit-jax.{secrets.token_hex(8)}.partial"
            try:
                self._path.mkdir(0o700)
            except FileExistsError:
                continue
            lock = _Lock.of(self._path)
            if lock is not None:  # else another writer has just taken it for a leftover
                self._lock = lock
                break
        self.new, self._old, self._keep = self._path / "new", self._path / "old", False
        try:
            self.new.mkdir()
        except BaseException:
            self._lock.remove_with(self._path)
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._keep:
            self._lock.close()
        else:
            self._lock.remove_with(self._path)

    def move_in(self, key: str, outgoing: Sequence[str] = ()) -> None:
        """Move the files of `new` into place, down to the disk; if that fails, change nothing.

        Files of the same names leave, and those named in `outgoing`. The `key` file is the first to
        leave and the last to arrive. A file keeps the mode, and where permitted the owner, of the
        file it replaces.
        """
        incoming = sorted(os.listdir(self.new), key=lambda name: (name == key, name))
        if not incoming:
            return
        key = incoming[-1]
        leaving = [n for n in {*incoming, *outgoing} if os.path.lexists(self._directory / n)]
        leaving.sort(key=lambda name: (name != key, name))
        for name in incoming:
            _keep_mode(self._directory / name, self.new / name)
        sync_tree(self.new)
        if len(incoming) == 1 and set(leaving) <= set(incoming):  # one rename does it all
            os.replace(self.new / key, self._directory / key)
            sync(self._directory)
            return
        self._old.mkdir()
        arriving = {name: os.lstat(self.new / name).st_ino for name in incoming}
        plan = {"key": key, "out": leaving, "in": arriving}
        (self._path / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
        sync_tree(self._path)
        with _alone_in(self._directory):
            try:
                for name in leaving:
                    os.replace(self._directory / name, self._old / name)
                for name in incoming:
                    if name == key:
                        sync(self._directory)
                    os.replace(self.new / name, self._directory / name)
            except BaseException:
                self._keep = True  # if this undo fails, the next writer has to do it
                _undo(self._path, self._directory)
                self._keep = False
                raise
            sync(self._directory)

    def become(self, directory: Path) -> None:
        """Make `new` the directory itself, which must be missing or empty."""
        sync_tree(self.new)
        os.replace(self.new, directory)
        sync(directory.parent)


def names_in(directory: Path) -> list[str]:
    """The names in a directory, without those of writers at work."""
    return [name for name in os.listdir(directory) if not _NAME.fullmatch(name)]


def leftovers(directory: Path) -> list[Path]:
    """What this user's killed writers left in a directory."""
    found = []
    for path in _candidates(directory):
        lock = _Lock.of(path)
        if lock is not None:
            lock.close()
            found += [path] if lock.sure else []
    return found


def interrupted(directory: Path) -> str:
    """The end of a message about a missing file: what a killed writer left there, or ""."""
    found = leftovers(directory)
    if not found:
        return ""
    return (
        f"; {found[0]} was left by a writer that was killed: write there again, which first puts "
        "back what it was replacing"
    )


def clear_leftovers(directory: Path) -> None:
    """Undo interrupted swaps and remove what killed writers left, with a warning that names it.

    What belongs to a living writer, or to somebody else, stays.
    """
    for path in _candidates(directory):
        lock = _Lock.of(path)
        if lock is None:
            continue
        if not lock.sure:
            lock.close()
            continue
        try:
            back = _undo(path, directory)
            lock.remove_with(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            lock.close()
            logger.warning(
                "%s was left by a writer that was killed, and cannot be put right: %s; what it "
                "replaced is in %s/old",
                *(path, error, path),
            )
            continue
        restored = f"; what it was replacing is back: {', '.join(back)}" if back else ""
        logger.warning("removed %s, left by a writer that was killed%s", path, restored)


def _candidates(directory: Path) -> list[Path]:
    try:
        names = sorted(name for name in os.listdir(directory) if _NAME.fullmatch(name))
    except OSError:  # not there yet, or not readable
        return []
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            about = os.lstat(directory / name)
            # Another user's directory may be a trap: its plan would move our files.
            own = not hasattr(os, "geteuid") or about.st_uid == os.geteuid()
            if stat.S_ISDIR(about.st_mode) and own:
                found.append(directory / name)
    return found


def _undo(staging: Path, directory: Path) -> list[str]:
    """Undo a swap that did not finish; returns the names that are back in place."""
    new, old = staging / "new", staging / "old"
    if not (staging / _PLAN).is_file():
        return []
    try:
        plan = read_json(staging / _PLAN)
    except ValueError:
        if not os.listdir(old):  # killed while writing the plan, before anything moved
            return []
        raise
    names = [plan["key"], *plan["out"], *plan["in"]]
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{_PLAN} names files elsewhere")
    # The key is there if nothing has left, if all has arrived, or if somebody has repaired it.
    if os.path.lexists(directory / plan["key"]) or not os.path.lexists(new / plan["key"]):
        return []
    for name, number in plan["in"].items():
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(directory / name).st_ino == number:  # others' files stay
                os.replace(directory / name, new / name)
    back = [
        name
        for name in reversed(plan["out"])
        if os.path.lexists(old / name) and not os.path.lexists(directory / name)
    ]
    for name in back:
        os.replace(old / name, directory / name)
    sync(directory)
    return back


class _Lock:
    """The sign that the writer of a staging directory lives: it ends with the writer's process."""

    def __init__(self, held: int, sure: bool):
        self._held: int | None = held
        self.sure = sure  # False if the file system has no locks

    @classmethod
    def of(cls, path: Path) -> "_Lock | None":
        """The lock; None if another process holds it or the directory is gone."""
        try:
            import fcntl
        except ImportError:  # Windows, where a file that is open cannot be removed
            lock = path / "lock"
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
                return cls(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY), True)
            return None
        held = None
        try:
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been removed between the two.
            if os.path.samestat(os.fstat(held), os.lstat(path)):
                return cls(held, True)
        except OSError as error:
            if held is not None and error.errno in _NOT_DONE_HERE:
                return cls(held, False)
        if held is not None:
            os.close(held)
        return None

    def close(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def remove_with(self, path: Path) -> None:
        """Remove the directory, and so the lock."""
        if os.name == "nt":
            self.close()
        shutil.rmtree(path, ignore_errors=True)  # the next writer finds what stays
        self.close()


def _keep_mode(old: Path, new: Path) -> None:
    try:
        before, now = os.lstat(old), os.lstat(new)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(before.st_mode) or not stat.S_ISREG(now.st_mode):
        return
    # Some file systems permit neither; a new group is permitted more often than a new user.
    if before.st_gid != now.st_gid:
        with contextlib.suppress(PermissionError):
            os.chown(new, -1, before.st_gid)
    if before.st_uid != now.st_uid:
        with contextlib.suppress(PermissionError):
            os.chown(new, before.st_uid, -1)
    mode = stat.S_IMODE(before.st_mode) & 0o777
    if mode != stat.S_IMODE(now.st_mode):
        with contextlib.suppress(PermissionError):
            os.chmod(new, mode)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Swap the files of a directory while no other process does."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # files can be created in it, but not listed
        yield
        return
    try:
        for _ in range(int(_PATIENCE / 0.05)):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NOT_DONE_HERE:
                    raise
                break
        else:
            raise UserError(
                f"{directory}: another process has been writing to it for {_PATIENCE:g} s; wait "
                "for its end, or write to another directory"
            )
        yield
    finally:
        os.close(held)


def sync_tree(path: Path) -> None:
    """Flush a directory's names and contents to the disk."""
    for where, _, files in os.walk(path):
        for name in files:
            sync(Path(where, name))
        sync(Path(where))


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    about = os.lstat(path)
    is_directory = stat.S_ISDIR(about.st_mode)
    if stat.S_ISLNK(about.st_mode) or (os.name == "nt" and is_directory):
        return
    try:
        # Windows flushes only files that are open for writing.
        held = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        if is_directory:  # files can be created in it, but not listed
            return
        raise
    try:
        os.fsync(held)
    except OSError as error:
        if not is_directory or error.errno not in _NOT_DONE_HERE:
            raise
    finally:
        os.close(held)


@contextlib.contextmanager
def made_parents(directory: Path) -> Iterator[None]:
    """Create the parents of a directory to be written, and remove them again on failure."""
    missing = [path for path in directory.parents if not path.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # somebody has put something there meanwhile
                path.rmdir()
        raise

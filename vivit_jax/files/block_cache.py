# SPDX-License-Identifier: Apache-2.0
"""A directory of blocks that were read from storage, of bounded size, for many processes at once.

The environment's VIVIT_JAX_CACHE_DIR names it, and VIVIT_JAX_CACHE_GIB its size; a recipe's
`data.cache_dir` and `data.cache_dir_gib` set them. A block is a file named after a hash of its
address, tag and number, with a checksum in front. It appears whole, by a rename; what was used
longest ago is removed first. A cache that cannot be written or is damaged costs time and no result.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from pathlib import Path

from vivit_jax.errors import UserError
from vivit_jax.files.alone import alone

logger = logging.getLogger(__name__)

DIRECTORY, GIB = "VIVIT_JAX_CACHE_DIR", "VIVIT_JAX_CACHE_GIB"
_GIB = 20.0
_LOCK = "lock"
_DIGEST = 16  # bytes in front of a block
_DEAD = 600.0  # seconds after which a block that is half written has no writer any more
_SLACK = 0.05  # share of the size that a process writes between two looks at the whole
_warned: set[str] = set()
_written = 0  # bytes since this process last looked
_looking = threading.Lock()


def check() -> None:
    """UserError for settings of the cache that are wrong."""
    directory = _directory()
    if directory is None:
        return
    _limit()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _LOCK).touch()
    except OSError as error:
        raise UserError(
            f"data.cache_dir (or {DIRECTORY}) {directory}: {error.strerror}; name a directory that "
            "can be written, or none"
        ) from None


def use(directory: str | None, gib: float) -> None:
    """Keep blocks in a directory from now on, in this process and those that it starts.

    None leaves it to the environment. UserError for a directory that cannot be written.
    """
    if directory is not None:
        os.environ[DIRECTORY], os.environ[GIB] = os.path.abspath(directory), repr(float(gib))
    check()


def get(address: str, tag: str, number: int) -> bytes | None:
    """A block that is held; None if it is not, or no longer as it was written."""
    directory = _directory()
    if directory is None or not tag:
        return None
    path = _path(directory, address, tag, number)
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    digest, block = data[:_DIGEST], data[_DIGEST:]
    if _digest(block) != digest:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return block


def put(address: str, tag: str, number: int, block: bytes) -> None:
    """Hold a block."""
    global _written
    directory = _directory()
    if directory is None or not tag:
        return
    path = _path(directory, address, tag, number)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_digest(block) + block)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if str(directory) not in _warned:
            _warned.add(str(directory))
            logger.warning("%s: nothing more is cached: %s", directory, error.strerror)
        return
    _written += len(block)
    limit = _limit()
    if _written > _SLACK * limit and _looking.acquire(blocking=False):
        try:
            _written = 0
            _shrink(directory, limit)
        finally:
            _looking.release()


def _directory() -> Path | None:
    text = os.environ.get(DIRECTORY)
    return Path(text) if text else None


def _limit() -> int:
    """The size of the cache in bytes."""
    text = os.environ.get(GIB, str(_GIB))
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 < gib < 2**30:
        raise UserError(f"{GIB} (or data.cache_dir_gib) is {text!r}, expected GiB above 0")
    return int(gib * 2**30)


def _path(directory: Path, address: str, tag: str, number: int) -> Path:
    key = f"{address}\0{tag}\0{number}".encode(errors="surrogateescape")
    name = hashlib.sha256(key).hexdigest()
    return directory / name[:2] / name[2:]


def _digest(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=_DIGEST).digest()


def _shrink(directory: Path, limit: int) -> None:
    """Remove what was used longest ago until the rest is well below the limit; one process does."""
    with alone(directory / _LOCK) as is_alone:
        if not is_alone:
            return
        held = []
        for folder in directory.iterdir():
            with contextlib.suppress(OSError):  # another process removes too
                for entry in os.scandir(folder):
                    about = entry.stat()
                    # One that is being written is its writer's, unless that was killed.
                    if not entry.name.startswith(".") or about.st_mtime < time.time() - _DEAD:
                        held.append((about.st_mtime, about.st_size, entry.path))
        excess = sum(size for _, size, _ in held) - limit * (1 - 2 * _SLACK)
        for _, size, path in sorted(held):
            if excess <= 0:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
                excess -= size

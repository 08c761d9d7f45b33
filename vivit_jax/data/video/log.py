# SPDX-License-Identifier: Apache-2.0
"""Warnings about a video file, each logged once while the file stays the same."""

import contextlib
import logging
import os

from vivit_jax.files.parts import in_ranges
from vivit_jax.files.ranges import recent_state

logger = logging.getLogger(__name__)

_warned: set[tuple] = set()


def file_state(name: str) -> tuple:
    """Changes when the file does; OSError if there is none."""
    if in_ranges(name):
        return recent_state(name)
    file = os.stat(name)
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns


def warn_once(name: str, kind: str, message: str, *arguments) -> None:
    """Logs one warning of a kind per state of a file: epochs read the same file again."""
    key = kind, name, ()
    with contextlib.suppress(OSError):
        key = kind, name, file_state(name)
    if key not in _warned:
        _warned.add(key)
        logger.warning(message, *arguments)


def warn_of_damage(name: str, damaged: list[int], returned: bool = False) -> None:
    """Logs that frames are damaged: some that were decoded on the way, or that are `returned`."""
    if damaged:
        message = "%s: damaged: the decoder reports errors in %s; %sframes after them may show it"
        shown = "they and " if returned else ""
        warn_once(name, "damaged", message, name, named(damaged), shown)


def named(numbers: list[int], what: str = "frame", most: int = 8) -> str:
    """E.g. "frame 3" or "frames 3, 4 and 12 more"."""
    listed = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {listed}{more}"

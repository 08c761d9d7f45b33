# SPDX-License-Identifier: Apache-2.0
"""Blocks of code that one process at a time is in."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether no other process, or thread, is in such a block about a directory or lock file.

    A lock file is made if it is not there. The end of a process ends its block. True where the
    file system has no locks, and with a warning where the system has none.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        message = "%s: %s cannot lock a directory; let no other process write into it"
        logger.warning(message, path, sys.platform)
        yield True
        return
    held = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = True
    except OSError as error:
        found = not isinstance(error, BlockingIOError)
    try:
        yield found
    finally:
        os.close(held)

# SPDX-License-Identifier: Apache-2.0
"""What one clip raises while it is read is that clip's, never the end of what reads many."""

import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Generator, Iterator

from vivit_jax.errors import UserError, VideoError

logger = logging.getLogger(__name__)

_told: set[tuple] = set()  # kinds of errors whose trace was logged by this process
_telling = threading.Lock()


class UnforeseenError(VideoError):
    """Reading a clip raised what no reader foresees; the error itself is the `__cause__`."""


@contextlib.contextmanager
def one_clip(name: str | os.PathLike) -> Iterator[None]:
    """Whatever the block raises of the clip `name` is a VideoError, so that others are read on.

    A VideoError passes as it is. So does another UserError: it is about an argument or a setting,
    and the same for every clip. Everything else becomes an `UnforeseenError` of one line with the
    error's type, whole message and place; it may be the file's damage, a disk's, or a mistake in
    this library, so the first of each kind is logged with its trace. A MemoryError is among these:
    one clip may ask for more than there is, and where the machine has no memory left all clips fail
    and whoever counts them gives up. KeyboardInterrupt and SystemExit are no clip's and pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        _log_first(os.fsdecode(name), error)
        raise UnforeseenError(f"{os.fsdecode(name)}: {_described(error)}") from error


def each_of_clip(name: str | os.PathLike, items: Generator) -> Generator:
    """The items of a generator that reads a clip, whose errors are `one_clip`'s."""
    with one_clip(name), contextlib.closing(items):
        yield from items


def _described(error: Exception) -> str:
    kind, place = type(error), _place(error)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    words = " ".join(str(error).split())
    return f"{module}{kind.__qualname__}{f': {words}' if words else ''} (unforeseen, in {place})"


def _place(error: Exception) -> str:
    """Where it was raised, and from which line of this package where that is not the same."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}vivit_jax{os.sep}" in frame.filename]
    places = dict.fromkeys(
        f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"
        for frame in (*frames[-1:], *own[-1:])
    )
    return ", called by ".join(places)


def _log_first(name: str, error: Exception) -> None:
    kind = type(error), _place(error)
    with _telling:
        if kind in _told:
            return
        _told.add(kind)
    logger.warning(
        "%s: reading this clip raised an error that is not foreseen, and the clip is left out. Its "
        "file or its disk may be damaged; else please report it. The first of its kind:",
        name,
        exc_info=error,
    )

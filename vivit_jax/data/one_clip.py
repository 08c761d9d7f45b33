# SPDX-License-Identifier: Apache-2.0
"""Turns anything that reading one clip raises into a VideoError, so that the others are read on."""

import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Generator, Iterator

from vivit_jax.errors import UserError, VideoError

logger = logging.getLogger(__name__)

_logged: set[tuple] = set()  # kinds of errors whose traceback this process has logged
_log_lock = threading.Lock()


class UnforeseenError(VideoError):
    """Reading a clip raised an error that no reader foresees, given as `__cause__`."""


@contextlib.contextmanager
def one_clip(name: str | os.PathLike) -> Iterator[None]:
    """Makes any error that the block raises about the clip `name` a VideoError.

    A VideoError passes unchanged, and so does any other UserError: it is about an argument or a
    setting, the same for every clip. Everything else becomes an `UnforeseenError` of one line with
    the error's type, full message and place. The cause may be a damaged file, a failing disk or a
    bug in this library, so the first error of each kind is logged with its traceback. MemoryError
    is included, in plain words: one clip may need more memory than there is, and if the machine has
    none left all clips fail and the caller, which counts failures, gives up. KeyboardInterrupt and
    SystemExit pass.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        words = " ".join(str(error).split())
        text = f"not enough memory to read it{f': {words}' if words else ''}"
        raise UnforeseenError(f"{os.fsdecode(name)}: {text}") from error
    except Exception as error:
        _log_first(os.fsdecode(name), error)
        raise UnforeseenError(f"{os.fsdecode(name)}: {_described(error)}") from error


def each_of_clip(name: str | os.PathLike, items: Generator) -> Generator:
    """The items of a generator that reads a clip; errors are converted as by `one_clip`."""
    with one_clip(name), contextlib.closing(items):
        yield from items


def _described(error: Exception) -> str:
    kind, place = type(error), _place(error)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    words = " ".join(str(error).split())
    return f"{module}{kind.__qualname__}{f': {words}' if words else ''} (unforeseen, in {place})"


def _place(error: Exception) -> str:
    """Where it was raised, and the line of this package that led there if it is another one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}vivit_jax{os.sep}" in frame.filename]
    places = dict.fromkeys(
        f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"
        for frame in (*frames[-1:], *own[-1:])
    )
    return ", called by ".join(places)


def _log_first(name: str, error: Exception) -> None:
    kind = type(error), _place(error)
    with _log_lock:
        if kind in _logged:
            return
        _logged.add(kind)
    logger.warning(
        "%s: reading this clip raised an unforeseen error, and the clip is left out. The file or "
        "the disk may be damaged; otherwise please report it. The first of its kind:",
        name,
        exc_info=error,
    )

# SPDX-License-Identifier: Apache-2.0
"""Says what each thread waits for while a step takes far longer than those before it."""

import collections
import contextlib
import linecache
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import thread as futures_thread
from pathlib import Path
from types import FrameType

FACTOR = 10  # times the median step
_LEAST = 5.0  # seconds; shorter pauses are the system's
_LAPS = 5  # before the median is known
_RECENT = 101
_OURS = Path(__file__).parents[1]  # the package
_PYTHON = Path(threading.__file__).parent


class Stalls:
    """Watches from a thread how long the current step takes, until `close`.

    One that takes `FACTOR` times the median of the recent ones, and `least` seconds, is reported
    once: by `say`, in that thread, with the step before it and a text.
    """

    def __init__(self, say: Callable[[int, str], None], least: float | None = None):
        self._say, self._least = say, _LEAST if least is None else least
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._step, self._since, self._told = 0, time.monotonic(), False
        self._pauses, self._lock, self._closed = 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def lap(self, step: int, seconds: float) -> None:
        """A step has been done, in so many seconds."""
        with self._lock:
            self._recent.append(seconds)
            self._step, self._since, self._told = step, time.monotonic(), False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent in the block does not count."""
        with self._lock:
            self._pauses += 1
            start = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._since += time.monotonic() - start

    def _watch(self) -> None:
        while not self._closed.wait(self._least / 5):
            found = self._found()
            if found is not None:
                self._say(*found)

    def _found(self) -> tuple[int, str] | None:
        """The last step, and the text about a stall that begins to be one."""
        with self._lock:
            if self._told or self._pauses or len(self._recent) < _LAPS:
                return None
            taken, median = time.monotonic() - self._since, statistics.median(self._recent)
            if taken < max(FACTOR * median, self._least):
                return None
            self._told = True
            step = self._step
        return step, (
            f"no step has ended for {taken:.0f} s, {taken / median:.0f} times the usual "
            f"{median:.3g} s of a step; {'; '.join(waiting_threads())}"
        )


def waiting_threads() -> list[str]:
    """Where each thread of this process is, as "MainThread: ...", equal places in one line.

    Without those of pools that wait for work.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    places: dict[str, list[str]] = {}
    for number, frame in sys._current_frames().items():
        idle = frame.f_code is futures_thread._worker.__code__
        if number != threading.get_ident() and not idle:
            places.setdefault(_place(frame), []).append(names.get(number, str(number)))
    return [f"{_together(found)}: {place}" for place, found in places.items()]


def _place(frame: FrameType) -> str:
    """Where a thread is: the innermost line of all, and the one of interest that led to it.

    That is the innermost of this library's or, in a thread of others, outside Python's own.
    """
    frames, each = [], frame
    while each is not None:
        frames.append(each)
        each = each.f_back
    ours = [f for f in frames if Path(f.f_code.co_filename).is_relative_to(_OURS)]
    others = [f for f in frames if not _is_pythons(Path(f.f_code.co_filename))]
    chosen = next(iter(ours or others), frame)
    return _line(frame) if chosen is frame else f"{_line(chosen)}, in {_line(frame)}"


def _is_pythons(path: Path) -> bool:
    return path.is_relative_to(_PYTHON) and "site-packages" not in path.parts


def _line(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    code = linecache.getline(name, frame.f_lineno).strip()
    short = "/".join(Path(name).parts[-2:])
    return f"{short}:{frame.f_lineno} {frame.f_code.co_name}" + (f" `{code}`" if code else "")


def _together(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} threads ({names[0]}, ...)"

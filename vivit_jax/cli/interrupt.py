# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that ends a command wherever it falls, and a process that dies of its signal."""

import _thread
import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# What a KeyboardInterrupt may take from where it is raised to the first `finally` above it.
PATIENCE = 1.0


@contextlib.contextmanager
def interrupts_told_again() -> Iterator[None]:
    """Send a SIGINT again whose KeyboardInterrupt was dropped on its way out of the block.

    Python drops one that falls into a callback of the garbage collector, which JAX has, and so do
    libraries where they catch all exceptions; the command would go on for as long as it takes. What
    handles SIGINT by then gets it: training, which saves first, if it has begun meanwhile. At its
    end the block raises KeyboardInterrupt for one that was not told to anything, also in place of
    an error that a library made of it. Nothing is raised within an import, for in the middle of its
    initialisation numpy's C code crashes on it: the import ends first. Where interrupts are ignored
    or handled otherwise, and outside of the main thread, nothing changes.
    """
    main, standard = threading.main_thread(), signal.default_int_handler
    if threading.current_thread() is not main or signal.getsignal(signal.SIGINT) is not standard:
        yield
        return
    raised: queue.SimpleQueue = queue.SimpleQueue()  # of which `put` may be interrupted by itself
    ended = threading.Event()
    owed, imports = False, _imports(sys._getframe())

    def interrupt(_, frame):
        nonlocal owed
        if ended.is_set():
            return
        owed = True
        raised.put(True)
        if _imports(frame) <= imports:
            raise KeyboardInterrupt

    def remind():
        nonlocal owed
        while raised.get():
            while not ended.wait(PATIENCE):
                if not _has_caught_interrupt(main):
                    owed = signal.getsignal(signal.SIGINT) is interrupt
                    _interrupt(main)
                    break

    def report(dropped):
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            reported(dropped)

    reported, sys.unraisablehook = sys.unraisablehook, report
    reminder = threading.Thread(target=remind, name="interrupts", daemon=True)
    reminder.start()
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
        if owed:
            raise KeyboardInterrupt
    except Exception as error:
        if owed:
            raise KeyboardInterrupt from error
        raise
    finally:
        ended.set()
        raised.put(False)
        reminder.join()
        signal.signal(signal.SIGINT, standard)
        sys.unraisablehook = reported


def end_by(number: int) -> NoReturn:
    """End the process by a signal: of SIGINT a shell then knows that its loop was meant too.

    Not by the interpreter's own end, where JAX takes down what a thread of it may still compile
    with, and crashes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise AssertionError("the signal ends the process")


def _interrupt(thread: threading.Thread) -> None:
    """Send the main thread a SIGINT, which ends what it waits for where the system can do that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread.ident, signal.SIGINT)
    else:  # Windows: the handler runs when what the thread waits for is over
        _thread.interrupt_main()


def _imports(frame: FrameType | None) -> int:
    """How many frames of the import machinery there are, from a frame outwards."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count


def _has_caught_interrupt(thread: threading.Thread) -> bool:
    """Whether a thread is in an `except`, a `finally` or a `with` that got a KeyboardInterrupt."""
    error = sys._current_exceptions().get(thread.ident)
    if isinstance(error, tuple):  # before Python 3.12: type, value, stack
        error = error[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None

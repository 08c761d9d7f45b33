# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that ends a command wherever it falls."""

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

# What a KeyboardInterrupt may take from where it is raised to the first `finally` above it.
PATIENCE = 1.0


@contextlib.contextmanager
def interrupts_told_again() -> Iterator[None]:
    """Send a SIGINT again whose KeyboardInterrupt was dropped on its way out of the block.

    Python drops one that falls into a callback of the garbage collector, which JAX has, and so do
    libraries where they catch all exceptions; the command would go on for as long as it takes. What
    handles SIGINT by then gets it: training, which saves first, if it has begun meanwhile. Where
    interrupts are ignored or handled otherwise, and outside of the main thread, nothing changes.
    """
    main, standard = threading.main_thread(), signal.default_int_handler
    if threading.current_thread() is not main or signal.getsignal(signal.SIGINT) is not standard:
        yield
        return
    raised: queue.SimpleQueue = queue.SimpleQueue()  # of which `put` may be interrupted by itself
    ended = threading.Event()

    def interrupt(*_):
        if not ended.is_set():
            raised.put(True)
            raise KeyboardInterrupt

    def remind():
        while raised.get():
            while not ended.wait(PATIENCE):
                if not _has_caught_interrupt(main):
                    signal.pthread_kill(main.ident, signal.SIGINT)  # ends what it waits for, too
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
    finally:
        ended.set()
        raised.put(False)
        reminder.join()
        signal.signal(signal.SIGINT, standard)
        sys.unraisablehook = reported


def end_by_interrupt() -> NoReturn:
    """End the process by SIGINT, from which a shell knows that its loop was meant too.

    Not by the interpreter's own end, where JAX takes down what a thread of it may still compile
    with, and crashes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("the signal ends the process")


def _has_caught_interrupt(thread: threading.Thread) -> bool:
    """Whether a thread is in an `except`, a `finally` or a `with` that got a KeyboardInterrupt."""
    error = sys._current_exceptions().get(thread.ident)
    if isinstance(error, tuple):  # before Python 3.12: type, value, stack
        error = error[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None

# SPDX-License-Identifier: Apache-2.0
"""Processes that work for the main one: Ctrl-C is not for them, and its end is theirs too."""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from vivit_jax.errors import UserError, printable


class Ended(Exception):
    """A process was ended by a signal in the middle of a call."""

    def __init__(self, signal_name: str):
        super().__init__(f"ended by {signal_name}")
        self.signal = signal_name


class Apart:
    """A function that is called in a process of its own, where what it calls may end the process.

    `modules` are imported there at once, while this process goes on with something else. After an
    end the next call gets a new process. Both ways go pickles: arguments, and what is returned. To
    leave the block ends the process, whatever it does. What it writes to standard error comes with
    the result of the call, so that what a library says in the moment of its end, or beside a
    UserError, is not heard.
    """

    def __init__(self, function: Callable[..., Any], modules: Sequence[str] = ()):
        self._function, self._modules = function, modules

    def __enter__(self) -> "Apart":
        self._directory = tempfile.TemporaryDirectory()
        self._said = Path(self._directory.name) / "stderr"
        self._start()
        return self

    def __exit__(self, *_):
        self._end()
        self._directory.cleanup()

    def begin(self, *args: Any) -> None:
        """Call the function. One call at a time: `result` ends it."""
        if not self._process.is_alive():
            self._end()
            self._start()
        with contextlib.suppress(BrokenPipeError):  # told by `result`
            self._connection.send(args)

    def done(self, seconds: float) -> bool:
        """Wait for so long at most; whether the call is over."""
        ready = (self._connection, self._process.sentinel)
        return bool(multiprocessing.connection.wait(ready, seconds))

    def result(self) -> Any:
        """What the function returned.

        Raises what it raised as UserError, RuntimeError with the process's trace for any other
        exception, and Ended where a signal has ended the process.
        """
        try:
            what, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            if code < 0:
                raise Ended(signal.Signals(-code).name) from None
            raise RuntimeError(f"another process ended with {code}: {self._heard()}") from None
        said = self._heard()
        if what == "refused":
            raise UserError(value)
        if said:
            print(printable(said), end="", file=sys.stderr, flush=True)
        if what == "failed":
            raise RuntimeError(f"in another process: {value}")
        return value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._said.write_bytes(b"")
        self._process = context.Process(
            target=_serve, args=(self._function, self._modules, theirs, self._said), daemon=True
        )
        with interrupts_held(), stack_without_limit():
            self._process.start()
        theirs.close()  # else its end would not be seen

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _heard(self) -> str:
        """What the process wrote to standard error since this was asked."""
        said = self._said.read_text(encoding="utf-8", errors="replace")
        os.truncate(self._said, 0)
        return said


def _serve(function: Callable[..., Any], modules: Sequence[str], connection, said: Path) -> None:
    """The other side of `Apart`."""
    with open(said, "ab") as file:  # libraries write to the descriptor
        os.dup2(file.fileno(), 2)
    follow_the_main_process()
    for module in modules:
        importlib.import_module(module)
    while True:
        try:
            args = connection.recv()
        except EOFError:
            return
        try:
            answer = "done", function(*args)
        except UserError as error:
            answer = "refused", str(error)
        except Exception:
            answer = "failed", traceback.format_exc()
        sys.stderr.flush()
        connection.send(answer)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back from this thread, and so for good from processes that are started here.

    Those take seconds until they can do so themselves, and Ctrl-C of a terminal reaches them at
    once.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows: they may end with a trace of their own
        yield
        return

    resource_tracker.ensure_running()  # which would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def stack_without_limit() -> Iterator[None]:
    """Start processes without a limit of their stack, where the system lets users lift it.

    libtpu 0.0.42.1 overflows a stack on some programs, in threads that it gives little. In a
    process that begins with the limit "unlimited" it compiles those too; with 4 GiB, or where the
    limit is lifted later, it does not.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no libtpu either
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard == resource.RLIM_INFINITY and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def follow_the_main_process() -> None:
    """Leave Ctrl-C to the process that started this one, and end when it does."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()

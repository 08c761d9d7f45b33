# SPDX-License-Identifier: Apache-2.0
"""Helper processes: they ignore Ctrl-C and end with the main process."""

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
    """A signal ended the process during a call."""

    def __init__(self, signal_name: str):
        super().__init__(f"ended by {signal_name}")
        self.signal = signal_name


class Apart:
    """A function that runs in a process of its own, which it may crash.

    `modules` are imported there at once, while this process continues. After a crash the next call
    gets a new process. Arguments and results are pickled. Leaving the block kills the process. Its
    standard error is printed with the result of a call, and dropped if the call crashes or raises
    UserError.
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
        """Start a call, one at a time: `result` completes it."""
        if not self._process.is_alive():
            self._end()
            self._start()
        with contextlib.suppress(BrokenPipeError):  # `result` reports it
            self._connection.send(args)

    def done(self, seconds: float) -> bool:
        """Wait at most this long; whether the call is complete."""
        ready = (self._connection, self._process.sentinel)
        return bool(multiprocessing.connection.wait(ready, seconds))

    def result(self) -> Any:
        """The function's return value.

        Raises the function's UserError, RuntimeError with the process's traceback for any other
        exception, and Ended if a signal ended the process.
        """
        try:
            what, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            assert code is not None, "the process has been joined"
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
        theirs.close()  # so that the process's end closes the connection

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _heard(self) -> str:
        """What the process has written to standard error since the last call."""
        said = self._said.read_text(encoding="utf-8", errors="replace")
        os.truncate(self._said, 0)
        return said


def _serve(function: Callable[..., Any], modules: Sequence[str], connection, said: Path) -> None:
    """The other side of `Apart`."""
    with open(said, "ab") as file:  # libraries write to the file descriptor
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
    """Block Ctrl-C in this thread, and thereby in the processes that it starts.

    These take seconds until they can block it themselves, and a terminal sends it to them at once.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows: they may end with a traceback
        yield
        return

    resource_tracker.ensure_running()  # starting it later would unblock interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def stack_without_limit() -> Iterator[None]:
    """Start processes without a stack limit, if the system lets users lift it.

    libtpu 0.0.42.1 overflows the small stacks of its threads on some programs. It compiles these in
    a process that starts with the limit "unlimited"; with 4 GiB, or if the limit is lifted later,
    it does not.
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
    """Ignore Ctrl-C, and end when the process that started this one ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process that multiprocessing started"

    def follow():
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()

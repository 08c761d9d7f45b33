# SPDX-License-Identifier: Apache-2.0
"""Runs the command that a command line names, and turns its end into an exit status."""

import _thread
import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from vivit_jax.console.arguments import completion, parsed
from vivit_jax.console.devices import answer_libtpu, compilation_shown, has_tpu, no_device
from vivit_jax.console.program import (
    CACHE_FLAG,
    PRINT_COMPLETION,
    WRITE_COMPLETION,
    Command,
    Program,
    versions,
)
from vivit_jax.errors import UserError, first_line, printable
from vivit_jax.files.storage import TRAFFIC
from vivit_jax.version import __version__

_SIGNALLED = 128
_AGAIN = 0.1  # seconds until a dropped interrupt is sent again


def run(
    prog: str,
    description: str,
    commands: Mapping[str, Command | str],
    args: Sequence[str] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Parse `args`, call the command and return the exit status.

    A command is a function or its place, "package.module:function". Only the command that runs is
    imported, so `--help`, `--version` and misspelt names answer without loading jax. `groups` are
    the titles of the help's sections, with the commands of each.

    The status is 0 for success, 1 for a command's negative answer, 2 for wrong input (one line on
    stderr) and 128 + n for signal n, as in a shell: 130 for Ctrl-C, 143 for SIGTERM. Any other
    failure is a bug and keeps its stack trace. Without `args`, those of the process are parsed, and
    a command that a signal stopped ends the process by that signal.
    """
    status = _run(Program(prog, description, commands, groups or {}), args)
    if args is None and status > _SIGNALLED:
        end_by(status - _SIGNALLED)
    return status


def stopped_by(name: str) -> int:
    """The exit status of a command stopped by a signal, given its name, such as "SIGTERM"."""
    return _SIGNALLED + signal.Signals[name]


def _run(program: Program, args: Sequence[str] | None) -> int:
    prog = program.name
    for stream in ("stdout", "stderr"):  # None if it was closed at start-up
        if getattr(sys, stream) is None:
            setattr(sys, stream, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Printing a file name that is not valid text must not raise.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Otherwise the first library to log decides how warnings look.
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if not has_tpu():
        answer_libtpu()
    # It has a handler of its own, and would print everything twice.
    logging.getLogger("huggingface_hub").propagate = False
    try:
        args = _compilation_cache(list(sys.argv[1:] if args is None else args))
        with _dropped_interrupts_sent_again():
            status = _answer(program, args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        print(printable(f"{prog}: error: {error}"), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError, AssertionError) as error:
        message = no_device(error)
        if message is None:
            # XLA raises RuntimeError for everything; only its text names exhausted memory.
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = f"not enough memory: {first_line(error)}"
        print(printable(f"{prog}: error: {message}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # its reader may have been interrupted too
            print(f"{prog}: interrupted", file=sys.stderr)
        return stopped_by("SIGINT")
    return status or 0


def _answer(program: Program, args: Sequence[str]) -> int | None:
    """Do what the arguments ask for. Raises UserError where they ask for nothing that exists."""
    first, rest = (args[0], args[1:]) if args else ("", [])
    if first in ("-h", "--help"):
        print(program.help())
    elif first == "--version":
        print(f"{program.name} {__version__}")
    elif first == "--versions":
        print("\n".join([f"{program.name} {__version__}", *versions()]))
    elif first in (PRINT_COMPLETION, WRITE_COMPLETION):
        print(completion(program, args))
    elif not first:
        raise UserError(f"name a command; {program.name} --help lists them")
    elif first not in program.commands:
        raise UserError(program.unknown(first))
    else:
        found = parsed(f"{program.name} {first}", program.imported(first), rest)
        if isinstance(found, str):
            print(found)
            return 0
        # Control characters are escaped on stdout, where commands print labels and paths. Live
        # lines on stderr move the cursor, so what is written there is escaped by its writer.
        with compilation_shown(), contextlib.redirect_stdout(_Printable(sys.stdout)):
            before = str(TRAFFIC)
            try:
                return found()
            finally:
                if str(TRAFFIC) != before:
                    print(f"storage: {TRAFFIC}", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _dropped_interrupts_sent_again() -> Iterator[None]:
    """Send SIGINT again if its KeyboardInterrupt was raised in a callback, where Python drops it.

    JAX has a callback of the garbage collector, so one Ctrl-C of several would only print a stack
    trace.
    """
    shown, timers = sys.unraisablehook, list[threading.Timer]()

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            shown(dropped)
            return
        timers.append(threading.Timer(_AGAIN, _interrupt))  # later: the callback still runs
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = shown
        for timer in timers:
            timer.cancel()


def _interrupt() -> None:
    """Send SIGINT to this process."""
    if os.name == "nt":  # where os.kill would end the process
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)


class _Formatter(logging.Formatter):
    """Escapes control characters in messages."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Printable:
    """A text stream that escapes control characters."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def flush(self) -> None:
        self._stream.flush()


def _compilation_cache(args: list[str]) -> list[str]:
    """Handle `--compilation-cache DIR` before the command; returns the arguments without it.

    Compiled programs are kept in the directory for later runs of any command, as by the environment
    variable JAX_COMPILATION_CACHE_DIR, however quickly they compiled.
    """
    if not args or args[0].partition("=")[0] != CACHE_FLAG:
        return args
    flag, given, directory = args[0].partition("=")
    rest = args[1:]
    if not given:
        directory, rest = (rest[0] if rest else ""), rest[1:]
    if not directory or directory.startswith("-"):
        raise UserError(f"{flag} needs a directory, got {directory!r}; for example {flag} cache")
    keep_compiled(Path(directory))
    return rest


def keep_compiled(directory: Path) -> None:
    """Keep compiled programs of any size in a directory and reuse those already there."""
    import jax

    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def end_by(number: int) -> NoReturn:
    """End the process by a signal, so that Ctrl-C also stops a loop of the calling shell.

    This skips the interpreter's shutdown, where JAX crashes if a thread is still compiling.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise AssertionError("the signal ends the process")

# SPDX-License-Identifier: Apache-2.0
"""Dispatch of both command lines, and how they fail."""

import contextlib
import functools
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from vivit_jax.cli.interrupt import end_by, interrupts_told_again
from vivit_jax.errors import UserError, first_line, printable
from vivit_jax.libtpu import answer_libtpu, has_tpu

CACHE_FLAG = "--compilation-cache"
_SIGNALLED = 128


def run(
    prog: str,
    description: str,
    commands: dict[str, Callable[..., int | None]],
    args: Sequence[str] | None = None,
) -> int:
    """Parse `args`, call the command and return the exit status.

    0 success, 1 the command's own negative answer, 2 wrong input, told in one line on stderr, and
    128 + n stopped by signal n: 130 by Ctrl-C, 143 by SIGTERM, as a shell calls it. Anything else
    is a bug and keeps its stack trace. Without `args` they are the process's, which then dies of
    the signal that stopped the command.
    """
    status = _run(prog, description, commands, args)
    if args is None and status > _SIGNALLED:
        end_by(status - _SIGNALLED)
    return status


def stopped_by(name: str) -> int:
    """The status of a command that a signal stopped, by its name, such as "SIGTERM"."""
    return _SIGNALLED + signal.Signals[name]


def _run(
    prog: str,
    description: str,
    commands: dict[str, Callable[..., int | None]],
    args: Sequence[str] | None,
) -> int:
    import tyro

    for stream in ("stdout", "stderr"):  # None in a process that began with it closed
        if getattr(sys, stream) is None:
            setattr(sys, stream, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A file's name may have bytes that are no text, which would end a command that prints it.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Else whichever library logs first decides how warnings look.
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if not has_tpu():
        answer_libtpu()
    commands = {name: _printing(command) for name, command in commands.items()}
    # This one prints by itself, and would be heard twice.
    logging.getLogger("huggingface_hub").propagate = False
    try:
        with interrupts_told_again():
            args = _compilation_cache(list(sys.argv[1:] if args is None else args))
            status = tyro.extras.subcommand_cli_from_dict(
                commands,
                prog=prog,
                description=f"{description} {CACHE_FLAG} DIR before the command keeps compiled "
                "programs there for later runs.",
                args=args,
            )
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        print(printable(f"{prog}: error: {error}"), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # XLA has a word for it, in an error that may mean anything.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = f"{prog}: error: not enough memory: {first_line(error)}"
        print(printable(told), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # whoever reads it may have been interrupted too
            print(f"{prog}: interrupted", file=sys.stderr)
        return stopped_by("SIGINT")
    return status or 0


class _Formatter(logging.Formatter):
    """Messages whose control characters a terminal does not obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Printable:
    """A stream of text that writes control characters as escapes."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))


def _printing(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """The command with a standard output that its labels and paths cannot steer.

    Not the parser's: help is coloured. Standard error has live lines, which move the cursor, so
    that what is written there is made printable where it is written.
    """

    @functools.wraps(command)
    def printing(*args, **kwargs):
        with contextlib.redirect_stdout(_Printable(sys.stdout)):
            return command(*args, **kwargs)

    return printing


def _compilation_cache(args: list[str]) -> list[str]:
    """The arguments without `--compilation-cache DIR`, which may stand before the command.

    With it compiled programs are kept in the directory and found there by later runs of any
    command, as with the environment's JAX_COMPILATION_CACHE_DIR, however quickly they compiled.
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
    """Keep compiled programs in a directory and take them from there, however small they are."""
    import jax

    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

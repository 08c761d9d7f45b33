# SPDX-License-Identifier: Apache-2.0
"""Entry point of both command lines: dispatch, exit status, shared options."""

import _thread
import ast
import contextlib
import functools
import glob
import importlib.util
import io
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import tyro

from vivit_jax.errors import ConfigError, UserError, first_line, printable

Command = Callable[..., int | None]
CACHE_FLAG = "--compilation-cache"
_SIGNALLED = 128
_AGAIN = 0.1  # seconds until a dropped interrupt is sent again


def run(
    prog: str,
    description: str,
    commands: Mapping[str, Command | str],
    args: Sequence[str] | None = None,
) -> int:
    """Parse `args`, call the command and return the exit status.

    A command is a function or its place, "package.module:function". Only the command that runs is
    imported, so `--help` and misspelt names answer without loading jax.

    The status is 0 for success, 1 for a command's negative answer, 2 for wrong input (one line on
    stderr) and 128 + n for signal n, as in a shell: 130 for Ctrl-C, 143 for SIGTERM. Any other
    failure is a bug and keeps its stack trace. Without `args`, those of the process are parsed, and
    a command that a signal stopped ends the process by that signal.
    """
    status = _run(prog, description, commands, args)
    if args is None and status > _SIGNALLED:
        end_by(status - _SIGNALLED)
    return status


def stopped_by(name: str) -> int:
    """The exit status of a command stopped by a signal, given its name, such as "SIGTERM"."""
    return _SIGNALLED + signal.Signals[name]


def _run(
    prog: str,
    description: str,
    commands: Mapping[str, Command | str],
    args: Sequence[str] | None,
) -> int:
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
            status = tyro.extras.subcommand_cli_from_dict(
                {name: _printing(c) for name, c in _imported(commands, args).items()},
                prog=prog,
                description=f"{description} {CACHE_FLAG} DIR before the command keeps compiled "
                "programs there for later runs.",
                args=args,
            )
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        print(printable(f"{prog}: error: {error}"), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # XLA raises RuntimeError for everything; only its text names exhausted memory.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = f"{prog}: error: not enough memory: {first_line(error)}"
        print(printable(message), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # its reader may have been interrupted too
            print(f"{prog}: interrupted", file=sys.stderr)
        return stopped_by("SIGINT")
    return status or 0


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


def _imported(commands: Mapping[str, Command | str], args: Sequence[str]) -> dict[str, Command]:
    """The commands as functions: the one that `args` names is imported, the others only have help.

    Completion scripts (tyro's own flags) need the options of all commands.
    """
    everything = any(arg.startswith("--tyro-") for arg in args)
    found: dict[str, Command] = {}
    for name, command in commands.items():
        if not isinstance(command, str):
            found[name] = command
        elif everything or args[:1] == [name]:
            module, _, function = command.partition(":")
            found[name] = getattr(importlib.import_module(module), function)
        else:
            found[name] = _help_only(command)
    return found


def _help_only(place: str) -> Command:
    """A function with the first paragraph of the docstring at "module:function", without import."""
    module, _, function = place.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, place
    tree = ast.parse(Path(spec.origin).read_bytes())
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)

    def command() -> None:
        raise AssertionError(f"{place} is imported before it is called")

    command.__doc__ = (ast.get_docstring(found) or "").partition("\n\n")[0]
    return command


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


def _printing(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """The command with control characters escaped on stdout, where it prints labels and paths.

    The parser's own output is coloured, and live lines on stderr move the cursor, so those streams
    are left alone; what is written to stderr is escaped by its writer.
    """

    @functools.wraps(command)
    def printing(*args, **kwargs):
        with contextlib.redirect_stdout(_Printable(sys.stdout)):
            return command(*args, **kwargs)

    return printing


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


# Annotates a dataclass of flags, which then have no prefix.
FLAT = tyro.conf.arg(name="")

# Takes both `--config a=1 b=2` and `--config a=1 --config b=2`.
KeyValues = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="KEY=VALUE"),
]

ConfigOption = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="KEY=VALUE",
        help="Changes to the config, by the field names of config.json. A file without config.json "
        "may need some, such as num_frames=32 image_size=224.",
    ),
]


def in_order(settings: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings in the order given."""
    return tuple(itertools.chain.from_iterable(settings))


def joined(config: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings of `--config`.

    Raises ConfigError for a value without "=", usually a positional placed after --config.
    """
    settings = in_order(config)
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(
                f"--config takes KEY=VALUE, got {setting!r}; put positional arguments before it"
            )
    return settings


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


# jax loads libtpu wherever it is installed (extras `plan` and `tpu`). Without a TPU, libtpu prints
# five lines on stderr about an unknown machine, unless the environment holds these answers.
_ANSWERS = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
_GOOGLE = "0x1ae0"  # vendor id of PCI devices
_VENDORS = "/sys/bus/pci/devices/*/vendor"
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # TPUs on Linux, by generation


def has_tpu() -> bool:
    """Whether there may be a TPU; a VFIO device may be something else."""
    if "JAX_FORCE_TPU_INIT" in os.environ or any(map(glob.glob, _DEVICES)):
        return True
    return any(Path(vendor).read_text().strip() == _GOOGLE for vendor in glob.glob(_VENDORS))


def answer_libtpu() -> None:
    """Set libtpu's environment variables that are unset; only for a process without a TPU."""
    for name, value in _ANSWERS.items():
        os.environ.setdefault(name, value)

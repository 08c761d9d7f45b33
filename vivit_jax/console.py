# SPDX-License-Identifier: Apache-2.0
"""Dispatch of both command lines, and how they fail."""

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
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TextIO

import tyro

from vivit_jax.errors import ConfigError, UserError, first_line, printable

Command = Callable[..., int | None]
CACHE_FLAG = "--compilation-cache"
_SIGNALLED = 128


def run(
    prog: str,
    description: str,
    commands: Mapping[str, Command | str],
    args: Sequence[str] | None = None,
) -> int:
    """Parse `args`, call the command and return the exit status.

    A command is a function or where to find one, "package.module:function": only the one that runs
    is imported, so that `--help` and wrong names answer before jax has loaded.

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
    commands: Mapping[str, Command | str],
    args: Sequence[str] | None,
) -> int:
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
    # This one prints by itself, and would be heard twice.
    logging.getLogger("huggingface_hub").propagate = False
    try:
        with interrupts_told_again():
            args = _compilation_cache(list(sys.argv[1:] if args is None else args))
            status = tyro.extras.subcommand_cli_from_dict(
                {name: _printing(c) for name, c in _imported(commands, args).items()},
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
        message = f"{prog}: error: not enough memory: {first_line(error)}"
        print(printable(message), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # whoever reads it may have been interrupted too
            print(f"{prog}: interrupted", file=sys.stderr)
        return stopped_by("SIGINT")
    return status or 0


def _imported(commands: Mapping[str, Command | str], args: Sequence[str]) -> dict[str, Command]:
    """The commands as functions: the one that `args` names, of the others no more than the help.

    Completion scripts (tyro's own flags) need the options of all.
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
    """A function with the first paragraph of the docstring at "module:function", not imported."""
    module, _, function = place.partition(":")
    spec = importlib.util.find_spec(module)
    tree = ast.parse(Path(spec.origin).read_bytes())
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)

    def command() -> None:
        raise AssertionError(f"{place} is imported before it is called")

    command.__doc__ = (ast.get_docstring(found) or "").partition("\n\n")[0]
    return command


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


# Both `--config a=1 b=2` and `--config a=1 --config b=2`.
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
        help="Changes to the config, with the field names of config.json; what a file without one "
        "does not say has to be given, such as num_frames=32 image_size=224.",
    ),
]


def in_order(settings: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings in the order in which they were given."""
    return tuple(itertools.chain.from_iterable(settings))


def joined(config: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings of `--config`; ConfigError for what is none, as a file that stands behind it."""
    settings = in_order(config)
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(
                f"--config takes KEY=VALUE, got {setting!r}; what is no setting goes before it"
            )
    return settings


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


_ANSWERS = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}


_GOOGLE = "0x1ae0"  # as a maker of PCI devices


_VENDORS = "/sys/bus/pci/devices/*/vendor"


_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # TPUs as Linux gives them, by generation


def has_tpu() -> bool:
    """Whether there may be a TPU: a VFIO device can be another thing, and jax can be told so."""
    if "JAX_FORCE_TPU_INIT" in os.environ or any(map(glob.glob, _DEVICES)):
        return True
    return any(Path(vendor).read_text().strip() == _GOOGLE for vendor in glob.glob(_VENDORS))


def answer_libtpu() -> None:
    """Put the answers into the environment, where it has none. Only for a process without a TPU."""
    for name, value in _ANSWERS.items():
        os.environ.setdefault(name, value)

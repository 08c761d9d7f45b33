# SPDX-License-Identifier: Apache-2.0
"""Progress and tables as text: live and coloured on a terminal, plain lines elsewhere."""

import contextlib
import datetime
import io
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from vivit_jax.errors import printable

_REDRAW = 0.1  # seconds between two drawings of a live line
_UNBOUNDED = 1_000_000  # columns: nothing is wrapped
_NO_CURSOR = ("dumb", "unknown")  # values of TERM, such as in Emacs' shell
_SOON, _LONG = 0.5, 3.0  # seconds of a compilation until it is shown, on a terminal and elsewhere
_CLEAR = "\r\x1b[2K"  # the line


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream can show a live line."""
    if not stream.isatty() or os.environ.get("TERM") in _NO_CURSOR:
        return False
    try:
        # Some pseudo-terminals report 0 columns, where a live line would be empty.
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True


def bold(text: str) -> str:
    """A text for standard output, bold on a terminal.

    NO_COLOR turns this off, and FORCE_COLOR turns it on for files and pipes.
    """
    if os.environ.get("NO_COLOR"):
        return text
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM") not in _NO_CURSOR
    return f"\x1b[1m{text}\x1b[0m" if on_terminal or os.environ.get("FORCE_COLOR") else text


def left(seconds: float) -> str:
    """A remaining time, as "0:02:39 left"."""
    return f"{datetime.timedelta(seconds=round(seconds))} left"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Do nothing; by default rich would end the process."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing: a signal that ends the process would leave the cursor hidden."""
        return False


class _Cut(TextColumn):
    """A text that a narrow terminal cuts, and does not wrap; [brackets] are not markup."""

    def __init__(self, text_format: str):
        super().__init__(text_format, markup=False, table_column=Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap = True
        return text


_live_lines: list["LiveLine"] = []  # on a terminal now, the newest last


class LiveLine:
    """One live line on a terminal, "name 3/10 ━━━━ text"; elsewhere a plain line now and then.

    A stream that is not a terminal gets a line every `every_seconds`, and the first and last
    update. With `ends` False it gets no first and last line, so that work shorter than
    `every_seconds` since `since` (of time.monotonic; default: now) prints nothing, and the live
    line is removed when it is closed. Write errors are ignored and the work goes on: after Ctrl-C
    in `2>&1 | tee log` nobody reads the stream, and the disk of a log may be full.
    """

    def __init__(
        self,
        name: str,
        total: int,
        initial: int = 0,
        *,
        stream: TextIO | None = None,  # None: standard error
        every_seconds: float = 30.0,
        ends: bool = True,
        since: float | None = None,
    ):
        self._name, self._total, self._ends = printable(name, one_line=True), total, ends
        self._stream = sys.stderr if stream is None else stream
        self._every = every_seconds
        self._printed = -math.inf if ends else time.monotonic() if since is None else since
        self._live = None
        if is_terminal(self._stream):
            self._live = Progress(
                _Cut("{task.description}"),
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=12),
                _Cut("{task.fields[text]}"),
                console=_Console(file=self._stream, force_terminal=True, force_jupyter=False),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.add_task(self._name, total=total, completed=initial, text="")
            self._every = _REDRAW
            _live_lines.append(self)
            with contextlib.suppress(OSError):
                self._live.start()

    def note(self, text: str) -> None:
        """Show a text in the live line until the next update."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.update(self._live.task_ids[0], text=text)
                self._live.refresh()

    def update(self, done: int, text: str) -> None:
        """Show that `done` of the total are done, with a text."""
        text = printable(text, one_line=self._live is not None)
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=done, text=text)
        now, last = time.monotonic(), done >= self._total
        if now - self._printed < self._every and not (last and (self._ends or self._live)):
            return
        self._printed = now
        with contextlib.suppress(OSError):
            if self._live is not None:
                self._live.refresh()
            else:
                line = f"{self._name} {done}/{self._total}  {text}".rstrip()
                print(line, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own above the live line."""
        with contextlib.suppress(OSError), self.hidden():
            print(printable(text), file=self._stream, flush=True)

    def close(self) -> None:
        """End the live line: it stays as it is or, with `ends` False, is removed."""
        if self._live is None:
            return
        if self in _live_lines:
            _live_lines.remove(self)
        with contextlib.suppress(OSError):
            self._live.stop()
            if self._ends:
                self._live.console.print(self._live.get_renderable())

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the live line while the block prints, also to another stream of the terminal."""
        if self._live is None:
            yield
            return
        with contextlib.suppress(OSError):
            self._live.stop()
        yield
        with contextlib.suppress(OSError):
            self._live.start()


class CompileClock:
    """Shows on standard error that XLA compiles, and for how long.

    On a terminal this is a clock, in the live line if there is one. Elsewhere it is a line once a
    compilation has taken `_LONG` seconds, and one at its end. Both methods are called in the thread
    that compiles.
    """

    def __init__(self):
        self._running: dict[int, tuple[threading.Event, threading.Thread]] = {}

    def began(self, name: str) -> None:
        """A program of this name is being compiled."""
        if self._running:  # by another thread; one clock is enough
            return
        stop = threading.Event()
        clock = threading.Thread(target=_tick, args=(printable(name), stop), daemon=True)
        self._running[threading.get_ident()] = stop, clock
        clock.start()

    def ended(self) -> None:
        """It is compiled."""
        stop, clock = self._running.pop(threading.get_ident(), (None, None))
        if stop is not None and clock is not None:
            stop.set()
            clock.join()  # so that it has left the line


def _tick(name: str, stop: threading.Event) -> None:
    """Show how long a program has been compiled, until `stop` is set."""
    began, stream, on_terminal = time.monotonic(), sys.stderr, is_terminal(sys.stderr)
    if stop.wait(_SOON if on_terminal else _LONG):
        return

    def said(verb: str) -> str:
        return f"{verb} {name}, {datetime.timedelta(seconds=int(time.monotonic() - began))}"

    line = _live_lines[-1] if _live_lines else None
    with contextlib.suppress(OSError):
        if not on_terminal:
            print(said("compiling"), file=stream, flush=True)
            stop.wait()
            print(said("compiled"), file=stream, flush=True)
        elif line is not None:
            line.note(said("compiling"))
            while not stop.wait(1.0):
                line.note(said("compiling"))
        else:
            columns = shutil.get_terminal_size().columns
            while True:
                print(
                    f"{_CLEAR}{said('compiling')[: columns - 1]}", end="", file=stream, flush=True
                )
                if stop.wait(1.0):
                    break
            print(_CLEAR, end="", file=stream, flush=True)


class Pace:
    """The time left, from the rate since the first `update`.

    The first update is left out, because programs are compiled before it.
    """

    def __init__(self):
        self._first: tuple[float, float] | None = None
        self._rate = 0.0

    def update(self, done: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        elif now > self._first[1]:
            self._rate = (done - self._first[0]) / (now - self._first[1])

    @property
    def rate(self) -> float:
        """Work done per second; 0 while unknown."""
        return self._rate

    def left(self, rest: float) -> str | None:
        """The time for the rest, as "0:02:39 left"; None while unknown."""
        return left(max(rest, 0) / self._rate) if self._rate > 0 else None


@contextlib.contextmanager
def live_line(name: str) -> Iterator[Callable[[int, int], None]]:
    """A live line, from the first call on, with the time left; a note in the one that there is."""
    line, pace = None, Pace()
    outer = _live_lines[-1] if _live_lines else None

    def update(done: int, total: int) -> None:
        nonlocal line
        pace.update(done)
        rest = pace.left(total - done) or ""
        if outer is not None:
            outer.note(f"{printable(name, one_line=True)} {done}/{total}  {rest}".rstrip())
            return
        line = line or LiveLine(name, total, ends=False)
        line.update(done, rest)
        if done == total:
            line.close()

    try:
        yield update
    finally:
        if line is not None:
            line.close()


def format_table(
    rows: Sequence[Sequence[str]], align: Literal["left", "right"] = "right"
) -> list[str]:
    """Rows of cells as lines; columns are `align`ed, the first one always to the left."""
    if not rows:
        return []
    table = Table.grid(padding=(0, 2))
    for i in range(len(rows[0])):
        table.add_column(justify=align if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # cells may hold [brackets]: they are not markup
    # In a notebook rich would show the text as an output of its own too.
    console = Console(file=io.StringIO(), width=_UNBOUNDED, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def readable(size: int) -> str:
    """Bytes as text, such as "12.0 MiB"; from 1024 MiB in GiB, such as "1.00 GiB"."""
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"

# SPDX-License-Identifier: Apache-2.0
"""How long work gets on: a live line on a terminal, lines at intervals elsewhere."""

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from vivit_jax.errors import printable


def is_terminal(stream: TextIO) -> bool:
    """Whether a live line can be shown there."""
    if not stream.isatty():
        return False
    try:
        # Some pseudo-terminals say they have no columns, in which a live line would be empty.
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True


def left(seconds: float) -> str:
    """A remaining time, as "0:02:39 left"."""
    return f"{datetime.timedelta(seconds=round(seconds))} left"


class LiveLine:
    """One live line on a terminal, "name 3/10 |###     | text"; elsewhere a line every so often.

    `every_seconds` is for streams that are no terminal. These get the first and the last update
    too, unless `ends` is False: then nothing is told of what takes less time than that, counted
    from `since` (of time.monotonic; default: now). What cannot be written is left out, and the work
    goes on: nobody reads the stream after Ctrl-C in `2>&1 | tee log`, and a log's disk may be full.
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
        self._name, self._total, self._ends = name, total, ends
        self._stream = sys.stderr if stream is None else stream
        self._every = every_seconds
        self._printed = -math.inf if ends else time.monotonic() if since is None else since
        self._bar = None
        if is_terminal(self._stream):
            escaped = name.replace("{", "{{").replace("}", "}}")
            self._bar = tqdm(
                total=total,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
                leave=ends,
                bar_format=f"{escaped} {{n_fmt}}/{{total_fmt}} |{{bar:12}}| {{desc}}",
            )

    def update(self, done: int, text: str) -> None:
        """Show that `done` of the total are done, and a text beside it."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.set_description_str(printable(text, one_line=True), refresh=False)
                self._bar.update(done - self._bar.n)
                return
            now = time.monotonic()
            if now - self._printed >= self._every or (self._ends and done >= self._total):
                self._printed = now
                line = f"{self._name} {done}/{self._total}  {text}"
                print(printable(line).rstrip(), file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        text = printable(text)
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """End the live line, which stays as it is or, with `ends` False, goes."""
        if self._bar is not None:
            for end in (self._bar.refresh, self._bar.close):
                with contextlib.suppress(OSError):
                    end()


class Pace:
    """How long is left, by the time that what is done took since the first `update`.

    The first one does not count: programs are compiled before it.
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
        """Done per second; 0 before it is known."""
        return self._rate

    def left(self, rest: float) -> str | None:
        """The time for the rest, as "0:02:39 left"; None before it is known."""
        return left(max(rest, 0) / self._rate) if self._rate > 0 else None


def format_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def readable(size: int) -> str:
    """Bytes as text: "12.0 MiB", from 1024 MiB on "1.00 GiB"."""
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"

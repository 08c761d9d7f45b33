# SPDX-License-Identifier: Apache-2.0
import io
import re
import sys
import time

import jax
import numpy as np
import pytest

from vivit_jax import progress
from vivit_jax.console.devices import compilation_shown
from vivit_jax.progress import CompileClock, LiveLine, Pace, format_table, live_line


class Clock:
    """Stands in for `time` in `vivit_jax.progress`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_no_terminal_gets_a_line_at_intervals(clock):
    stream = io.StringIO()
    line = LiveLine("a.mp4, frame", 100, stream=stream, every_seconds=30, ends=False)
    for second in range(1, 100):
        clock.now += 1
        line.update(second, f"at {second} s")
    line.update(100, "done")
    line.close()
    assert stream.getvalue().splitlines() == [
        f"a.mp4, frame {second}/100  at {second} s" for second in (30, 60, 90)
    ]


@pytest.mark.parametrize("ends", [False, True])
def test_a_terminal_gets_one_live_line_whatever_its_texts_hold(clock, monkeypatch, ends):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    line = LiveLine("{0}{name}[red]\x07.mp4, frame", 4, stream=stream, ends=ends)
    for k in range(1, 5):
        clock.now += 1
        line.update(k, f"text [{k}]")
    line.say("said [b]")
    with line.hidden():
        print("printed", file=stream)
    line.close()
    screen = shown(stream.getvalue())
    assert "\x1b[?25" not in stream.getvalue()  # a killed process would leave the cursor hidden
    assert screen[:2] == ["said [b]", "printed"] and len(screen) == 2 + ends
    if ends:
        assert screen[2].startswith(r"{0}{name}[red]\u0007.mp4, frame 4/4 ")
        assert screen[2].endswith(" text [4]")


@pytest.mark.parametrize(
    ("name", "text", "cut"),
    [
        ("step", "loss " * 20, r"step 3/10 ━+.* loss loss .*…"),
        ("n" * 90, "loss 1.5", r"n+… 3/10 ━+.* loss 1\.5"),
        ("n" * 90, "loss " * 20, r"n+… 3/10 ━+.* loss .*…"),
    ],
)
def test_a_narrow_terminal_cuts_texts_and_keeps_the_count(clock, monkeypatch, name, text, cut):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    line = LiveLine(name, 10, stream=stream)
    line.update(3, text)
    line.close()
    (row,) = shown(stream.getvalue())
    assert len(row.rstrip()) <= 60 and re.fullmatch(cut, row.rstrip()), row


def test_a_terminal_without_a_cursor_gets_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    line = LiveLine("step", 2, stream=stream)
    line.update(1, "loss 1.5")
    line.update(2, "loss 1.0")
    line.close()
    assert stream.getvalue() == "step 1/2  loss 1.5\nstep 2/2  loss 1.0\n"


def shown(text: str) -> list[str]:
    """The lines above the cursor of a terminal after `text`."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return lines[:row]


def test_tables_are_plain_text_of_any_width():
    rows = [("", "[b]ms[/b]", "x"), ("名前", "1.5", "y" * 300), ("a", "22", "")]
    assert format_table(rows) == [
        "      [b]ms[/b]  " + "x".rjust(300),
        "名前        1.5  " + "y" * 300,
        "a            22",
    ]
    assert format_table(rows[::2], align="left") == ["   [b]ms[/b]  x", "a  22"]
    assert format_table([]) == []


@pytest.mark.parametrize("terminal", [False, True])
def test_the_work_goes_on_where_nobody_reads_any_more(clock, terminal):
    class Stream(io.StringIO):
        unread = False

        def isatty(self):
            return terminal

        def write(self, text):
            if self.unread:
                raise BrokenPipeError
            return super().write(text)

    stream = Stream()
    line = LiveLine("a.mp4, frame", 2, stream=stream)
    stream.unread = True
    line.update(1, "text")
    line.say("told")
    clock.now += 60
    line.update(2, "text")
    line.close()


def test_pace_leaves_the_first_update_out(clock):
    pace = Pace()
    clock.now += 60  # of compilation
    pace.update(10)
    assert pace.rate == 0 and pace.left(90) is None
    clock.now += 5
    pace.update(20)
    assert pace.rate == 2 and pace.left(80) == "0:00:40 left"
    clock.now += 5
    pace.update(20)  # a pause counts
    assert pace.left(80) == "0:01:20 left" and pace.left(-3) == "0:00:00 left"


def test_a_notebook_gets_the_table_once(monkeypatch):
    """In a notebook rich shows what any console prints, unless asked not to."""
    table = [["name", "seconds"], ["ours", "1.5"]]
    plain = format_table(table)
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *given: shown.append(given))
    assert format_table(table) == plain and not shown


class Compiler:
    """A compilation that takes until the clock has said something, or for a moment."""

    def __init__(self, monkeypatch, stream, *, long=True):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "_SOON", 0.0 if long else 60.0)
        monkeypatch.setattr(progress, "_LONG", 0.0 if long else 60.0)
        self._clock, self._stream, self._long = CompileClock(), stream, long

    def compile(self, name):
        before = self._stream.tell()
        self._clock.began(name)
        deadline = time.monotonic() + 10
        while self._long and self._stream.tell() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        self._clock.ended()


def test_a_long_compilation_is_a_line_before_and_one_after(monkeypatch):
    stream = io.StringIO()
    Compiler(monkeypatch, stream).compile("jit_step\x07")
    assert stream.getvalue() == (
        "compiling jit_step\\u0007, 0:00:00\ncompiled jit_step\\u0007, 0:00:00\n"
    )


def test_a_short_compilation_is_not_shown(monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        Compiler(monkeypatch, stream, long=False).compile("jit_step")
        assert stream.getvalue() == ""


def test_a_compilation_is_a_clock_on_a_terminal_and_leaves_nothing(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    Compiler(monkeypatch, stream).compile("jit_step")
    text = stream.getvalue()
    assert "compiling jit_step, 0:00:00" in text and "\n" not in text
    assert text.endswith("\r\x1b[2K")


def test_a_compilation_is_told_in_the_live_line_that_there_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    line = LiveLine("step", 10, stream=stream)
    Compiler(monkeypatch, stream).compile("jit_step")
    assert re.search("step 0/10.*compiling jit_step, 0:00:00", stream.getvalue())
    line.update(10, "loss 1.5")
    line.close()
    (row,) = shown(stream.getvalue())
    assert "loss 1.5" in row and "compiling" not in row


def test_work_within_work_is_told_in_the_live_line_that_there_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    line = LiveLine("step", 10, stream=stream)
    with live_line("videos") as update:
        for done in (1, 2):
            update(done, 2)
    assert re.search("step 0/10.*videos 1/2", stream.getvalue())
    line.update(10, "loss 1.5")
    line.close()
    (row,) = shown(stream.getvalue())
    assert "loss 1.5" in row and "videos" not in row


def test_xla_tells_when_it_compiles(monkeypatch):
    heard = []
    monkeypatch.setattr(CompileClock, "began", lambda self, name: heard.append(name))
    monkeypatch.setattr(CompileClock, "ended", lambda self: heard.append("end"))

    def twice(x):
        return 2 * x

    with compilation_shown():
        jax.jit(twice).lower(np.ones(3)).compile()
    assert heard == ["twice", "end"]
    jax.jit(lambda x: 3 * x).lower(np.ones(3)).compile()
    assert len(heard) == 2

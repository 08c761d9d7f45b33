# SPDX-License-Identifier: Apache-2.0
"""A function in a process of its own: what comes back, and that its end is not the caller's."""

import os
import signal
import sys
import time

import pytest

from vivit_jax.errors import UserError
from vivit_jax.processes import Apart, Ended


def work(what, value):
    if what == "refuse":
        os.write(2, b"a library's warning\n")
        raise UserError(value)
    if what == "fail":
        raise KeyError(value)
    if what == "die":
        os.write(2, b"a library's trace\n")
        os.kill(os.getpid(), value)
    if what == "exit":
        os.write(2, b"why it ends\n")
        os._exit(value)
    if what == "sleep":
        time.sleep(value)
    if what == "say":
        print(value, file=sys.stderr)
        os.write(2, b"and a library\n")
    return os.getpid(), value, "colorsys" in sys.modules


@pytest.fixture
def apart():
    with Apart(work, ["colorsys"]) as process:
        yield process


def call(apart, *args):
    apart.begin(*args)
    while not apart.done(1.0):
        pass
    return apart.result()


def test_calls_share_a_process(apart):
    first, second = call(apart, "return", {"any": [1, 2]}), call(apart, "return", None)
    assert first[0] == second[0] != os.getpid()
    assert first[1:] == ({"any": [1, 2]}, True)


def test_what_is_raised(apart, capfd):
    with pytest.raises(UserError, match="^no such mesh$"):
        call(apart, "refuse", "no such mesh")
    with pytest.raises(RuntimeError, match="(?s)in work.*KeyError: 'lost'"):
        call(apart, "fail", "lost")
    assert call(apart, "return", 3)[1] == 3
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="processes end by no signals")
@pytest.mark.parametrize("number", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_an_end_is_told_and_the_next_call_goes_on(apart, number, capfd):
    before = call(apart, "return", 0)[0]
    with pytest.raises(Ended) as told:
        call(apart, "die", signal.Signals[number])
    assert told.value.signal == number
    after = call(apart, "return", 1)
    assert after[0] != before and after[1] == 1
    assert capfd.readouterr().err == ""


def test_an_end_without_a_signal_is_an_error(apart):
    with pytest.raises(RuntimeError, match="ended with 3: why it ends"):
        call(apart, "exit", 3)
    assert call(apart, "return", 1)[1] == 1


def test_what_it_says_is_passed_on_with_a_result(apart, capfd):
    call(apart, "say", "first\x1b[2J")
    call(apart, "say", "second")
    told = "first\\u001b[2J\nand a library\nsecond\nand a library\n"
    assert capfd.readouterr().err == told


def test_leaving_ends_it_whatever_it_does():
    start = time.monotonic()
    with Apart(work) as process:
        pid = call(process, "return", 0)[0]
        process.begin("sleep", 60)
        assert not process.done(0.5)
    assert time.monotonic() - start < 30
    with pytest.raises(OSError):
        os.kill(pid, 0)

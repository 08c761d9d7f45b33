# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, also where a library drops it."""

import contextlib
import gc
import signal
import sys
import threading
import time
import weakref

import pytest
from signals import handled

from vivit_jax import console
from vivit_jax.console import run


def in_a_collection():
    callback = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


def in_the_end_of_an_object():
    thing = threading.Event()
    weakref.finalize(thing, signal.raise_signal, signal.SIGINT)
    del thing


def under_an_except():
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def standard():
    """What a command in a terminal begins with."""
    with handled(signal.SIGINT, signal.default_int_handler):
        yield


def outcome(command) -> int:
    return run("tool", "A tool.", {"go": command, "stay": lambda: None}, ["go"])


@pytest.mark.parametrize("drop", [in_a_collection, in_the_end_of_an_object, under_an_except])
def test_an_interrupt_that_was_dropped_ends_the_command(drop, capsys):
    def command() -> None:
        drop()
        time.sleep(60)

    start = time.monotonic()
    assert outcome(command) == 130
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_what_is_put_in_order_after_an_interrupt_is_not_interrupted():
    done = []

    @contextlib.contextmanager
    def guarded():
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                raise FileNotFoundError
            time.sleep(2 * console.PATIENCE)
            done.append("a generator's finally")

    def command() -> None:
        try:
            with guarded():
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(2 * console.PATIENCE)
            done.append("an except")
            raise

    assert outcome(command) == 130
    assert done == ["a generator's finally", "an except"]


def test_an_interrupt_that_was_dropped_is_told_once_to_what_handles_it_later():
    received = []

    def command() -> None:
        under_an_except()
        with handled(signal.SIGINT, lambda *_: received.append("a signal")):
            time.sleep(4 * console.PATIENCE)

    assert outcome(command) == 0
    assert received == ["a signal"]


def test_a_command_that_ends_leaves_everything_as_it_was():
    hook = sys.unraisablehook
    assert outcome(lambda: None) == 0
    assert outcome(under_an_except) == 130  # so that what was to follow does not
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is hook
    assert not [thread for thread in threading.enumerate() if thread.name == "interrupts"]
    time.sleep(2 * console.PATIENCE)  # the interrupt would come here


def test_an_interrupt_waits_for_an_import_to_end(tmp_path, monkeypatch, capsys):
    """C code that is interrupted in its initialisation crashes."""
    code = "import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n"
    (tmp_path / "interrupted_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found = []

    def command() -> None:
        import interrupted_module

        found.append(interrupted_module.whole)
        time.sleep(60)

    start = time.monotonic()
    assert outcome(command) == 130 and found == [True]
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_what_a_library_makes_of_an_interrupt_is_one(capsys):
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    assert outcome(command) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_other_errors_in_callbacks_are_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: shown.append(dropped.exc_type))

    class Broken:
        def __del__(self):
            raise ValueError

    def command() -> None:
        Broken()

    assert outcome(command) == 0
    assert shown == [ValueError]


def test_interrupts_that_are_ignored_stay_so():
    def command() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(2 * console.PATIENCE)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert outcome(command) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_command_in_another_thread_runs_as_ever():
    done = []
    thread = threading.Thread(target=lambda: done.append(outcome(lambda: None)))
    thread.start()
    thread.join()
    assert done == [0]

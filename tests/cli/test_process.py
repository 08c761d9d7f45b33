# SPDX-License-Identifier: Apache-2.0
"""What only a fresh process shows: imports, start-up time, exit status and stderr."""

import gc
import itertools
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest
from helpers import mostly_slow
from signals import handled

from vivit_jax.console import run


def python(code: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True
    )


def command(module: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True)


def cpu_seconds(start: Callable[[], subprocess.CompletedProcess]) -> float:
    """The processor time of a process that succeeds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start()
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_everything_imports_without_torch_transformers_and_av():
    done = python(
        """
        import sys
        for name in ("torch", "transformers", "av", "huggingface_hub"):
            sys.modules[name] = None  # importing it raises ModuleNotFoundError
        import vivit_jax
        for name in vivit_jax.__all__:
            getattr(vivit_jax, name)
        import checkpoints_convert.__main__
        from vivit_jax.errors import MissingExtra
        try:
            from checkpoints_convert.verify import load_transformers
            load_transformers(None, "VivitModel", "vivit-convert verify")
        except MissingExtra as error:
            assert "[torch]'" in str(error)
        else:
            raise AssertionError("nothing was raised")
        """
    )
    assert done.returncode == 0, done.stderr


def test_conversion_core_needs_neither_jax_nor_torch():
    done = python(
        """
        import sys
        sys.modules["jax"] = sys.modules["torch"] = None
        from checkpoints_convert import rules, source
        from checkpoints_convert.files import open, save
        from checkpoints_convert.layouts import hf, registry
        from checkpoints_convert.tables import hf_videomae, hf_vivit
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "flag"),
    mostly_slow(
        itertools.product(["vivit_jax.cli", "checkpoints_convert"], ["--help", "--versions"]),
        *(("vivit_jax.cli", "--help"), ("checkpoints_convert", "--versions")),
    ),
)
def test_help_and_versions_answer_quickly_and_without_jax(module, flag):
    done = python(
        f"""
        import sys
        from {module}.__main__ import main
        assert main(["{flag}"]) == 0
        heavy = {{"jax", "torch", "transformers", "av", "flax"}} & sys.modules.keys()
        assert not heavy, heavy
        """
    )
    assert done.returncode == 0, done.stderr
    # Relative to unavoidable imports, since load on a core slows down both. Measured 1.5; 3 would
    # mean that JAX is imported.
    least = min(cpu_seconds(lambda: python("import numpy, tyro")) for _ in range(3))
    for _ in range(3):
        seconds = cpu_seconds(lambda: command(module, flag))
        if seconds < 2.5 * least:
            return
    raise AssertionError(f"{flag} takes {seconds:.2f} s, imports alone {least:.2f} s")


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        ("vivit_jax.cli", ["predict", "x.mp4", "--model", "/nowhere"], "/nowhere"),
        ("checkpoints_convert", ["inspect", "/nowhere"], "/nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(module, args, message):
    done = command(module, *args)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_output_that_nobody_reads_to_its_end_is_no_error():
    """As with `| head -1`."""
    run = [sys.executable, "-m", "vivit_jax.cli", "recipes"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        done.stdout.close()
        assert (done.stderr.read(), done.wait()) == ("", 1)


@pytest.mark.parametrize("closed", mostly_slow([1, 2], 1))
def test_a_stream_that_is_closed_is_no_error(closed):
    run = [sys.executable, "-m", "vivit_jax.cli", "predict", "x.mp4", "--model", "/nowhere"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *run], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == (closed == 1)


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def go() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    with handled(signal.SIGINT, signal.default_int_handler):
        assert run("tool", "A tool.", {"go": go, "stay": lambda: None}, ["go"]) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_an_interrupt_that_a_callback_drops_is_sent_again(capsys):
    """JAX has a callback of the garbage collector, and Python only prints what such raise."""

    def collected(phase: str, info: dict) -> None:
        gc.callbacks.remove(collected)
        signal.raise_signal(signal.SIGINT)

    def go() -> None:
        gc.callbacks.append(collected)
        gc.collect()
        time.sleep(60)

    before = sys.unraisablehook
    with handled(signal.SIGINT, signal.default_int_handler):
        assert run("tool", "A tool.", {"go": go, "stay": lambda: None}, ["go"]) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"
    assert sys.unraisablehook is before


def test_other_errors_of_callbacks_are_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: shown.append(dropped.exc_value))

    def fail(phase: str, info: dict) -> None:
        gc.callbacks.remove(fail)
        raise ValueError("wrong")

    def go() -> None:
        gc.callbacks.append(fail)
        gc.collect()

    assert run("tool", "A tool.", {"go": go, "stay": lambda: None}, ["go"]) == 0
    assert list(map(str, shown)) == ["wrong"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_whose_command_was_stopped_dies_of_the_signal(number):
    code = """
        import sys
        from vivit_jax.console import run, stopped_by

        def go() -> int:
            print("saved")
            return stopped_by(NAME)

        sys.exit(run("tool", "A tool.", {"go": go, "stay": lambda: None}, None))
    """
    code = code.replace("NAME", repr(number.name))
    done = python(code, "go")
    assert (done.returncode, done.stdout, done.stderr) == (-number, "saved\n", "")


def test_an_interrupt_while_a_program_is_compiled_ends_the_process_without_a_crash():
    # XLA keeps compiling in a thread of its own, and would crash at the interpreter's exit.
    code = """
        import os, signal, sys, threading
        from vivit_jax.console import run

        def go():
            import jax
            import jax.numpy as jnp

            def long(x):
                for _ in range(1500):
                    x = jnp.sin(x) @ x
                return x

            lowered = jax.jit(long).lower(jnp.ones((4, 4)))
            print("compiling")
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            lowered.compile()
            print("compiled")

        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["tool", "go"]
        sys.exit(run("tool", "A tool.", {"go": go, "stay": lambda: None}))
    """
    done = python(code)
    assert done.stderr == "tool: interrupted\n"
    assert done.stdout == "compiling\n"
    assert done.returncode == -signal.SIGINT

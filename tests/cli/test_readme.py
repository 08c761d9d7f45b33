# SPDX-License-Identifier: Apache-2.0
"""README.md is true: its examples run, its commands work, its test command is CI's."""

import re
import shlex
from pathlib import Path

import pytest

import checkpoints_convert.__main__
import vivit_jax.cli.__main__

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
PROGRAMS = {
    ".venv/bin/vivit-jax": vivit_jax.cli.__main__.main,
    ".venv/bin/vivit-convert": checkpoints_convert.__main__.main,
}
COMMANDS = [line for line in SHELL if line.split()[0] in PROGRAMS]
SETUP = [line for line in SHELL if line not in COMMANDS]


@pytest.fixture
def beside_a_demo(finished, tmp_path, monkeypatch):
    """A working directory that holds vivit-demo, as README's reader has it."""
    (tmp_path / "vivit-demo").symlink_to(finished[0])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1][:40])
def test_python_examples_run(code, beside_a_demo):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_work(line, beside_a_demo):
    program, *args = shlex.split(line)
    assert PROGRAMS[program](args) == 0


def test_setup_lines_are_the_ones_ci_runs():
    demo, tests = SETUP
    assert demo.endswith(".venv/bin/vivit-jax demo")
    assert tests in (ROOT / ".ci/run").read_text().splitlines()


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", README)


def test_there_is_something_to_test():
    assert len(PYTHON) >= 2 and len(COMMANDS) >= 5

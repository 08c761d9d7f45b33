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
SHELL = [text.splitlines() for language, text in BLOCKS if language == "sh"]
PROGRAMS = {
    ".venv/bin/vivit-jax": vivit_jax.cli.__main__.main,
    ".venv/bin/vivit-convert": checkpoints_convert.__main__.main,
}
COMMANDS = [block for block in SHELL if block[0].split()[0] in PROGRAMS]
SETUP = [line for block in SHELL if block not in COMMANDS for line in block]


@pytest.fixture
def beside_a_demo(finished, tmp_path, monkeypatch):
    """A working directory that holds vivit-demo, as README's reader has it, and an image model.

    The image model has the names and files of google/vit-base-patch16-224 at a tenth of its width.
    """
    import transformers

    (tmp_path / "vivit-demo").symlink_to(finished[0])
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    image_model = transformers.ViTForImageClassification(config)
    image_model.save_pretrained(tmp_path / "vit-base-patch16-224")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1][:40])
def test_python_examples_run(code, beside_a_demo):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block[0][:60])
def test_commands_work(block, beside_a_demo):
    for line in block:
        program, *args = shlex.split(line)
        assert PROGRAMS[program](args) == 0, line


def test_setup_lines_are_the_ones_ci_runs():
    demo, tests = SETUP
    assert demo.endswith(".venv/bin/vivit-jax demo")
    assert tests in (ROOT / ".ci/run").read_text().splitlines()


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", README)


def test_there_is_something_to_test():
    assert len(PYTHON) >= 4 and sum(map(len, COMMANDS)) >= 10

# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/ are true: examples run, commands work, the test command is CI's."""

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import PROGRAM, TINY
from helpers import random_params

import checkpoints_convert
import checkpoints_convert.__main__
import vivit_jax
import vivit_jax.cli.__main__
from vivit_jax.models.build import build_model

ROOT = Path(__file__).parents[2]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
TEXT = "\n".join(PAGES.values())
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(TEXT)
# What is in README.md runs always, what is in docs/ alone with -m slow.
FRONT = [text for _, text in BLOCK.findall(PAGES[ROOT / "README.md"])]
MOST_LINES = 220  # of the front page
MOST_BYTES = 400_000  # of a picture
# tests/train/test_python_page.py runs the examples of this page, in their order.
OWN_TEST = re.findall(
    r"^```python\n(.*?)^```", PAGES[ROOT / "docs/python.md"], re.MULTILINE | re.DOTALL
)
PYTHON = [text for language, text in BLOCKS if language == "python" and text not in OWN_TEST]
SHELL = [text.splitlines() for language, text in BLOCKS if language == "sh"]
PROGRAMS = {
    ".venv/bin/vivit-jax": vivit_jax.cli.__main__.main,
    ".venv/bin/vivit-convert": checkpoints_convert.__main__.main,
}
LONG = ("demo", "pretrain", "finetune")
COMMANDS = [block for block in SHELL if block[0].split()[0] in PROGRAMS]
# The epsilon of the authors' norms, without which nothing is written as theirs.
AUTHORS = dict(layer_norm_eps=1e-6, fc_norm_eps=1e-6, decoder_norm_eps=1e-6)
SETUP = [line for block in SHELL if block not in COMMANDS for line in block]


@pytest.fixture
def beside_a_demo(finished, tmp_path, monkeypatch):
    """A working directory that holds vivit-demo, as README's reader has it, and published models.

    They have the names and files of google/vit-base-patch16-224, MCG-NJU/videomae-base and of a
    model of VideoMAE V2's authors, and are much smaller.
    """
    import transformers

    (tmp_path / "vivit-demo").symlink_to(finished[0])
    monkeypatch.chdir(tmp_path)
    _write_videomae("videomae-base", "pretraining", hidden_size=48, num_attention_heads=4)
    classifier = dict(hidden_size=384, num_attention_heads=6, num_labels=710, **AUTHORS)
    _write_videomae("k710", "classification", **classifier)
    assert PROGRAMS[".venv/bin/vivit-convert"](["convert", "k710", "pth", "--to", "videomae"]) == 0
    Path("pth/checkpoint.pth").rename("vit_s_k710_dl_from_giant.pth")
    Path("label_710to400.json").write_text(str(list(range(709, 309, -1))))
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    image_model = transformers.ViTForImageClassification(config)
    image_model.save_pretrained(tmp_path / "vit-base-patch16-224")


def _write_videomae(directory, head, **sizes):
    config = vivit_jax.VideoMAEConfig(
        num_hidden_layers=1,
        intermediate_size=64,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        use_mean_pooling=head != "pretraining",
        **sizes,
    )
    model = build_model(config, head)
    vivit_jax.save_pretrained(directory, model, random_params(model, scale=0.02))


def _slow_unless(quick):
    return [] if quick else [pytest.mark.slow]


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, marks=_slow_unless(code in FRONT)) for code in PYTHON],
    ids=lambda code: code.splitlines()[-1][:40],
)
def test_python_examples_run(code, beside_a_demo):
    exec(compile(code, "example of a page", "exec"), {})


def _quick(block):
    trains = any(shlex.split(line)[1] in LONG for line in block)
    return not trains and block in [text.splitlines() for text in FRONT]


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=_slow_unless(_quick(block))) for block in COMMANDS],
    ids=lambda block: block[0][:60],
)
def test_commands_work(block, beside_a_demo):
    for line in block:
        program, *args = shlex.split(line)
        args += TINY if args[0] == "demo" else ()
        if args[0] in LONG:
            done = subprocess.run([*PROGRAM, *args], capture_output=True, text=True)
            assert done.returncode == 0, (line, done.stderr)
        else:
            assert PROGRAMS[program](args) == 0, line


def _examples():
    """The doctests of every module's docstrings, by name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for package in (vivit_jax, checkpoints_convert):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                module = importlib.import_module(found.name)
                yield from (test for test in finder.find(module, found.name) if test.examples)


@pytest.mark.parametrize("example", list(_examples()), ids=lambda example: example.name)
def test_examples_in_docstrings_run(example, beside_a_demo):
    results = doctest.DocTestRunner().run(example)
    assert results.attempted and not results.failed


def test_docstrings_hold_no_code_that_is_not_run():
    for package in (vivit_jax, checkpoints_convert):
        for path in Path(package.__path__[0]).rglob("*.py"):
            assert "```" not in path.read_text(), path


def test_setup_lines_are_the_ones_ci_runs():
    demo, tests = SETUP
    assert demo.endswith(".venv/bin/vivit-jax demo")
    assert tests in (ROOT / ".ci/run").read_text().splitlines()


def test_no_placeholder_is_left():
    prose = re.sub(r"`[^`]*`", "", TEXT)  # code may name environment variables
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", prose)


def test_the_front_page_is_short():
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links to files of the repository, with the heading after #, and pictures, which are small."""
    for picture, target in re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not picture or path.stat().st_size <= MOST_BYTES, target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", PAGES[path], re.MULTILINE)
            anchors = [
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
            ]
            assert anchor in anchors, target


def test_there_is_something_to_test():
    assert len(PAGES) >= 7 and len(PYTHON) >= 4 and sum(map(len, COMMANDS)) >= 10

# SPDX-License-Identifier: Apache-2.0
import os
import shlex
import sys
from pathlib import Path

import pytest

from vivit_jax import errors
from vivit_jax.errors import MissingExtra, closest, counted, install, similar, there_are

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A Python with a pip beside it, in an environment that is not activated."""
    beside = tmp_path / ".venv" / "bin"
    beside.mkdir(parents=True)
    name = "pip.exe" if os.name == "nt" else "pip"
    (beside / name).write_text("#!/bin/sh\n")
    (beside / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", os.defpath)
    return beside / name


def test_a_checkout_is_installed_from_where_it_is(pip, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert install("torch") == f"{pip} install -e '.[torch]'"
    monkeypatch.chdir(tmp_path)
    assert install("torch") == f".venv/bin/{pip.name} install -e '{ROOT}[torch]'"
    assert shlex.split(install("torch"))[-1] == f"{ROOT}[torch]"
    monkeypatch.setenv("PATH", str(pip.parent))
    assert install("torch") == f"pip install -e '{ROOT}[torch]'"


def test_an_installed_wheel_goes_by_its_name(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(pip.parent))
    site = tmp_path / "site-packages"
    (site / "vivit_jax").mkdir(parents=True)
    monkeypatch.setattr(errors, "__file__", str(site / "vivit_jax" / "errors.py"))
    assert install("hub") == "pip install 'vivit_jax[hub]'"
    # A project of a user that holds a copy is not this package's checkout.
    (site / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    assert install("hub") == "pip install 'vivit_jax[hub]'"
    assert "needs the package 'x', which is not installed: pip install 'vivit_jax[hub]'" in str(
        MissingExtra("x", "hub", "this")
    )


def test_names_that_are_meant():
    known = ["evaluate", "export", "extract"]
    assert similar("evalute", known) == ["evaluate"]
    assert closest("evalute", known, short=True) == "; did you mean evaluate?"
    assert closest("evalute", known) == "; did you mean evaluate? known: evaluate, export, extract"
    assert closest("z", known, short=True) == "; known: evaluate, export, extract"


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "clip", "0 clips"), (1, "clip", "1 clip"), (2, "class", "2 classes"),
        (1, "class", "1 class"), (3, "batch", "3 batches"), (4, "epoch", "4 epochs"),
        (1234567, "video", "1,234,567 videos"),
    ],
)  # fmt: skip
def test_numbers_of_things_in_words(count, noun, text):
    assert counted(count, noun) == text
    assert there_are(count, noun) == f"there {'is' if count == 1 else 'are'} {text}"

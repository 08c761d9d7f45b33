# SPDX-License-Identifier: Apache-2.0
"""Who may write to the directory of a run."""

import json

import pytest
from tiny_recipes import FINETUNE, changed

from vivit_jax.errors import UserError
from vivit_jax.recipes.settings import to_dict
from vivit_jax.train.start.initial_model import check_same, described_base, described_model
from vivit_jax.train.storage.run_directory import (
    BAD_CLIPS,
    MODEL,
    RECIPE,
    VALIDATION,
    RunDirectory,
    saved_recipe,
)


def test_two_runs_that_start_together_do_not_mix(tmp_path):
    """Both found the directory new before either wrote to it."""
    first, second = (RunDirectory(tmp_path / "run", FINETUNE, resume=False) for _ in range(2))
    first.begin({"a": 1})
    with pytest.raises(UserError, match="run: another process is training into it; wait for"):
        second.begin({"a": 2})
    with pytest.raises(UserError, match="another process is training into it"):
        RunDirectory(tmp_path / "run", FINETUNE, resume=True)
    first.close()
    with pytest.raises(UserError, match="holds a run; continue it with --resume"):
        second.begin({"a": 2})
    second.close()
    assert (tmp_path / "run" / MODEL).read_text() == '{\n  "a": 1\n}\n'
    again = RunDirectory(tmp_path / "run", FINETUNE, resume=True)
    again.begin(None)
    again.close()


def test_a_run_may_go_on_in_other_parts(tmp_path):
    """What 8 devices take at once, one may not; a step in parts is tested in test_step."""
    first = RunDirectory(tmp_path, FINETUNE, resume=False)
    first.begin(None)
    first.close()
    parts = changed(FINETUNE, train__accumulate=4)
    again = RunDirectory(tmp_path, parts, resume=True)
    again.begin(None)
    again.close()
    assert saved_recipe(tmp_path) == parts


@pytest.mark.parametrize(
    ("name", "text"),
    [(VALIDATION, ""), (VALIDATION, '{"step"'), (BAD_CLIPS, "{"), (BAD_CLIPS, '{"clips": 3}')],
)
def test_a_damaged_file_is_refused_before_the_run_goes_on(tmp_path, name, text):
    """Not at the next validation or checkpoint, for which it is read."""
    first = RunDirectory(tmp_path, FINETUNE, resume=False)
    first.begin(None)
    first.close()
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} (is not valid JSON|has changed).*; remove it$"):
        RunDirectory(tmp_path, FINETUNE, resume=True)
    (tmp_path / name).unlink()
    RunDirectory(tmp_path, FINETUNE, resume=True).close()


def test_files_that_are_no_json(tmp_path):
    (tmp_path / RECIPE).write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="recipe.json is not valid JSON: .* restore it"):
        saved_recipe(tmp_path)
    (tmp_path / RECIPE).write_text(json.dumps({**to_dict(FINETUNE), "taks": "finetune"}))
    with pytest.raises(UserError, match="recipe.json: taks: there is no such field.* restore it"):
        saved_recipe(tmp_path)
    readers = (described_model, described_base, lambda path: check_same(path, {}))
    for read in readers:
        with pytest.raises(UserError, match="there is no .*model.json, which describes the model"):
            read(tmp_path / MODEL)
    (tmp_path / MODEL).write_text("{")
    for read in readers:
        with pytest.raises(UserError, match="model.json is not valid JSON"):
            read(tmp_path / MODEL)

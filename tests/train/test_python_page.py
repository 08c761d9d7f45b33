# SPDX-License-Identifier: Apache-2.0
"""docs/python.md is true: its examples are short and run, one after the other, on tiny models."""

import contextlib
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_recipes import changed
from tiny_runs import lines, share_steps, small_recipe

import vivit_jax
import vivit_jax.train
from vivit_jax.data.datasets.synthetic import write_mp4

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
MOST_LINES = 15


class Wandb(types.ModuleType):
    """What Weights & Biases offers of that; a step may not be lower than one before."""

    def __init__(self):
        super().__init__("wandb")
        self.rows = []

    def init(self, entity=None, project=None, config=None):
        assert project

    def log(self, data: dict, step=None, commit=None):
        assert all(isinstance(value, float | int) for value in data.values())
        assert step >= max([0, *(row[0] for row in self.rows)])
        self.rows.append((step, data))


class Mlflow(types.ModuleType):
    """What MLflow offers of that; its metrics are floats with names of these characters."""

    def __init__(self):
        super().__init__("mlflow")
        self.rows, self.running = [], False

    @contextlib.contextmanager
    def start_run(self):
        self.running = True
        yield self
        self.running = False

    def log_metrics(self, metrics, step=None, synchronous=None):
        assert self.running and isinstance(step, int)
        assert all(re.fullmatch(r"[\w.\- /]+", name) for name in metrics)
        assert all(isinstance(value, float | int) for value in metrics.values())
        self.rows.append((step, metrics))
        return object()  # as MLflow does


def test_examples_are_short():
    assert len(BLOCKS) >= 11
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line]) <= MOST_LINES, block


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = changed(small_recipe(tmp_path / "clips", classes=4), data__train="")
    monkeypatch.setattr(vivit_jax.train, "recipe_named", {"demo-finetune": recipe}.__getitem__)
    modules = {"wandb": Wandb(), "mlflow": Mlflow()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    clip = np.load(tmp_path / "clips" / "test" / "0" / "0.npy")
    write_mp4(tmp_path / "walk.mp4", clip)
    found: dict = {}
    with share_steps(), jax.numpy_rank_promotion("allow"):  # as users have it
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"example {number} of docs/python.md", "exec"), found)
    steps = [line["step"] for line in lines(tmp_path / "run")]
    for module in modules.values():
        assert [step for step, row in module.rows if "train/loss" in row] == steps
        assert [step for step, row in module.rows if "evaluate/accuracy" in row] == [2, 4]
    assert {"from_teacher", "accuracy"} <= lines(tmp_path / "run-student")[0].keys()
    assert len({lines(tmp_path / name)[0]["loss"] for name in ("run", "run-noise")}) == 2
    assert found["params"]["Conv_0"]["kernel"].shape == (3, 7, 7, 3, 16)
    assert [*(tmp_path / "trace").rglob("*.xplane.pb")]
    assert np.shape(found["probabilities"]) == (3, 4)
    np.testing.assert_allclose(found["probabilities"], found["probabilities"][:1].repeat(3, 0))
    vivit_jax.from_pretrained("nnx-model")
    assert "VideoClassifier(VideoMAEForVideoClassification: 4 classes" in capsys.readouterr().out

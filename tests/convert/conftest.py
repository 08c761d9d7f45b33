# SPDX-License-Identifier: Apache-2.0
import functools
import json
import shutil
from pathlib import Path

import pytest
from commands import run_command
from tiny_checkpoints import Checkpoints, read_safetensors
from tiny_image_models import ImageModels


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return ImageModels(tmp_path_factory.mktemp("image_models"))


@pytest.fixture
def run(capsys):
    return functools.partial(run_command, capsys)


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """A copy of a checkpoint with its tensors and config changed by the given functions."""

    def make(case: str, edit=lambda tensors: None, config=lambda values: None) -> Path:
        from safetensors.numpy import save_file

        path = tmp_path / "damaged"
        shutil.copytree(checkpoints.path(case), path)
        tensors = read_safetensors(path)
        edit(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        values = json.loads((path / "config.json").read_text())
        config(values)
        (path / "config.json").write_text(json.dumps(values))
        return path

    return make

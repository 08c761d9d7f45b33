# SPDX-License-Identifier: Apache-2.0
"""The model of a finished run, found without opening its checkpoints."""

from pathlib import Path

from vivit_jax.errors import CheckpointError, UserError, quoted
from vivit_jax.files.addresses import Place
from vivit_jax.files.json_files import read_json

_CONFIG = "config.json"


def model_directory(path: Place) -> Place:
    """The directory of the model that a path stands for.

    A path with a config.json is one itself; of a run of `vivit_jax.train.loop.train` it is the best
    model, of another command's output (`demo`, `probe`) the directory `model`. Raises
    CheckpointError for anything else, saying what is there.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{quoted(path)} is not a directory; expected a run, or a saved model"
        )
    if (path / _CONFIG).exists():
        return path
    if (path / "models").is_dir():
        return best_model(path)
    if (path / "model" / _CONFIG).exists():
        return path / "model"
    parents = path.resolve().parents if isinstance(path, Path) else ()
    run = next((p for p in parents if (p / "models").is_dir()), None)
    if run is not None:
        raise CheckpointError(
            f"{path} holds the state of training, which is not published; name the run, {run}"
        )
    raise CheckpointError(
        f"{path} holds no model: expected {_CONFIG} and weights, or a run with models/"
    )


def best_model(run: Place) -> Place:
    """The model of a run with the highest score, the latest of equal ones; without scores the last.

    Scores are those of its checkpoints. Raises CheckpointError for a run without models.
    """
    steps = [p for p in (run / "models").iterdir() if p.name.isdecimal()]
    models = {int(p.name): p for p in steps}
    if not models:
        raise CheckpointError(f"{run} has no model yet: {run / 'models'} is empty; let it run on")
    scores = {step: _score(run / "checkpoints" / str(step)) for step in models}
    return models[max(models, key=lambda step: (scores[step], step))]


def _score(checkpoint: Place) -> float:
    """The score that a checkpoint was saved with; below all scores where there is none."""
    try:
        score = read_json(checkpoint / "run" / "metadata")["metrics"]["score"]
    except (OSError, UserError, KeyError, TypeError):
        score = None
    return float("-inf") if not isinstance(score, int | float) else score

# SPDX-License-Identifier: Apache-2.0
"""`--model` and `--config` of the commands that use a model."""

import logging
from typing import Any

from checkpoints_convert.layouts.hf import config_path
from checkpoints_convert.source import Source, open_source
from vivit_jax.files.addresses import place
from vivit_jax.train.start.initial_model import of_the_function
from vivit_jax.train.storage.saved_models import model_directory

logger = logging.getLogger(__name__)


def best_of_run(model: str, flag: str) -> str:
    """The best model of what a flag names, where that is a run, which is logged; else the name."""
    given = place(model)
    if model.startswith("hf://"):  # a hub id, and runs are not on the hub
        return model
    is_run = (given / "models").is_dir() or (given / "model").is_dir()
    if not is_run or (given / "config.json").exists():
        return model
    best = str(model_directory(given))
    logger.warning("%s %s is a run; its best model is %s", flag, given, best)
    return best


def open_model(model: str, changes: tuple[str, ...], **execution: Any) -> Source:
    """Open a checkpoint, weights not read; `changes` are the settings of `--config`.

    A run of training or of `probe` stands for its best model, which is logged. Warns where settings
    contradict a config.json: the weights then compute another function.
    """
    source = open_source(best_of_run(model, "--model"), settings=changes, **execution)
    config = source.config
    if changes and source.config_json is not None:
        stored = source.config_json.config
        differing = [
            f"{name}={now} (it says {was})"
            for name in of_the_function(config, source.head)
            if (now := getattr(config, name)) != (was := getattr(stored, name))
        ]
        if differing:
            message = "--config changes what the model computes compared with %s: %s"
            logger.warning(message, config_path(source.checkpoint.path), ", ".join(differing))
    return source

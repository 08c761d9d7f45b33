# SPDX-License-Identifier: Apache-2.0
"""`--model` and `--config` of the commands that use a model."""

import logging
from typing import Any

from checkpoints_convert.layouts.hf import config_path, read_config
from checkpoints_convert.source import open_source
from vivit_jax.train.initial_model import of_the_function

logger = logging.getLogger(__name__)


def open_model(model: str, changes: tuple[str, ...], **execution: Any):
    """The opened checkpoint, weights not read; `changes` are the settings of `--config`.

    Warns where these contradict a config.json: the weights then compute another function.
    """
    source = open_source(model, settings=changes, **execution)
    path, config = source.checkpoint.path, source.config
    if changes and config_path(path).is_file():
        stored = read_config(path, **execution).config
        differing = [
            f"{name}={now} (it says {was})"
            for name in of_the_function(config, source.head)
            if (now := getattr(config, name)) != (was := getattr(stored, name))
        ]
        if differing:
            message = "--config changes what the model computes compared with %s: %s"
            logger.warning(message, config_path(path), ", ".join(differing))
    return source

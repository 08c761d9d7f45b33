# SPDX-License-Identifier: Apache-2.0
"""`--model` and `--config` of the commands that use a model."""

import logging
from typing import Any

from checkpoints_convert.layouts.hf import config_path
from checkpoints_convert.source import Source, open_source
from vivit_jax.train.initial_model import of_the_function

logger = logging.getLogger(__name__)


def open_model(model: str, changes: tuple[str, ...], **execution: Any) -> Source:
    """Open a checkpoint, weights not read; `changes` are the settings of `--config`.

    Warns where these contradict a config.json: the weights then compute another function.
    """
    source = open_source(model, settings=changes, **execution)
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

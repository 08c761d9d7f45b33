# SPDX-License-Identifier: Apache-2.0
"""`--model` and `--config` of the commands that use a model."""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

from checkpoints_convert.settings import joined

logger = logging.getLogger(__name__)


def open_model(model: str, config: Iterable[Iterable[str]], **execution: Any):
    """The opened checkpoint, weights not read, and the settings of `--config` to load it with.

    Warns where these contradict a config.json: the weights then compute another function.
    """
    from checkpoints_convert.config_json import config_path, read_config
    from checkpoints_convert.source import open_source

    changes = joined(config)
    source = open_source(model, settings=changes, **execution)
    path = source.checkpoint.path
    if changes and config_path(path).is_file():
        stored, _ = read_config(path, **execution)
        differing = [
            f"{field.name}={now} (it says {was})"
            for field in dataclasses.fields(stored)
            if (now := getattr(source.config, field.name)) != (was := getattr(stored, field.name))
        ]
        if differing:
            told = "--config makes another function of the weights than %s does: %s"
            logger.warning(told, config_path(path), ", ".join(differing))
    return source, changes

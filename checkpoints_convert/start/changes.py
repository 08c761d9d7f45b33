# SPDX-License-Identifier: Apache-2.0
"""Changes to a model's config, sorted by what they change."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from checkpoints_convert.pretrained import Labels
from vivit_jax.config import Config
from vivit_jax.errors import ConfigError

_LABELS = tuple(field.name for field in dataclasses.fields(Labels))


class Changes(NamedTuple):
    """The labels of a new classifier, how the model runs, and the other fields."""

    labels: Labels
    execution: dict[str, Any]
    settings: dict[str, Any]


def sort_changes(cls: type[Config], config: Mapping[str, Any]) -> Changes:
    """Sort the fields of a mapping; ConfigError for names that the config does not have."""
    check_fields(cls, config)
    running = {f.name for f in dataclasses.fields(cls) if f.metadata.get("execution")}
    labels = Labels(**{name: config[name] for name in _LABELS if name in config})
    execution = {name: value for name, value in config.items() if name in running}
    rest = {k: v for k, v in config.items() if k not in running and k not in _LABELS}
    return Changes(labels, execution, rest)


def check_fields(cls: type[Config], config: Mapping[str, Any]) -> None:
    """ConfigError for names that a config does not have."""
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [str(name) for name in config if name not in known]
    if unknown:
        raise ConfigError(
            f"config: {cls.__name__} has no {', '.join(unknown)}; expected some of "
            f"{', '.join(known)}"
        )

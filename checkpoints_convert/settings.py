# SPDX-License-Identifier: Apache-2.0
"""The `--config` option of every command, and others that take key=value."""

import itertools
from collections.abc import Iterable
from typing import Annotated

import tyro

from vivit_jax.errors import ConfigError

# Both `--config a=1 b=2` and `--config a=1 --config b=2`.
KeyValues = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="KEY=VALUE"),
]
Settings = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="KEY=VALUE",
        help="Changes to the config, with the field names of config.json; what a file without one "
        "does not say has to be given, such as num_frames=32 image_size=224.",
    ),
]


def in_order(settings: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings in the order in which they were given."""
    return tuple(itertools.chain.from_iterable(settings))


def joined(config: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings of `--config`; ConfigError for what is none, as a file that stands behind it."""
    settings = in_order(config)
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(
                f"--config takes KEY=VALUE, got {setting!r}; what is no setting goes before it"
            )
    return settings

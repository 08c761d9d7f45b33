# SPDX-License-Identifier: Apache-2.0
"""The `--config` option of every command."""

import itertools
from collections.abc import Iterable
from typing import Annotated

import tyro

# Both `--config a=1 b=2` and `--config a=1 --config b=2`.
Settings = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="KEY=VALUE"),
]


def joined(settings: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings in the order in which they were given."""
    return tuple(itertools.chain.from_iterable(settings))

# SPDX-License-Identifier: Apache-2.0
"""Infers the config of checkpoints shipped without one.

For the layouts of authors who keep the config in code.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vivit_jax.config import Config
from vivit_jax.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", bound=Config)


def build_config(
    path: Path,
    cls: type[AnyConfig],
    found: Mapping[str, Any],
    given: Mapping[str, Any],
    asked: Mapping[str, tuple[str, ...]],
    *,
    assumed: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    hint: str = "",
    **execution: Any,
) -> AnyConfig:
    """The config of the fields `found` in the tensors and `given` by the user.

    `asked` are fields that only the user knows, with examples of each. The user may override
    `assumed` fields, and those of `found` that are `free`. Raises one ConfigError for everything
    missing, adding `hint`, and one for everything that contradicts the tensors.
    """
    missing = {name: options for name, options in asked.items() if name not in given}
    if missing:
        listed = ", ".join(
            f"{name} ({' or '.join(options)})" if len(options) > 1 else name
            for name, options in missing.items()
        )
        flags = " ".join(f"{name}={options[0]}" for name, options in missing.items())
        raise ConfigError(
            f"{path}: the weights do not say {listed}; {hint}Give them, for "
            f"example --config {flags}"
        )
    wrong = [
        f"{name}={given[name]!r}, the weights say {value!r}"
        for name, value in found.items()
        if name in given and given[name] != value and name not in free
    ]
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}. Leave these settings out (--config)")
    try:
        return cls(**{**(assumed or {}), **found, **given}, **execution)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def count_blocks(names: Iterable[str], block: str) -> int:
    """The number of blocks whose names begin with `block`, a pattern with the number as group 1."""
    found = (re.match(block, name) for name in names)
    return max((int(match.group(1)) for match in found if match), default=-1) + 1

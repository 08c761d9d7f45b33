# SPDX-License-Identifier: Apache-2.0
"""Finds the file of a checkpoint that describes its processor."""

from pathlib import Path
from typing import Any

from vivit_jax.data.transforms.processor_keys import type_of_model
from vivit_jax.errors import ConfigError, UserError
from vivit_jax.files.json_files import read_json

# transformers 5 looks for a nested section first; its video processors write the video files.
CONFIG_FILES = (
    ("processor_config.json", "image_processor"),
    ("preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
)


def processor_type_beside(path: Path) -> str | None:
    """The processor type that fits the model of the config.json beside a file."""
    try:
        return type_of_model(read_json(path.parent / "config.json"))
    except (OSError, UserError):
        return None  # loading the model reports what is wrong with its config


def processor_file(directory: Path) -> Path | None:
    """The file that `from_pretrained` reads in a directory, None if there is none.

    Raises `ConfigError` for a file that is not JSON.
    """
    found = first_config(candidate_files(directory))
    return found and found[0]


def candidate_files(directory: Path) -> list[tuple[Path, str | None]]:
    return [(directory / name, section) for name, section in CONFIG_FILES]


def first_config(candidates: list[tuple[Path, str | None]]) -> tuple[Path, Any] | None:
    """Returns the first file, or section of a file, that exists, with its content."""
    for path, section in candidates:
        if not path.exists():
            continue
        hint = "expected a preprocessor_config.json, or the directory that holds one"
        config = read_json(path, ConfigError, hint)
        if section is None:
            return path, config
        if isinstance(config, dict) and section in config:
            return path, config[section]
    return None

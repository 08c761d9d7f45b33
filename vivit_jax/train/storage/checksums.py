# SPDX-License-Identifier: Apache-2.0
"""Checksums of a checkpoint's files, by which damage is noticed.

Each part of a checkpoint (its arrays, its plain values) has a checksums.json with the SHA-256 of
each file. It is written after all processes have written their files and before Orbax renames the
checkpoint to its step, so that a step never lacks it.
"""

import json
from pathlib import Path
from typing import Any

import jax

from vivit_jax.files.inputs import stand_in
from vivit_jax.files.json_files import read_json
from vivit_jax.files.reading import sha256_of
from vivit_jax.files.staging import sync

CHECKSUMS = "checksums.json"
# Orbax writes this file afterwards; only its presence matters.
_AFTERWARDS = "commit_success.txt"


def handlers(processes: Any) -> tuple[Any, Any]:
    """Orbax's handlers for arrays and for JSON values, which also write checksums.

    `processes` are its MultiprocessingOptions: those that take part.
    """
    import orbax.checkpoint as ocp

    class Arrays(ocp.StandardCheckpointHandler):
        def finalize(self, directory):
            super().finalize(directory)
            _write(Path(directory))

        @classmethod
        def typestr(cls):  # so that plain Orbax can open the checkpoint
            return ocp.StandardCheckpointHandler.typestr()

    class Plain(ocp.JsonCheckpointHandler):
        def finalize(self, directory):
            super().finalize(directory)
            _write(Path(directory))

        @classmethod
        def typestr(cls):
            return ocp.JsonCheckpointHandler.typestr()

    return Arrays(multiprocessing_options=processes), Plain(multiprocessing_options=processes)


def damage(directory: Path) -> str | None:
    """How a part of a checkpoint differs from what was written; None if it does not.

    Raises FileNotFoundError if it has no checksums.
    """
    try:
        listed = read_json(directory / CHECKSUMS)["sha256"]
        listed = {str(name): str(value) for name, value in listed.items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{directory.name}/{CHECKSUMS} has changed since it was written"
    # File systems and desktops add hidden files of their own.
    seen = {name for name in _names(directory) if not name.rpartition("/")[2].startswith(".")}
    more = sorted(seen - listed.keys())
    if more:
        return f"{directory.name}/{more[0]} is not listed in {CHECKSUMS}"
    for name, value in listed.items():
        if (instead := stand_in(directory / name)) is not None:
            return f"{directory.name}/{name} is {instead}"
        try:
            found = sha256_of(directory / name)
        except OSError as error:
            return f"{directory.name}/{name}: {error.strerror}"
        if found != value:
            return f"{directory.name}/{name} has changed since it was written"
    return None


def _write(directory: Path) -> None:
    if jax.process_index():
        return
    values = {"sha256": {name: sha256_of(directory / name) for name in sorted(_names(directory))}}
    path = directory / CHECKSUMS
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sync(path)


def _names(directory: Path) -> list[str]:
    """The files that have checksums."""
    return [
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in (CHECKSUMS, _AFTERWARDS)
    ]

# SPDX-License-Identifier: Apache-2.0
"""Files that are written: checked before the work, and never left half done."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vivit_jax.errors import UserError


def check_output(path: Path, suffixes: Sequence[str], overwrite: bool, flag: str = "--out") -> None:
    """UserError where a command could not or should not write `path`; run it before the work."""
    if path.suffix.lower() not in suffixes:
        raise UserError(
            f"{flag} {path} ends in {path.suffix!r}; expected one of {', '.join(suffixes)}"
        )
    if path.is_dir():
        raise UserError(f"{flag} {path} is a directory; expected a file name")
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path} exists; choose another name, or pass --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no directory {path.parent}; make it first")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, that takes its place once the block is done."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as a JSON file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")

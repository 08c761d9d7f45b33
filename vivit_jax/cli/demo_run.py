# SPDX-License-Identifier: Apache-2.0
"""Files, settings and outcome of a demo, shared by its stages."""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Marks a demo's directory; written first and completed last.
MARKER = "vivit-demo.json"
PREDICTIONS, RECONSTRUCTIONS = "predictions.png", "reconstructions.png"
MOVING = "reconstruction.gif"
RUNS = ("pretraining", "finetuning", "scratch")
# Everything else that a demo of any model writes.
WRITTEN = ("data", "model", "pretrained", *RUNS, PREDICTIONS, RECONSTRUCTIONS, MOVING)
FPS = 10
CLIPS = {"train": 160, "test": 40}  # of each class


@dataclasses.dataclass(frozen=True)
class Demo:
    """The settings that the stages of a demo share."""

    out: Path
    seed: int
    quick: bool
    epochs: int | None  # None: the recipes'
    labelled: int  # clips a class
    stage: Callable[[str], contextlib.AbstractContextManager]

    @property
    def test(self) -> Path:
        """The folder of held-out clips."""
        return self.out / "data" / "test"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether all checks passed, and the results to write and print."""

    passed: bool
    summary: dict[str, Any]
    files: dict[str, str]  # name in `out` -> description
    commands: Sequence[str]  # to try next


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def quoted(path: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))

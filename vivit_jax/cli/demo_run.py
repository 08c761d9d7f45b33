# SPDX-License-Identifier: Apache-2.0
"""What the commands and stages of a demo share: its files, its settings, its outcome."""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A demo directory is known by this file; it is written first and completed last.
MARKER = "vivit-demo.json"


PREDICTIONS, RECONSTRUCTIONS, MOVING = (
    "predictions.png",
    "reconstructions.png",
    "reconstruction.gif",
)


RUNS = ("pretraining", "finetuning", "scratch")


# What a demo writes besides, of any model.
WRITTEN = ("data", "model", "pretrained", *RUNS, PREDICTIONS, RECONSTRUCTIONS, MOVING)


FPS = 10


CLIPS = {"train": 160, "test": 40}  # of each class


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the stages of a demo work with."""

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
    """Whether all checks passed, and what to write and say of the results."""

    passed: bool
    summary: dict[str, Any]
    files: dict[str, str]  # name in `out` -> what it shows
    commands: Sequence[str]  # to go on with


def say(text: str) -> None:
    # Flushed, so that what is written to a pipe can be followed.
    print(text, flush=True)


def quoted(path: Path) -> str:
    return shlex.quote(str(path))

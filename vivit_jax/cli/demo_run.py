# SPDX-License-Identifier: Apache-2.0
"""Files, settings and outcome of a demo, shared by its stages."""

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vivit_jax.data.datasets.synthetic import CLASSES
from vivit_jax.recipes.recipe import Recipe

# Marks a demo's directory; written first and completed last.
MARKER = "vivit-demo.json"
PREDICTIONS, RECONSTRUCTIONS = "predictions.png", "reconstructions.png"
MOVING, ATTENTION = "reconstruction.gif", "attention.png"
FEW_CHART, FEW_RESULTS = "few-labels.png", "few-labels.json"
RUNS = ("pretraining", "finetuning")
# Everything else that a demo of any model writes, and a run that earlier versions wrote.
WRITTEN = (
    *("data", "model", "pretrained", *RUNS, "scratch"),
    *(PREDICTIONS, RECONSTRUCTIONS, MOVING, ATTENTION, FEW_CHART, FEW_RESULTS),
)
FPS = 10
CLIPS = {"train": 160, "test": 40}  # of each class
SEEDS = 3  # of the comparison on few labels


@dataclasses.dataclass(frozen=True)
class Demo:
    """The settings that the stages of a demo share."""

    out: Path
    seed: int
    quick: bool
    epochs: int | None  # None: the recipes'
    stage: Callable[[str], contextlib.AbstractContextManager]

    @property
    def test(self) -> Path:
        """The folder of held-out clips."""
        return self.out / "data" / "test"

    @property
    def seeds(self) -> range:
        """The seeds of the comparison on few labels."""
        return range(self.seed, self.seed + SEEDS)

    def epochs_of(self, recipe: Recipe, clips: int, *, halved: bool) -> int:
        """The epochs of a recipe here; a quick demo has half of them if `halved`.

        It has half of the clips too, so a quarter of the steps, and no more of them if its user
        asks for more clips.
        """
        epochs = recipe.train.epochs
        if self.epochs is not None:
            return self.epochs
        if not (self.quick and halved):
            return epochs
        share = CLIPS["train"] * len(CLASSES) / clips
        return max(1, min(epochs // 2, int(epochs * share / 4)))

    def labelled(self, number: int) -> Path:
        """The folder of labelled clips for one of `seeds`, by its number from 0."""
        return self.out / "data" / labelled_split(number)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether all checks passed, and the results to write and print."""

    passed: bool
    summary: dict[str, Any]
    files: dict[str, str]  # name in `out` -> description
    commands: Sequence[str]  # to try next


def labelled_split(number: int) -> str:
    """The name of the labelled clips for one seed, by its number from 0."""
    return f"labelled-{number}" if number else "labelled"


def shortened(recipe: Recipe, epochs: int, clips: int, seed: int, start: Path | None) -> Recipe:
    """The recipe with other epochs, a batch of at most `clips`, a seed and a start."""
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, start=None if start is None else str(start)),
        optim=dataclasses.replace(
            recipe.optim, warmup_epochs=min(recipe.optim.warmup_epochs, epochs / 4)
        ),
        train=dataclasses.replace(
            recipe.train,
            epochs=epochs,
            batch_size=min(recipe.train.batch_size, clips),
            seed=seed,
        ),
    )


@contextlib.contextmanager
def reports_hidden() -> Iterator[None]:
    """Without the warnings on what a checkpoint holds and a model lacks."""
    logger = logging.getLogger("checkpoints_convert")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def quoted(path: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))

# SPDX-License-Identifier: Apache-2.0
"""Watches a classifier's training and says, once each, what goes wrong.

A notice is a line of metrics.jsonl, {"kind": "event", "step", "notice": text, "about": one of
ABOUT, or "stall" by `vivit_jax.train.processes.stalls`}, and a line on the screen.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vivit_jax.data.datasets.columns import Label
from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.errors import counted, quoted
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.evaluation import Evaluation
from vivit_jax.train.setup import TrainSetup

ABOUT = ("loss at chance", "ahead of held-out", "never predicted")
_LEAST_STEPS = 20  # before anything is said, and twice as many before it is of the loss
_LEAST_EPOCHS = 3
_EARLY = 0.2  # of the epochs, in which nothing is said of the loss
_NEAR = 0.98  # of the loss of guessing
_AHEAD = 0.2  # of accuracy
_ERRORS = 2.0  # standard errors
_LEAST_REPORTS = 10  # steps whose mean is taken
_LEAST_VALIDATIONS = 3
_LATE = 1 / 3  # of the epochs, before which a class may still be learned
_SHOWN = 5  # classes


class Notice(NamedTuple):
    """What is wrong, by its kind, and in words with the way out."""

    about: str
    text: str

    @property
    def values(self) -> dict[str, str]:
        """The values of its line in metrics.jsonl."""
        return {"notice": self.text, "about": self.about}


class Watch:
    """Follows the numbers of a run with one classification head.

    `counts` are the clips to train on of each class, named by `names`. `lines` are those of
    metrics.jsonl, of a run that is resumed.
    """

    def __init__(
        self,
        recipe: Recipe,
        per_epoch: int,
        counts: Sequence[int],
        names: Sequence[str],
        lines: Iterable[Mapping[str, Any]] = (),
    ):
        shares = np.array([count for count in counts if count]) / max(sum(counts), 1)
        self._chance = float(-(shares * np.log(shares)).sum())
        self._classes, self._names = len(shares), names
        self._per_epoch, self._epochs = per_epoch, recipe.train.epochs
        self._early = max(_LEAST_EPOCHS, recipe.optim.warmup_epochs + 1, _EARLY * self._epochs)
        self._recent = collections.deque(maxlen=max(per_epoch, _LEAST_REPORTS))
        self._said: set[str] = set()
        self._seen: set[int] = set()  # classes that were predicted
        self._validations, self._peak = 0, 0.0
        for line in lines:
            if line["kind"] == "train":
                self._add(line)
            elif "about" in line:
                self._said.add(line["about"])

    def after_step(self, step: int, numbers: Mapping[str, float]) -> list[Notice]:
        """Follow a training step's numbers; what is to be said now."""
        self._add(numbers)
        epoch, within = divmod(step, self._per_epoch)
        few = step < 2 * _LEAST_STEPS or len(self._recent) < _LEAST_REPORTS
        if within or epoch < self._early or few:
            return []
        loss = float(np.mean([each["loss"] for each in self._recent]))
        if not loss > _NEAR * self._chance:  # also for NaN, which the loop reports
            return []
        balanced = math.isclose(self._chance, math.log(self._classes), rel_tol=1e-3)
        what = f"ln({self._classes})" if balanced else "the entropy of the classes' shares"
        return self._once(
            "loss at chance",
            f"after {counted(epoch, 'epoch')} the loss is {loss:.3f} and has not left {what} = "
            f"{self._chance:.3f}, that of guessing: the model learns next to nothing; raise "
            f"optim.lr ({self._peak:.2g} at most so far), or look whether labels belong to their "
            "clips (vivit-jax check-data --draw)",
        )

    def after_validation(self, step: int, dataset: Dataset, found: Evaluation) -> list[Notice]:
        """Follow a validation, of clips in the numbering of the model's classes."""
        read = _readable(dataset, found)
        labels = {label for label, _ in read if isinstance(label, int)}
        self._seen |= {int(scores.argmax()) for _, scores in read}
        self._validations += 1
        if step < _LEAST_STEPS or step < _LEAST_EPOCHS * self._per_epoch:
            return []
        ahead = self._ahead(found.metrics["accuracy"], len(read))
        return [*ahead, *self._never(step, sorted(labels - self._seen))]

    def _add(self, numbers: Mapping[str, float]) -> None:
        self._recent.append({k: v for k, v in numbers.items() if k in ("loss", "accuracy")})
        self._peak = max(self._peak, numbers.get("lr", 0.0))

    def _ahead(self, held_out: float, videos: int) -> list[Notice]:
        found = [each["accuracy"] for each in self._recent if "accuracy" in each]
        if not found or not videos:
            return []
        trained = float(np.mean(found))
        middle = min(max(held_out, 1 / videos), 1 - 1 / videos)
        error = math.sqrt(middle * (1 - middle) / videos)
        if trained - held_out <= max(_AHEAD, _ERRORS * error):
            return []
        return self._once(
            "ahead of held-out",
            f"accuracy is {trained:.0%} in training and {held_out:.0%} on the {videos} held-out "
            "clips: the model learns its clips by heart; more clips help most, then stronger "
            "augmentation (augment.crop_scale, augment.rand_augment) and training fewer blocks "
            "(optim.freeze)",
        )

    def _never(self, step: int, never: Sequence[int]) -> list[Notice]:
        due = self._validations >= _LEAST_VALIDATIONS
        if not never or not due or step < _LATE * self._per_epoch * self._epochs:
            return []
        names = ", ".join(quoted(self._names[label]) for label in never[:_SHOWN])
        more = len(never) - _SHOWN
        names += f" and {more} more" if more > 0 else ""
        one = len(never) == 1
        they, are = ("it has", "is") if one else ("they have", "are")
        return self._once(
            "never predicted",
            f"never predicted on the held-out clips so far: {names}; look whether {they} too few "
            f"clips to train on, or {are} taken for another class (report.html)",
        )

    def _once(self, about: str, text: str) -> list[Notice]:
        if about in self._said:
            return []
        self._said.add(about)
        return [Notice(about, text)]


def watch_of(
    setup: TrainSetup, dataset: Dataset, lines: Iterable[Mapping[str, Any]]
) -> Watch | None:
    """The watch of a run; None for pre-training and for several heads."""
    config: Any = setup.model.config
    if setup.recipe.task == "pretrain" or config.class_splits is not None:
        return None
    counts = np.bincount(dataset.labels.ravel(), minlength=config.num_labels).tolist()
    return Watch(setup.recipe, setup.per_epoch, counts, config.labels, lines)


def held_out_loss(config: Any, dataset: Dataset, found: Evaluation) -> dict[str, float]:
    """The mean cross entropy of the readable clips as a metric; none for several heads."""
    read = _readable(dataset, found)
    if config.class_splits is not None or not read:
        return {}
    scores = np.stack([each for _, each in read]).astype(np.float64)
    own = scores[np.arange(len(read)), np.array([label for label, _ in read])]
    return {"loss": float(np.mean(np.logaddexp.reduce(scores, axis=1) - own))}


def _readable(dataset: Dataset, found: Evaluation) -> list[tuple[Label, np.ndarray]]:
    """The label and the scores of each clip that could be read."""
    pairs = zip(dataset.examples, found.answers, strict=True)
    return [(e.label, answer.scores) for e, answer in pairs if answer.scores is not None]

# SPDX-License-Identifier: Apache-2.0
"""What a classifier got right and wrong: intervals, confusions, calibration, views that disagree.

Numpy only. `evaluate` and the report of a run show the same `Outcomes`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from checkpoints_convert.card import binomial_error

BINS = 15  # of the calibration error, as in its paper (Guo et al. 2017)
_NORMAL = 1.959963984540054  # the normal distribution has 95 % of its mass within this many sigmas


class Bin(NamedTuple):
    """The clips whose confidence lies in (low, high]."""

    low: float
    high: float
    clips: int
    confidence: float  # mean, NaN without clips
    accuracy: float  # NaN without clips


class Confusion(NamedTuple):
    """A wrong answer that some clips of a class got."""

    label: int
    answer: int
    clips: int
    of: int  # clips of the class


class ClassResult(NamedTuple):
    """How many clips of a class were right."""

    label: int
    clips: int
    right: int

    @property
    def accuracy(self) -> float:
        """NaN for a class without clips."""
        return self.right / self.clips if self.clips else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the accuracy."""
        return wilson_interval(self.right, self.clips)


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The answers for labelled clips, of one head.

    Attributes:
        classes: names by label.
        clips: names of the clips.
        labels: true classes.
        answers: best classes; -1 where a score is not finite.
        confidences: probabilities of the answers; NaN where a score is not finite.
        ranks: how many classes come before the true one.
        views: the best class of each view of a clip.
        head: name of the head, of a model that has several.
    """

    classes: tuple[str, ...]
    clips: tuple[str, ...]
    labels: Int[np.ndarray, " n"]
    answers: Int[np.ndarray, " n"]
    confidences: Float[np.ndarray, " n"]
    ranks: Int[np.ndarray, " n"]
    views: Int[np.ndarray, "n views"]
    head: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether each answer is the true class."""
        return self.answers == self.labels

    @property
    def accuracy(self) -> float:
        """The share of right answers; one that is not finite is wrong."""
        return float(self.right.mean())

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return binomial_error(self.accuracy, len(self))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the accuracy, `wilson_interval`."""
        return wilson_interval(int(self.right.sum()), len(self))

    def top(self, k: int) -> float:
        """The share of clips whose true class is among the k best."""
        return float((self.ranks < k).mean())

    @property
    def disagreeing(self) -> Int[np.ndarray, " m"]:
        """Which clips have views with different best classes."""
        return np.flatnonzero((self.views != self.views[:, :1]).any(1))

    def confusion_matrix(self) -> Int[np.ndarray, "classes classes"]:
        """Clips by true class (rows) and answer (columns), without those that are not finite."""
        count = len(self.classes)
        finite = self.answers >= 0
        flat = self.labels[finite].astype(np.int64) * count + self.answers[finite]
        return np.bincount(flat, minlength=count * count).reshape(count, count)

    def per_class(self) -> list[ClassResult]:
        """The result of each class, in their order."""
        count = len(self.classes)
        clips = np.bincount(self.labels, minlength=count).tolist()
        right = np.bincount(self.labels[self.right], minlength=count).tolist()
        return [ClassResult(i, *pair) for i, pair in enumerate(zip(clips, right, strict=True))]

    def confusions(self, most: int | None = None) -> list[Confusion]:
        """Wrong answers, those of the most clips first; of as many, the larger share of the class.

        At most `most` of them.
        """
        matrix = self.confusion_matrix()
        of = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        pairs = np.argwhere(matrix - np.diag(np.diag(matrix))).tolist()
        found = [Confusion(i, j, int(matrix[i, j]), of[i]) for i, j in pairs]
        found.sort(key=lambda each: (-each.clips, each.of, each.label, each.answer))
        return found[:most]

    def mistaken(self, confusion: Confusion) -> list[int]:
        """The clips of a confusion, the most confident first."""
        of_it = (self.labels == confusion.label) & (self.answers == confusion.answer)
        places = np.flatnonzero(of_it)
        return places[np.argsort(-self.confidences[places], kind="stable")].tolist()

    def never_answered(self) -> list[int]:
        """Classes that have clips, of which no clip got the answer."""
        answered = np.bincount(self.answers[self.answers >= 0], minlength=len(self.classes))
        clips = np.bincount(self.labels, minlength=len(self.classes))
        return np.flatnonzero((clips > 0) & (answered == 0)).tolist()

    def calibration(self, bins: int = BINS) -> tuple[float, list[Bin]]:
        """`calibration` of the confidences."""
        finite = np.isfinite(self.confidences)
        return calibration(self.confidences[finite], self.right[finite], bins)

    def summary(self, top_k: int) -> dict[str, Any]:
        """The main numbers as JSON values; "accuracy_top_5" only of more than 5 classes."""
        error, _ = self.calibration()
        values: dict[str, Any] = {"videos": len(self), "accuracy": self.accuracy}
        if len(self.classes) > top_k:
            values[f"accuracy_top_{top_k}"] = self.top(top_k)
        values["standard_error"] = self.standard_error
        values["interval_95"] = list(self.interval)
        values["calibration_error"] = None if math.isnan(error) else error
        values["calibration_bins"] = BINS
        values["views_disagree"] = len(self.disagreeing)
        return values


def outcomes(
    scores: Float[np.ndarray, "n classes"],
    labels: Sequence[int] | Int[np.ndarray, " n"],
    *,
    classes: Sequence[str],
    clips: Sequence[str],
    views: Int[np.ndarray, "n views"] | None = None,
    head: str = "",
) -> Outcomes:
    """The outcomes of scores, which are logits or logarithms of probabilities."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
    # An average may be -inf, of a probability of 0; NaN, and inf, name no class.
    finite = np.isfinite(scores.max(1))
    answers = np.where(finite, scores.argmax(1), -1)
    with np.errstate(invalid="ignore"):
        shares = np.exp(scores - scores.max(1, keepdims=True))
        confidences = np.where(finite, shares.max(1) / shares.sum(1), np.nan)
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1])[None] < labels[:, None]
    ahead = ((scores > own) | ((scores == own) & before)).sum(1)  # as topk_accuracy ranks
    ranks = np.where(finite, ahead, scores.shape[1])
    seen = answers[:, None] if views is None else np.asarray(views, np.int64)
    return Outcomes(tuple(classes), tuple(clips), labels, answers, confidences, ranks, seen, head)


def wilson_interval(right: int, clips: int, sigmas: float = _NORMAL) -> tuple[float, float]:
    """The Wilson score interval of a share, by default of 95 %; (0, 1) without clips.

    Unlike the normal interval it is right for shares near 0 and 1 and for few clips.
    Source: Wilson 1927.
    """
    if not clips:
        return 0.0, 1.0
    share, square = right / clips, sigmas**2 / clips
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration(
    confidences: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = BINS
) -> tuple[float, list[Bin]]:
    """The expected calibration error and its bins, equally wide, each without its lower bound.

    The error is the mean over the clips of |accuracy - confidence| of their bin, NaN without clips.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidences, minlength=bins) / counts
        share = np.bincount(place, right.astype(float), minlength=bins) / counts
    columns = (edges[:-1], edges[1:], counts, mean, share)
    found = [Bin(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    gaps = [each.clips * abs(each.accuracy - each.confidence) for each in found if each.clips]
    return (sum(gaps) / len(confidences) if len(confidences) else math.nan), found

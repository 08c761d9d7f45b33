# SPDX-License-Identifier: Apache-2.0
"""Logistic regression and nearest neighbours on frozen features, and what both are judged by."""

import collections
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float, Int

from vivit_jax.inference.probe_features import ClipFeatures

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO
_LEAST_SPREAD = 1e-3  # of a feature, as a share of the mean spread: less is taken for constant
_ABSENT = 50.0  # how far below the others the score of a class without clips is
_STEPS, _GRADIENT = 2000, 1e-7
_QUERIES = 1024  # whose neighbours are searched together


@dataclasses.dataclass(frozen=True)
class Linear:
    """Scores = features kernel + bias."""

    kernel: Float[np.ndarray, "d classes"]
    bias: Float[np.ndarray, " classes"]

    def __call__(self, features: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n classes"]:
        return features @ self.kernel + self.bias


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What makes every feature's mean 0 and its standard deviation 1."""

    mean: Float[np.ndarray, " d"]
    spread: Float[np.ndarray, " d"]

    def __call__(self, features: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
        return (features - self.mean) / self.spread

    def folded(self, layer: Linear) -> Linear:
        """The layer that computes from features as they are what `layer` does from scaled ones."""
        kernel = layer.kernel / self.spread[:, None]
        return Linear(kernel, layer.bias - self.mean @ kernel)


def scaling_of(features: Float[np.ndarray, "n d"]) -> Scaling:
    """The scaling of these features.

    One that is nearly constant is not blown up: its spread counts as a thousandth of the mean one.
    """
    features = features.astype(np.float64)
    return spread_at_least(features.mean(0), features.std(0))


def spread_at_least(mean: Float[np.ndarray, " d"], spread: Float[np.ndarray, " d"]) -> Scaling:
    """A scaling in which no feature's spread is far below the others'."""
    least = _LEAST_SPREAD * spread.mean()
    return Scaling(mean, np.maximum(spread, least if least > 0 else 1.0))


@dataclasses.dataclass(frozen=True)
class Regression:
    """Multinomial logistic regression on scaled features, for several strengths of regularisation.

    Minimised is the mean cross-entropy plus weight_decay / 2 times the sum of squared weights; the
    bias is free. (scikit-learn's C is 1 / (weight_decay * n).) With fewer rows than features the
    best weights lie in the space of the rows, where they are sought.
    """

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    classes: int

    def fit(self, weight_decays: Sequence[float]) -> list[Linear]:
        """A layer on features as they are for each weight decay, all found by L-BFGS in float64."""
        scaling = scaling_of(self.features)
        x, basis = scaling(self.features.astype(np.float64)), None
        if x.shape[0] < x.shape[1]:
            u, s, basis = np.linalg.svd(x, full_matrices=False)
            x = u * s
        present, places = np.unique(self.labels, return_inverse=True)
        start = np.zeros((x.shape[1] + 1) * len(present))
        found: dict[float, Linear] = {}
        # The strongest first: each solution is a good start for the next.
        for decay in sorted(set(weight_decays), reverse=True):
            start = _minimised(x, places, len(present), decay, start)
            weights = start.reshape(-1, len(present))
            kernel = weights[:-1] if basis is None else basis.T @ weights[:-1]
            found[decay] = scaling.folded(_with_absent(kernel, weights[-1], present, self.classes))
        return [found[decay] for decay in weight_decays]


def _minimised(
    x: Float[np.ndarray, "n d"], labels: np.ndarray, classes: int, decay: float, start: np.ndarray
) -> np.ndarray:
    rows = np.arange(len(x))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, classes)
        kernel, bias = weights[:-1], weights[-1]
        scores = x @ kernel + bias
        logs = scores - scipy.special.logsumexp(scores, axis=1, keepdims=True)
        loss = -logs[rows, labels].mean() + decay / 2 * (kernel**2).sum()
        slope = np.exp(logs)
        slope[rows, labels] -= 1
        slope /= len(x)
        gradient = np.concatenate([x.T @ slope + decay * kernel, slope.sum(0)[None]])
        return float(loss), gradient.ravel()

    options = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "gtol": _GRADIENT, "ftol": 0.0}
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    slope = float(np.abs(found.jac).max())
    if slope > 1e-4:
        logger.warning(
            "logistic regression with weight decay %g stopped after %d steps at a gradient of %.1g",
            decay,
            found.nit,
            slope,
        )
    return found.x


def _with_absent(kernel: np.ndarray, bias: np.ndarray, present: np.ndarray, classes: int) -> Linear:
    """A layer of all classes from that of the `present` ones; the others never win."""
    every = Linear(np.zeros((len(kernel), classes)), np.full(classes, bias.min() - _ABSENT))
    every.kernel[:, present], every.bias[present] = kernel, bias
    return every


def stratified_folds(
    labels: Int[np.ndarray, " n"], groups: Sequence[object], folds: int, seed: int
) -> tuple[Int[np.ndarray, " n"], int]:
    """The fold of each clip, and how many folds there are.

    A class has about as many clips in each fold, and clips of one group (of one file) are in one
    fold. There are fewer folds than asked for if a class has fewer groups. Clips of a class with a
    single group are in no fold, -1: they are always trained on. Without a class of two groups
    there are no folds, 0.
    """
    first: dict[object, int] = {}
    for label, group in zip(labels.tolist(), groups, strict=True):
        first.setdefault(group, label)
    by_class: dict[int, list[object]] = collections.defaultdict(list)
    for group, label in first.items():
        by_class[label].append(group)
    sizes = [len(members) for members in by_class.values() if len(members) > 1]
    folds = min(folds, max(sizes)) if sizes else 0
    rng, place, fold_of = np.random.default_rng(seed), 0, dict[object, int]()
    for label in sorted(by_class):
        members = by_class[label]
        alone = len(members) < 2
        for k in rng.permutation(len(members)):
            fold_of[members[k]] = -1 if alone else place % folds
            place += not alone
    return np.array([fold_of[group] for group in groups]), folds


def neighbour_scores(
    known: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    asked: Float[np.ndarray, "m d"],
    classes: int,
    k: int,
    left_out: Bool[np.ndarray, "m n"] | None = None,
) -> Float[np.ndarray, "m classes"]:
    """Votes of the k nearest known features by cosine, weighted by exp(cosine / TEMPERATURE).

    `left_out` are pairs that do not count, as a clip and itself. Source: DINO (Caron et al. 2021),
    after Wu et al. 2018.
    """
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, asked))
    scores = np.zeros((len(asked), classes))
    for start in range(0, len(asked), _QUERIES):
        rows = slice(start, start + _QUERIES)
        cosines = asked[rows] @ known.T
        if left_out is not None:
            cosines[left_out[rows]] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        votes = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / TEMPERATURE)
        places = np.arange(len(cosines))[:, None] + start
        np.add.at(scores, (np.broadcast_to(places, nearest.shape), labels[nearest]), votes)
    return scores


def averaged(logits: Float[np.ndarray, "n views classes"], average: str) -> np.ndarray:
    """One row of scores a clip: mean logits, or logarithms of mean probabilities, as `evaluate`."""
    if average == "logits":
        return logits.mean(1)
    logs = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    return np.asarray(scipy.special.logsumexp(logs, axis=1)) - math.log(logits.shape[1])


def accuracy_and_loss(
    scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """The share of clips whose label has the highest score, and the mean cross-entropy."""
    logs = scores - scipy.special.logsumexp(scores, axis=1, keepdims=True)
    loss = -logs[np.arange(len(logs)), labels].mean()
    return float((scores.argmax(1) == labels).mean()), float(loss)


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A linear head on what the model's own classifier reads; every view of a clip counts alike.

    Attributes:
        train: the clips that it is trained on.
        labels: theirs.
        classes: how many there are.
        average: what is averaged over views, "softmax" or "logits".
    """

    train: ClipFeatures
    labels: Int[np.ndarray, " n"]
    classes: int
    average: str

    def out_of_fold(
        self, folds: Int[np.ndarray, " n"], weight_decays: Sequence[float]
    ) -> Float[np.ndarray, "decays n classes"]:
        """Scores of each clip by heads that were not trained on its fold; NaN in no fold."""
        scores = np.full((len(weight_decays), len(self.labels), self.classes), np.nan)
        pooled = self.train.pooled.astype(np.float64)
        for fold in range(folds.max() + 1):
            held = folds == fold
            layers = self._regression(~held).fit(weight_decays)
            for row, layer in zip(scores, layers, strict=True):
                row[held] = averaged(layer(pooled[held]), self.average)
        return scores

    def fit(self, weight_decay: float) -> dict[str, np.ndarray]:
        """The head trained on all clips: parameters of the model by path."""
        (layer,) = self._regression(np.ones(len(self.labels), bool)).fit([weight_decay])
        values = {"head/kernel": layer.kernel, "head/bias": layer.bias}
        return {path: value.astype(np.float32) for path, value in values.items()}

    def scores(
        self, head: Mapping[str, np.ndarray], clips: ClipFeatures
    ) -> Float[np.ndarray, "m classes"]:
        """The scores of clips by a head of `fit`."""
        layer = Linear(head["head/kernel"], head["head/bias"])
        return averaged(layer(clips.pooled.astype(np.float64)), self.average)

    def _regression(self, rows: Bool[np.ndarray, " n"]) -> Regression:
        views, width = self.train.pooled.shape[1:]
        features = self.train.pooled[rows].reshape(-1, width)
        return Regression(features, np.repeat(self.labels[rows], views), self.classes)

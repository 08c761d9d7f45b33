# SPDX-License-Identifier: Apache-2.0
"""What a probe is asked for, and what it finds."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

# Of the mean cross-entropy, and of AdamW.
DECAYS = {
    "linear": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "attentive": (0.1, 1.0, 10.0, 100.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How a model is probed.

    Attributes:
        head: linear, logistic regression on what the model's classifier reads; or attentive, a
            learned query that attends to all tokens, and a classifier on what it gathers.
        weight_decays: Strengths of regularisation to choose from. Default: powers of ten.
        folds: Parts of the training clips in cross-validation; fewer if a class has fewer clips.
        neighbours: Nearest neighbours that vote, at most as many as the median class has clips.
        attentive_heads: Heads of the attentive pool. Default: as many as a block of the model has.
        dtype: What the frozen model computes in.
        seed: Of the held-out share, the folds, and the attentive head's first values and batches.
        threads: Threads that read clips.
    """

    head: Literal["linear", "attentive"] = "linear"
    weight_decays: tuple[float, ...] = ()
    folds: int = 5
    neighbours: int = 20
    attentive_heads: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    threads: int = 2

    @property
    def decays(self) -> tuple[float, ...]:
        """The strengths that are tried."""
        return self.weight_decays or DECAYS[self.head]


PROBE = ProbeSettings()  # the defaults


@dataclasses.dataclass(frozen=True)
class Trial:
    """What cross-validation says of one strength of regularisation."""

    weight_decay: float
    accuracy: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracies of the head and of the nearest neighbours on some clips.

    The neighbours of a training clip are other clips.
    """

    clips: int
    accuracy: float
    standard_error: float
    loss: float
    neighbours: float


@dataclasses.dataclass(frozen=True)
class Probe:
    """What probing found.

    Attributes:
        model: the directory of the model with the head.
        start: the model that was probed.
        head: "linear" or "attentive".
        weight_decay: the chosen one.
        trials: cross-validation's accuracies; empty where no class has two clips.
        folds: parts of the cross-validation, 0 without one.
        k: nearest neighbours that vote.
        train: on the clips that the head was trained on.
        held_out: on the clips that were held out, None if there are none.
        chance: the accuracy of always naming the most frequent class of the clips that are scored.
        per_class: held-out clips and accuracy of each class, by name.
        classes: their names.
        protocol: frames, views and what is averaged, as JSON values.
        notes: what else is worth knowing.
        unreadable: path -> why, of clips that were left out.
        repeated: paths of clips too short for a view, in which frames repeat.
        seconds: that features and heads took.
    """

    model: Path
    start: str
    head: str
    weight_decay: float
    trials: tuple[Trial, ...]
    folds: int
    k: int
    train: Score
    held_out: Score | None
    chance: float
    per_class: Mapping[str, Mapping[str, float]]
    classes: tuple[str, ...]
    protocol: Mapping[str, Any]
    notes: tuple[str, ...]
    unreadable: Mapping[str, str]
    repeated: tuple[str, ...]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The content of probe.json."""
        return dataclasses.asdict(self) | {"model": str(self.model)}

# SPDX-License-Identifier: Apache-2.0
"""A training run as frozen dataclasses: everything that decides its result except the files.

A recipe is a plain function that returns a `Recipe`; `vivit_jax.recipes.RECIPES` lists them.
Counts of clips are totals over all devices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from vivit_jax.data.settings import AugmentSettings, DataSettings, Sampler

# The head of the model, by a recipe's task.
HEADS = {"pretrain": "pretraining", "finetune": "classification"}
Rules = tuple[tuple[str, float], ...]
# Fields that the checkpoint a run starts from, or its data, decide unless they are given.
Given = Literal[
    "processor", "evaluation.resize", "augment.resize",
    "model.config.num_labels", "model.config.id2label",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and what it starts from."""

    preset: str  # of `vivit-jax presets`
    # Fields that override those of the preset's configuration: drop_path_rate, num_labels, dtype.
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # A directory, file or hub id: the same model, a pre-trained one to fine-tune, or an image ViT.
    # None: train from scratch.
    start: str | None = None
    # How parameters that `start` lacks are drawn: as in the paper's code, or as in transformers,
    # normal with the configuration's initializer_range.
    initial: Literal["paper", "huggingface"] = "paper"
    # The classes of a classifier. "data": as many as the data has, with their names.
    # "checkpoint": those of the classifier in `start`, which is kept with its names; the data's
    # classes must be among them.
    classes: Literal["data", "checkpoint"] = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """The masks of pre-training."""

    kind: Literal["tube", "random", "dual"] = "tube"
    ratio: float = 0.9
    decoder_ratio: float = 0.5  # for dual


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Optimiser and schedule; see `vivit_jax.train.optim`."""

    algorithm: Literal["adamw", "sgd"] = "adamw"
    lr: float  # for a batch of `lr_batch`
    lr_batch: int | None = 256  # lr and min_lr are scaled by the batch over this; None: unscaled
    min_lr: float = 0.0
    schedule: Literal["videomae", "scenic", "constant"] = "videomae"
    warmup_epochs: float = 5.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0  # of kernels; biases, norms, tokens and positions have none
    layer_decay: float | None = None
    clip: float | None = None  # global norm of the gradients
    freeze: tuple[str, ...] = ()  # regular expressions that match whole parameter paths
    lr_rules: Rules = ()  # (pattern, factor of lr), before layer_decay; the first full match counts
    decay_rules: Rules = ()  # (pattern, factor of weight_decay), before the usual ones
    ema: float | None = None  # decay of a moving average of the params, which is then evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Length of the run, batch size, and what is saved."""

    epochs: int
    batch_size: int  # videos per step; data.repeats multiplies the clips
    accumulate: int = 1  # parts of a step's batch, computed one after the other
    seed: int = 0
    steps: int | None = None  # stop after this many steps; the schedule still spans all epochs
    checkpoint_every: int | None = None  # steps; None: every epoch
    evaluate_every: int = 1  # epochs between validations
    patience: int | None = None  # validations in a row without a better score that end the run
    keep: int = 2  # most recent checkpoints, besides the best
    max_bad_steps: int = 5  # in a row without finite loss and gradients, then the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The views of a test video, and how their outputs are combined."""

    clips: int = 1  # along time
    crops: int = 1  # along the longer side
    sampler: Sampler = "linspace"  # see `vivit_jax.data.sampling.view_indices`
    stride: int = 4
    # Shortest side. The processor beside `model.start` overrides it, unless it is `given`.
    resize: int = 224
    average: Literal["softmax", "logits"] = "softmax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: `task` is "pretrain" (masked, no labels) or "finetune" (a classifier)."""

    name: str
    task: Literal["pretrain", "finetune"]
    # A name of `vivit_jax.VideoProcessor.named`: how bytes become pixels. The processor beside
    # `model.start` overrides it, unless it is `given`.
    processor: str
    model: ModelSettings
    data: DataSettings
    augment: AugmentSettings
    mask: MaskSettings = MaskSettings()
    optim: OptimSettings
    train: TrainSettings
    evaluation: EvalSettings = EvalSettings()
    # Fields that checkpoint and data do not override; `apply_settings` adds those that it sets.
    given: tuple[Given, ...] = dataclasses.field(default=(), compare=False)

# SPDX-License-Identifier: Apache-2.0
"""What a training run is, as frozen dataclasses: everything that decides its result but the files.

A recipe is a plain function that returns a `Recipe`; `vivit_jax.recipes.RECIPES` lists them.
Counts of clips are those of all devices together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from vivit_jax.data.settings import AugmentSettings, DataSettings, Sampler

# The head of the model, by a recipe's task.
HEADS = {"pretrain": "pretraining", "finetune": "classification"}
Rules = tuple[tuple[str, float], ...]
# What the checkpoint that a run starts from, or the run's data, say better than a recipe does.
Given = Literal[
    "processor", "evaluation.resize", "augment.resize",
    "model.config.num_labels", "model.config.id2label",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and what it starts from."""

    preset: str  # of `vivit-jax presets`
    # Fields of the model's configuration on top of the preset's: drop_path_rate, num_labels, dtype.
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # A directory, file or hub id: the same model, masked pre-training to fine-tune, an image ViT.
    # None: fresh.
    start: str | None = None
    # What is not in `start` is drawn as the paper's code does, or as transformers does: normal of
    # the configuration's initializer_range.
    initial: Literal["paper", "huggingface"] = "paper"
    # The classes of a classifier: as many as the data's folders, with their names, or as the
    # numbers in their list go up to; or those of the classifier in `start`, which stays, with its
    # names, and of which the data's have to be some.
    classes: Literal["data", "checkpoint"] = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What masked pre-training hides."""

    kind: Literal["tube", "random", "dual"] = "tube"
    ratio: float = 0.9
    decoder_ratio: float = 0.5  # for dual


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Optimiser and schedule; see `vivit_jax.train.optim`."""

    algorithm: Literal["adamw", "sgd"] = "adamw"
    lr: float  # of a batch of `lr_batch`
    lr_batch: int | None = 256  # lr and min_lr grow with the batch over this; None: as they are
    min_lr: float = 0.0
    schedule: Literal["videomae", "scenic", "constant"] = "videomae"
    warmup_epochs: float = 5.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0  # of kernels; biases, norms, tokens and positions have none
    layer_decay: float | None = None
    clip: float | None = None  # largest norm of all gradients together
    freeze: tuple[str, ...] = ()  # full matches of parameter paths, as regular expressions
    lr_rules: Rules = ()  # factors of lr before those of layer_decay; the first full match counts
    decay_rules: Rules = ()  # factors of weight_decay before the usual ones
    ema: float | None = None  # decay of a moving average of the params, which is then evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long, how much at a time, and what is kept."""

    epochs: int
    batch_size: int  # videos a step; with data.repeats that many times more clips
    accumulate: int = 1  # parts that a step's batch is computed in, one after the other
    seed: int = 0
    steps: int | None = None  # stop after so many steps; the schedule stays that of all epochs
    checkpoint_every: int | None = None  # steps; None: every epoch
    evaluate_every: int = 1  # epochs between validations
    keep: int = 2  # last checkpoints, besides the best
    max_bad_steps: int = 5  # in a row without finite loss and gradients, then the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The views of a test video and how they become one answer."""

    clips: int = 1  # along time
    crops: int = 1  # along the longer side
    sampler: Sampler = "linspace"  # its test form, see `vivit_jax.data.sampling.view_indices`
    stride: int = 4
    # Shortest side. Where the processor beside `model.start` says another, that counts, unless
    # this one is `given`.
    resize: int = 224
    average: Literal["softmax", "logits"] = "softmax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: `task` is "pretrain" (masked, no labels) or "finetune" (a classifier)."""

    name: str
    task: Literal["pretrain", "finetune"]
    # Of `vivit_jax.VideoProcessor.named`: how bytes become pixels, where `model.start` has no
    # processor beside it; its own counts else, unless this one is `given`.
    processor: str
    model: ModelSettings
    data: DataSettings
    augment: AugmentSettings
    mask: MaskSettings = MaskSettings()
    optim: OptimSettings
    train: TrainSettings
    evaluation: EvalSettings = EvalSettings()
    # Fields that count whatever checkpoint and data say; `apply_settings` adds those that it sets.
    given: tuple[Given, ...] = dataclasses.field(default=(), compare=False)

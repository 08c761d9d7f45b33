# SPDX-License-Identifier: Apache-2.0
"""What a training run is, as frozen dataclasses: everything that decides its result but the files.

A recipe is a plain function that returns a `Recipe`; `vivit_jax.recipes.RECIPES` lists them.
Counts of clips are those of all devices together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

# The head of the model, by a recipe's task.
HEADS = {"pretrain": "pretraining", "finetune": "classification"}
Rules = tuple[tuple[str, float], ...]
Sampler = Literal["hold", "linspace", "loop", "segments"]
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
class DataSettings:
    """Where clips come from and which of their frames are taken; see `vivit_jax.data.dataset`."""

    train: str = ""  # a list file, a directory with a folder per class, or one of clips
    validation: str | None = None
    root: str | None = None  # of relative paths in lists; None: the list's own directory
    # Training clips; see `vivit_jax.data.sampling`. "hold": exact stride, short videos hold the
    # last frame (VideoMAE pre-training); "linspace": evenly spread over num_frames * stride frames
    # (VideoMAE fine-tuning); "loop": exact stride, short videos start again (ViViT); "segments":
    # one frame of each of num_frames equal parts (TSN, SSv2).
    sampler: Sampler = "linspace"
    stride: int = 4
    repeats: int = 1  # differently augmented copies of each clip that is read, all in one step
    threads: int = 2  # that read clips, in each process of the pipeline
    workers: int = 0  # processes that read clips; 0: none beside this one
    cache_gib: float = 0.0  # for whole decoded videos, kept by each process while there is room
    frame_name: str = "img_{:05}.jpg"  # of frame folders whose list says how many there are
    first_frame: int = 1  # the number of their first frame
    max_bad_share: float = 0.05  # of the clips read so far (once there are 20), then the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """What happens to a training clip, alike in all of its frames."""

    # Shortest side before anything else, None: as it is read. It is for the frames of the recipe's
    # model; where `model.start` has others it changes with their side, unless it is `given`.
    resize: int | None = None
    crop: Literal["multi_scale", "random_resized", "random", "center"] = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area, for random_resized
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, for random_resized
    jitter_scale: tuple[float, float] | None = None  # of height and of width, before the crop
    flip: float = 0.5  # probability
    # "rand-m7-n4-mstd0.5-inc1" as in timm, or "scenic-m20-n2".
    rand_augment: str | None = None
    colour: float = 0.0  # probability of scenic's colour jitter
    erase: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of its Beta distribution
    cutmix: float = 0.0
    mix_switch: float = 0.5  # probability of cutmix where both are on
    mix_prob: float = 1.0
    mix_group: int | None = None  # clips that share one lambda: a paper's batch per device
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed at all."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


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

# SPDX-License-Identifier: Apache-2.0
"""What the recipes of VideoMAE and VideoMAE V2 share.

All have 16 frames, AdamW, and a cosine schedule after a warm-up from 0. `lr` and `min_lr` are for
256 videos, not counting repeats. Batches are GPUs x videos; mixup and cutmix draw one factor for
all clips of a GPU, including repeats. The authors trained in half precision: set
`model.config.dtype=bfloat16`.
"""

import dataclasses

from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.recipes.recipe import (
    EvalSettings,
    MaskSettings,
    ModelSettings,
    OptimSettings,
    Recipe,
    TrainSettings,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainScript:
    """The settings in which the authors' pre-training scripts differ."""

    gpus: int
    videos: int  # per GPU
    lr: float
    epochs: int
    stride: int = 4
    repeats: int = 1
    warmup: float = 40.0
    clip: float | None = None
    mask: MaskSettings = MaskSettings(kind="tube", ratio=0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneScript:
    """The settings in which the authors' fine-tuning scripts differ."""

    gpus: int
    videos: int  # per GPU
    lr: float
    epochs: int
    repeats: int = 2
    segments: bool = False  # one frame from each segment, and no mirroring; else dense sampling
    stride: int = 4  # of dense sampling
    warmup: float = 5.0
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    drop_path: float = 0.1
    head_dropout: float = 0.0
    clip: float | None = None
    num_labels: int | None = None  # None: the preset's


def pretraining(name: str, preset: str, script: PretrainScript) -> Recipe:
    """Masked pre-training as in V1 and V2."""
    return Recipe(
        name=name,
        task="pretrain",
        processor="videomae-imagenet",
        model=ModelSettings(preset=preset),
        data=DataSettings(sampler="hold", stride=script.stride, repeats=script.repeats),
        augment=AugmentSettings(crop="multi_scale", flip=0.0),
        mask=script.mask,
        optim=OptimSettings(
            lr=script.lr,
            lr_batch=256,
            min_lr=1e-5,
            warmup_epochs=script.warmup,
            b1=0.9,
            b2=0.95,
            weight_decay=0.05,
            clip=script.clip,
        ),
        train=TrainSettings(epochs=script.epochs, batch_size=script.gpus * script.videos),
        # The authors do not validate pre-training; here a run does, on one clip per video.
        evaluation=EvalSettings(sampler="hold", stride=script.stride, resize=224),
    )


def finetuning(name: str, preset: str, script: FinetuneScript) -> Recipe:
    """Fine-tuning as in V1 and V2."""
    config = {"drop_path_rate": script.drop_path, "head_dropout": script.head_dropout}
    if script.num_labels is not None:
        config["num_labels"] = script.num_labels
    sampler = "segments" if script.segments else "linspace"
    return Recipe(
        name=name,
        task="finetune",
        processor="videomae-imagenet",
        model=ModelSettings(preset=preset, config=config),
        data=DataSettings(sampler=sampler, stride=script.stride, repeats=script.repeats),
        augment=AugmentSettings(
            crop="random_resized",
            crop_scale=(0.08, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            flip=0.0 if script.segments else 0.5,
            rand_augment="rand-m7-n4-mstd0.5-inc1",
            erase=0.25,
            mixup=0.8,
            cutmix=1.0,
            mix_switch=0.5,
            mix_prob=1.0,
            mix_group=script.videos * script.repeats,
            smoothing=0.1,
        ),
        optim=OptimSettings(
            lr=script.lr,
            lr_batch=256,
            min_lr=script.min_lr,
            warmup_epochs=script.warmup,
            b1=0.9,
            b2=0.999,
            weight_decay=script.weight_decay,
            layer_decay=script.layer_decay,
            clip=script.clip,
        ),
        train=TrainSettings(epochs=script.epochs, batch_size=script.gpus * script.videos),
        evaluation=EvalSettings(
            clips=2 if script.segments else 5,
            crops=3,
            sampler=sampler,
            stride=script.stride,
            resize=224,
            average="softmax",
        ),
    )

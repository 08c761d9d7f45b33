# SPDX-License-Identifier: Apache-2.0
"""What recipes of VideoMAE and VideoMAE V2 share: 16 frames, AdamW, cosine after a warm-up from 0.

Learning rates are of 256 videos, `lr` and `min_lr` alike, and repeated clips are not counted.
Batches are GPUs x videos; mixup and cutmix draw one factor for all clips of a GPU, the repeats of
its videos included. The authors computed in half precision, which `model.config.dtype=bfloat16`
asks for.
"""

from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.recipes.recipe import (
    EvalSettings,
    MaskSettings,
    ModelSettings,
    OptimSettings,
    Recipe,
    TrainSettings,
)

_TUBE = MaskSettings(kind="tube", ratio=0.9)


def pretraining(
    name: str,
    preset: str,
    gpus: int,
    videos: int,  # on each
    lr: float,
    epochs: int,
    *,
    stride: int = 4,
    repeats: int = 1,
    warmup: float = 40.0,
    clip: float | None = None,
    mask: MaskSettings = _TUBE,
) -> Recipe:
    """Masked pre-training as V1 and V2 have it, with what differs between their scripts."""
    return Recipe(
        name=name,
        task="pretrain",
        processor="videomae-imagenet",
        model=ModelSettings(preset=preset),
        data=DataSettings(sampler="hold", stride=stride, repeats=repeats),
        augment=AugmentSettings(crop="multi_scale", flip=0.0),
        mask=mask,
        optim=OptimSettings(
            lr=lr,
            lr_batch=256,
            min_lr=1e-5,
            warmup_epochs=warmup,
            b1=0.9,
            b2=0.95,
            weight_decay=0.05,
            clip=clip,
        ),
        train=TrainSettings(epochs=epochs, batch_size=gpus * videos),
        # The authors validate no pre-training; a run here does, on one clip of each video.
        evaluation=EvalSettings(sampler="hold", stride=stride, resize=224),
    )


def finetuning(
    name: str,
    preset: str,
    gpus: int,
    videos: int,  # on each
    lr: float,
    epochs: int,
    *,
    repeats: int = 2,
    segments: bool = False,  # of a video, one frame of each, and no mirroring; else dense
    stride: int = 4,  # where dense
    warmup: float = 5.0,
    min_lr: float = 1e-6,
    weight_decay: float = 0.05,
    layer_decay: float = 0.75,
    drop_path: float = 0.1,
    head_dropout: float = 0.0,
    clip: float | None = None,
    num_labels: int | None = None,  # None: the preset's
) -> Recipe:
    """Fine-tuning as V1 and V2 have it, with what differs between their scripts."""
    config = {"drop_path_rate": drop_path, "head_dropout": head_dropout}
    if num_labels is not None:
        config["num_labels"] = num_labels
    sampler = "segments" if segments else "linspace"
    return Recipe(
        name=name,
        task="finetune",
        processor="videomae-imagenet",
        model=ModelSettings(preset=preset, config=config),
        data=DataSettings(sampler=sampler, stride=stride, repeats=repeats),
        augment=AugmentSettings(
            crop="random_resized",
            crop_scale=(0.08, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            flip=0.0 if segments else 0.5,
            rand_augment="rand-m7-n4-mstd0.5-inc1",
            erase=0.25,
            mixup=0.8,
            cutmix=1.0,
            mix_switch=0.5,
            mix_prob=1.0,
            mix_group=videos * repeats,
            smoothing=0.1,
        ),
        optim=OptimSettings(
            lr=lr,
            lr_batch=256,
            min_lr=min_lr,
            warmup_epochs=warmup,
            b1=0.9,
            b2=0.999,
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            clip=clip,
        ),
        train=TrainSettings(epochs=epochs, batch_size=gpus * videos),
        evaluation=EvalSettings(
            clips=2 if segments else 5,
            crops=3,
            sampler=sampler,
            stride=stride,
            resize=224,
            average="softmax",
        ),
    )

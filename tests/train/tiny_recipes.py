"""Recipes of models small enough to train in a test."""

import dataclasses

from tiny import SMALL_VIDEOMAE

from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.recipes.recipe import (
    EvalSettings,
    MaskSettings,
    ModelSettings,
    OptimSettings,
    Recipe,
    TrainSettings,
)

CLASSES = 4
VIEWS = EvalSettings(clips=2, crops=1, sampler="loop", stride=1, resize=16)
FINETUNE = Recipe(
    name="tiny-finetune",
    task="finetune",
    processor="videomae-imagenet",
    model=ModelSettings(
        preset="videomae-base-kinetics400",
        config=SMALL_VIDEOMAE
        | dict(num_labels=CLASSES, drop_path_rate=0.3, head_dropout=0.2, hidden_dropout_prob=0.1),
    ),
    data=DataSettings(sampler="loop", stride=1),
    augment=AugmentSettings(
        crop="random_resized",
        crop_scale=(0.5, 1.0),
        erase=0.5,
        mixup=0.8,
        cutmix=1.0,
        mix_group=2,
        smoothing=0.1,
    ),
    optim=OptimSettings(
        lr=1e-2,
        lr_batch=None,
        warmup_epochs=1,
        weight_decay=0.05,
        layer_decay=0.75,
        clip=1.0,
        ema=0.9,
    ),
    train=TrainSettings(epochs=4, batch_size=16),
    evaluation=VIEWS,
)
PRETRAIN = dataclasses.replace(
    FINETUNE,
    name="tiny-pretrain",
    task="pretrain",
    model=ModelSettings(
        preset="videomae-base", config=SMALL_VIDEOMAE | dict(hidden_dropout_prob=0.1)
    ),
    augment=AugmentSettings(crop="multi_scale", flip=0.5),
    mask=MaskSettings(kind="tube", ratio=0.75),
    optim=dataclasses.replace(FINETUNE.optim, layer_decay=None, b2=0.95),
)


def changed(recipe: Recipe, **fields) -> Recipe:
    """The recipe with fields such as `train__accumulate=2` changed."""
    for name, value in fields.items():
        section, _, field = name.partition("__")
        part = dataclasses.replace(getattr(recipe, section), **{field: value})
        recipe = dataclasses.replace(recipe, **{section: part})
    return recipe

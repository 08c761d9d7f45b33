# SPDX-License-Identifier: Apache-2.0
"""ViViT's recipes: the public configurations of scenic (Arnab et al. 2021), 32 frames each.

All use momentum SGD without weight decay, 64 clips, a cosine to 0 after a linear warm-up of 2.5
epochs, gradients clipped at norm 1, float32, and no average of the params. Short videos are looped,
each frame's height and width are scaled by two factors in 0.9..1.33, and half of the clips are
mirrored, also for Something-Something, since scenic's public code does not turn that off. Tests
average the logits of 4 clips x 3 crops.

A run starts from `model.start`: an ImageNet-21k ViT (its kernel goes to the second frame of a
tubelet) or a ViViT trained on Kinetics, which `init_from_video_model` adapts to the recipe's size:
scenic's large Kinetics models have 24 temporal layers, from which its code cannot start the others'
4. Scenic does not state the number of devices. It clips each device's gradient before the mean, and
draws one mixup factor per device; here both apply to the whole batch, unless `augment.mix_group`
says how many clips share a factor.

The variants with factorised self-attention and factorised dot-product attention have presets but no
published recipe.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.recipes.recipe import (
    EvalSettings,
    ModelSettings,
    OptimSettings,
    Recipe,
    TrainSettings,
)

_COLOUR = MappingProxyType({"colour": 0.8})


def _recipe(
    preset: str,
    *,
    lr: float,
    epochs: int = 30,
    stride: int = 2,
    resize: int = 256,
    crops: int = 3,
    augment: Mapping[str, Any],  # further fields of AugmentSettings
    config: Mapping[str, Any] = MappingProxyType({}),  # fields that override the preset's
) -> Recipe:
    return Recipe(
        name=preset,
        task="finetune",
        processor="vivit-scenic",
        model=ModelSettings(preset=preset, config=dict(config)),
        data=DataSettings(sampler="loop", stride=stride),
        augment=AugmentSettings(
            resize=resize,
            crop="random",
            jitter_scale=(0.9, 1.33),
            flip=0.5,
            **augment,
        ),
        optim=OptimSettings(
            algorithm="sgd",
            lr=lr,
            lr_batch=None,
            schedule="scenic",
            warmup_epochs=2.5,
            momentum=0.9,
            clip=1.0,
        ),
        train=TrainSettings(epochs=epochs, batch_size=64),
        evaluation=EvalSettings(
            clips=4, crops=crops, sampler="loop", stride=stride, resize=resize, average="logits"
        ),
    )


def vivit_b_16x2_kinetics400() -> Recipe:
    """ViViT-B/16x2, joint space-time attention, Kinetics-400, 30 epochs.

    Starts from: ViT-B/16, ImageNet-21k.
    Source: scenic, projects/vivit/configs/kinetics400/vivit_base_k400.py.
    Hardware: devices not named, 64 clips together.
    Result: 79.9 top-1, 4 x 3 views.
    """
    return _recipe("vivit-b-16x2-kinetics400", lr=0.1, augment=_COLOUR)


def vivit_b_16x2_fe_kinetics400() -> Recipe:
    """ViViT-B/16x2, factorised encoder of 12 + 4 layers, Kinetics-400, 30 epochs.

    Starts from: ViT-B/16, ImageNet-21k, in the spatial stage.
    Source: scenic, projects/vivit/configs/kinetics400/vivit_base_factorised_encoder.py.
    Hardware: devices not named, 64 clips together.
    Result: 78.4 top-1, 4 x 3 views.
    """
    return _recipe("vivit-b-16x2-fe-kinetics400", lr=0.05, augment=_COLOUR)


def vivit_l_16x2_fe_kinetics400() -> Recipe:
    """ViViT-L/16x2, factorised encoder of 24 + 24 layers, Kinetics-400, 30 epochs.

    Starts from: ViT-L/16, ImageNet-21k, in the spatial stage.
    Source: scenic, projects/vivit/configs/kinetics400/vivit_large_factorised_encoder.py.
    Hardware: devices not named, 64 clips together.
    Result: 80.3 top-1, 4 x 3 views.
    """
    return _recipe("vivit-l-16x2-fe-kinetics400", lr=0.1, augment=_COLOUR)


def vivit_l_16x2_fe_kinetics600() -> Recipe:
    """ViViT-L/16x2, factorised encoder of 24 + 24 layers, Kinetics-600, 30 epochs.

    Starts from: ViT-L/16, ImageNet-21k, in the spatial stage.
    Source: scenic, projects/vivit/configs/kinetics600/vivit_large_factorised_encoder.py.
    Hardware: devices not named, 64 clips together.
    Result: 81.6 top-1, 4 x 3 views.
    """
    return _recipe("vivit-l-16x2-fe-kinetics600", lr=0.05, augment=_COLOUR)


def vivit_l_16x2_fe_ssv2() -> Recipe:
    """ViViT-L/16x2, factorised encoder of 24 + 4 layers, 256 pixels, Something-Something v2.

    35 epochs. Layers are dropped with probability 0.3.

    Starts from: ViViT-L/16x2 of Kinetics, with resized positions and its first 4 temporal layers,
    or ViT-L/16, ImageNet-21k, in the spatial stage, with resized positions.
    Source: scenic, projects/vivit/configs/something_something_v2/vivit_large_factorised_encoder.py.
    Hardware: devices not named, 64 clips together, more than one on each.
    Result: none published; the configuration has 4 x 3 views.
    """
    return _recipe(
        "vivit-l-16x2-fe-ssv2",
        lr=0.4,
        epochs=35,
        stride=1,
        resize=288,
        augment=dict(rand_augment="scenic-m20-n2", mixup=0.3, smoothing=0.3),
        config=dict(image_size=256, num_temporal_layers=4, drop_path_rate=0.3),
    )


def vivit_l_16x2_fe_epic_kitchens() -> Recipe:
    """ViViT-L/16x2, factorised encoder of 24 + 4 layers, Epic-Kitchens nouns and verbs, 50 epochs.

    The preset has both heads; layers are dropped with probability 0.2.

    Starts from: ViViT-L/16x2 of Kinetics, with its first 4 temporal layers, or ViT-L/16,
    ImageNet-21k, in the spatial stage.
    Source: scenic, projects/vivit/configs/epic_kitchens/vivit_large_factorised_encoder.py.
    Hardware: devices not named, 64 clips together, more than one on each.
    Result: 43.6 (presumably noun and verb together, top-1), 4 x 1 views, as in this recipe; the
    configuration has 4 x 3.
    """
    return _recipe(
        "vivit-l-16x2-fe-epic-kitchens",
        lr=0.5,
        epochs=50,
        stride=1,
        crops=1,
        augment=dict(rand_augment="scenic-m15-n2", mixup=0.1, smoothing=0.2),
        config=dict(num_temporal_layers=4, drop_path_rate=0.2),
    )


RECIPES = (
    vivit_b_16x2_kinetics400,
    vivit_b_16x2_fe_kinetics400,
    vivit_l_16x2_fe_kinetics400,
    vivit_l_16x2_fe_kinetics600,
    vivit_l_16x2_fe_ssv2,
    vivit_l_16x2_fe_epic_kitchens,
)

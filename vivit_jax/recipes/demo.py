# SPDX-License-Identifier: Apache-2.0
"""The recipes of `vivit-jax demo`, whose models train in seconds on its clips."""

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

_SIZES = dict(
    image_size=48,
    num_frames=8,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=192,
    initializer_range=0.1,  # 0.02 suits widths near 768
)
# With four frames per token the patch projection itself sees motion; patches are smaller than the
# shapes, so that attention can be seen to follow them. On CPU the gradient of an MLP with erf takes
# twice as long as with tanh.
_VIDEOMAE = _SIZES | dict(tubelet_size=4, patch_size=8, hidden_act="gelu_new")
_DECODER = dict(
    decoder_hidden_size=64,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=128,
)
# Clips are neither cropped nor mirrored: the classes are directions.
_WHOLE = AugmentSettings(crop="center", flip=0.0)
_CLIPS = DataSettings(sampler="loop", stride=1, cache_gib=1.0)
_VIEWS = EvalSettings(sampler="loop", stride=1, resize=48)


def demo_pretrain() -> Recipe:
    """The demo's masked pre-training, on clips without labels.

    Starts from: nothing.
    Source: this project; the papers have no such run.
    Hardware: two CPU cores.
    Result: see docs/measurements.md.
    """
    return Recipe(
        name="demo-pretrain",
        task="pretrain",
        processor="videomae-imagenet",
        model=ModelSettings(
            preset="videomae-base", config=_VIDEOMAE | _DECODER, initial="huggingface"
        ),
        data=_CLIPS,
        augment=dataclasses.replace(_WHOLE, flip=0.5),
        # A tenth of 72 tokens is too little to find a shape.
        mask=MaskSettings(kind="random", ratio=0.75),
        optim=OptimSettings(lr=4e-3, lr_batch=None, warmup_epochs=5, b2=0.95, weight_decay=0.05),
        train=TrainSettings(epochs=80, batch_size=16),
        evaluation=_VIEWS,
    )


def demo_finetune() -> Recipe:
    """The demo's fine-tuning, on few clips with labels.

    Starts from: the demo's pre-training, or nothing, for comparison.
    Source: this project; the papers have no such run.
    Hardware: two CPU cores.
    Result: see docs/measurements.md.
    """
    return Recipe(
        name="demo-finetune",
        task="finetune",
        processor="videomae-imagenet",
        model=ModelSettings(
            preset="videomae-base-kinetics400",
            config=_VIDEOMAE | dict(num_labels=8),
            initial="huggingface",
        ),
        data=_CLIPS,
        augment=AugmentSettings(crop="random_resized", crop_scale=(0.5, 1.0), flip=0.0),
        optim=OptimSettings(lr=5e-3, lr_batch=None, warmup_epochs=8, weight_decay=0.05),
        train=TrainSettings(epochs=80, batch_size=16),
        evaluation=_VIEWS,
    )


def demo_all_labels() -> Recipe:
    """The demo's classifier, trained from scratch on all clips with their labels.

    Starts from: nothing.
    Source: this project; the papers have no such run.
    Hardware: two CPU cores.
    Result: see docs/measurements.md.
    """
    recipe = demo_finetune()
    return dataclasses.replace(
        recipe,
        name="demo-all-labels",
        augment=_WHOLE,
        optim=dataclasses.replace(recipe.optim, lr=2e-3, warmup_epochs=1),
        train=TrainSettings(epochs=6, batch_size=16),
    )


def demo_vivit() -> Recipe:
    """The demo's ViViT, trained from scratch on many clips with labels.

    Starts from: nothing.
    Source: this project; the papers have no such run.
    Hardware: two CPU cores.
    Result: see docs/measurements.md.
    """
    sizes = _SIZES | dict(tubelet_size=(4, 16, 16), num_labels=8)
    recipe = demo_all_labels()
    return dataclasses.replace(
        recipe,
        name="demo-vivit",
        processor="vivit-scenic",
        model=ModelSettings(preset="vivit-b-16x2-kinetics400", config=sizes, initial="huggingface"),
        optim=dataclasses.replace(recipe.optim, warmup_epochs=2),
        train=TrainSettings(epochs=12, batch_size=16),
    )


RECIPES = (demo_pretrain, demo_finetune, demo_all_labels, demo_vivit)

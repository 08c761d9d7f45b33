# SPDX-License-Identifier: Apache-2.0
"""The published recipes against the tables of their papers and repositories."""

import dataclasses
import inspect

import pytest

from vivit_jax.errors import UserError
from vivit_jax.recipes import RECIPES, check, model_config, recipe_named, summary

K400, SSV2 = 400, 174
V1, V2 = "videomae-v1-", "videomae-v2-"

# batch, peak lr of that batch, epochs, warm-up, stride, mask, ratio, repeats, clip
PRETRAINING = {
    V1 + "small-kinetics400-pretrain": (1024, 6e-4, 1600, 40, 4, "tube", 0.9, 1, None),
    V1 + "base-kinetics400-800e-pretrain": (2048, 1.2e-3, 800, 40, 4, "tube", 0.9, 1, None),
    V1 + "base-kinetics400-pretrain": (2048, 1.2e-3, 1600, 40, 4, "tube", 0.9, 1, None),
    V1 + "large-kinetics400-pretrain": (512, 3e-4, 1600, 40, 4, "tube", 0.9, 1, None),
    V1 + "huge-kinetics400-pretrain": (1024, 6e-4, 1600, 40, 4, "tube", 0.9, 1, None),
    V1 + "small-ssv2-pretrain": (2048, 1.2e-3, 2400, 40, 2, "tube", 0.9, 1, None),
    V1 + "base-ssv2-800e-pretrain": (2048, 1.2e-3, 800, 40, 2, "tube", 0.9, 1, None),
    V1 + "base-ssv2-pretrain": (2048, 1.2e-3, 2400, 40, 2, "tube", 0.9, 1, None),
    V1 + "base-ucf101-pretrain": (192, 2.25e-4, 3200, 40, 4, "tube", 0.75, 1, None),
    V2 + "base-hybrid-pretrain": (1024, 4e-3, 200, 20, 4, "dual", 0.9, 4, None),
    V2 + "large-hybrid-pretrain": (1536, 6e-3, 300, 30, 4, "dual", 0.9, 4, None),
    V2 + "huge-hybrid-pretrain": (2048, 8e-3, 300, 30, 4, "dual", 0.9, 4, None),
    V2 + "giant-hybrid-pretrain": (2048, 4.8e-3, 300, 30, 4, "dual", 0.9, 4, 0.02),
}
# classes, batch, repeats, videos on a GPU, peak lr of the batch, epochs, layer decay, drop path,
# weight decay, dropout of the head, views
FINETUNING = {
    V1 + "small-kinetics400": (K400, 384, 2, 12, 7.5e-4, 150, 0.75, 0.1, 0.05, 0, "5x3"),
    V1 + "base-kinetics400-800e": (K400, 512, 1, 8, 2e-3, 100, 0.75, 0.1, 0.05, 0, "5x3"),
    V1 + "base-kinetics400": (K400, 384, 2, 6, 7.5e-4, 75, 0.75, 0.1, 0.05, 0, "5x3"),
    V1 + "large-kinetics400": (K400, 128, 2, 2, 1e-3, 35, 0.75, 0.1, 0.05, 0, "5x3"),
    V1 + "huge-kinetics400": (K400, 512, 2, 8, 2e-3, 50, 0.75, 0.2, 0.05, 0.5, "5x3"),
    V1 + "small-ssv2": (SSV2, 384, 2, 12, 1.5e-3, 40, 0.7, 0.1, 0.05, 0, "2x3"),
    V1 + "base-ssv2-800e": (SSV2, 512, 1, 8, 1e-3, 50, 0.75, 0.1, 0.05, 0, "2x3"),
    V1 + "base-ssv2": (SSV2, 384, 2, 6, 7.5e-4, 30, 0.75, 0.1, 0.05, 0, "2x3"),
    V1 + "base-ucf101": (101, 128, 2, 16, 2.5e-4, 100, 0.7, 0.2, 0.05, 0.5, "5x3"),
    V2 + "base-kinetics400": (K400, 512, 2, 16, 1.4e-3, 90, 0.75, 0.1, 0.05, 0, "5x3"),
    V2 + "base-kinetics710": (710, 512, 2, 16, 1.4e-3, 90, 0.75, 0.1, 0.05, 0, "5x3"),
    V2 + "base-ssv2": (SSV2, 256, 2, 16, 2e-3, 25, 0.65, 0.1, 0.05, 0, "2x3"),
    V2 + "large-kinetics400": (K400, 192, 2, 6, 1.5e-3, 35, 0.75, 0.2, 0.05, 0, "5x3"),
    V2 + "large-ssv2": (SSV2, 192, 2, 6, 3.75e-4, 20, 0.75, 0.2, 0.05, 0, "2x3"),
    V2 + "huge-kinetics400": (K400, 128, 2, 4, 5e-4, 40, 0.8, 0.2, 0.05, 0.5, "5x3"),
    V2 + "huge-kinetics600": (600, 128, 2, 4, 5e-4, 40, 0.8, 0.2, 0.05, 0.5, "5x3"),
    V2 + "huge-kinetics710": (710, 128, 2, 4, 5e-4, 40, 0.8, 0.2, 0.05, 0.5, "5x3"),
    V2 + "huge-ssv2": (SSV2, 128, 2, 4, 2.5e-4, 20, 0.8, 0.2, 0.05, 0, "2x3"),
    V2 + "giant-kinetics710": (710, 96, 2, 3, 3.75e-4, 35, 0.9, 0.3, 0.1, 0, "5x3"),
    V2 + "giant-kinetics400": (K400, 192, 2, 3, 7.5e-4, 30, 0.9, 0.2, 0.1, 0, "5x3"),
    V2 + "giant-kinetics710-kinetics400": (
        K400, 96, 2, 3, 3.75e-6, 3, 0.9, 0.25, 0.1, 0, "5x3",
    ),
    V2 + "giant-kinetics710-kinetics600": (600, 96, 2, 3, 3.75e-6, 3, 0.9, 0.25, 0.1, 0, "5x3"),
    V2 + "giant-ssv2": (SSV2, 96, 2, 3, 1.125e-4, 20, 0.9, 0.25, 0.05, 0, "2x3"),
    V2 + "giant-kinetics710-ucf101": (101, 24, 2, 3, 9.375e-5, 50, 0.9, 0.35, 0.05, 0.5, "5x3"),
    V2 + "giant-kinetics710-hmdb51": (51, 24, 2, 3, 4.6875e-5, 15, 0.9, 0.35, 0.05, 0.5, "5x3"),
}  # fmt: skip
# lr, epochs, stride, resize, side of the frames, colour, RandAugment, mixup, smoothing, drop path,
# layers of the temporal stage, classes, views
VIVIT = {
    "vivit-b-16x2-kinetics400": (0.1, 30, 2, 256, 224, 0.8, None, 0, 0, 0, 0, K400, "4x3"),
    "vivit-b-16x2-fe-kinetics400": (0.05, 30, 2, 256, 224, 0.8, None, 0, 0, 0, 4, K400, "4x3"),
    "vivit-l-16x2-fe-kinetics400": (0.1, 30, 2, 256, 224, 0.8, None, 0, 0, 0, 24, K400, "4x3"),
    "vivit-l-16x2-fe-kinetics600": (0.05, 30, 2, 256, 224, 0.8, None, 0, 0, 0, 24, 600, "4x3"),
    "vivit-l-16x2-fe-ssv2": (
        0.4, 35, 1, 288, 256, 0, "scenic-m20-n2", 0.3, 0.3, 0.3, 4, SSV2, "4x3",
    ),
    "vivit-l-16x2-fe-epic-kitchens": (
        0.5, 50, 1, 256, 224, 0, "scenic-m15-n2", 0.1, 0.2, 0.2, 4, 397, "4x1",
    ),
}  # fmt: skip


def peak(recipe):
    batch = recipe.optim.lr_batch
    return recipe.optim.lr * (1 if batch is None else recipe.train.batch_size / batch)


def views(recipe):
    return f"{recipe.evaluation.clips}x{recipe.evaluation.crops}"


PUBLISHED = [name for name in RECIPES if not name.startswith("demo-")]


def test_the_demos_recipes_are_sound():
    demos = [name for name in RECIPES if name not in PUBLISHED]
    assert demos == ["demo-pretrain", "demo-finetune", "demo-all-labels", "demo-vivit"]
    for name in demos:
        assert check(recipe_named(name)).name == name


def test_there_is_a_recipe_for_every_row_and_no_other():
    rows = {*VIVIT, *PRETRAINING, *(f"{name}-finetune" for name in FINETUNING)}
    assert set(PUBLISHED) == rows and len(rows) == 6 + 9 + 9 + 4 + 16


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_is_sound_and_its_model_can_be_configured(name):
    recipe = check(recipe_named(name))
    assert recipe.name == name
    config = model_config(recipe)
    assert config.model_type == name.partition("-")[0]
    assert config.num_frames == (32 if name in VIVIT else 16)
    assert recipe.task == ("pretrain" if name.endswith("-pretrain") else "finetune")
    # Nobody's published run averages the params, computes steps in parts or stops early.
    assert recipe.optim.ema is None and recipe.train.accumulate == 1 and recipe.train.steps is None
    assert recipe.model.start is None and recipe.data.train == "" and recipe.optim.freeze == ()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_where_it_is_from_and_what_it_gave(name):
    text = inspect.getdoc(RECIPES[name])
    for heading in ("Starts from: ", "Source: ", "Hardware: ", "Result: "):
        assert text.count(f"\n{heading}") == 1
    line = summary(name)
    assert text.startswith(line) and line.endswith(".") and len(line) < 100
    assert len({summary(other) for other in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("name", PRETRAINING)
def test_masked_pretraining_is_the_scripts(name):
    recipe = recipe_named(name)
    optim, train = recipe.optim, recipe.train
    assert PRETRAINING[name] == (
        train.batch_size,
        pytest.approx(peak(recipe), rel=1e-12),
        train.epochs,
        optim.warmup_epochs,
        recipe.data.stride,
        recipe.mask.kind,
        recipe.mask.ratio,
        recipe.data.repeats,
        optim.clip,
    )
    assert (optim.algorithm, optim.b1, optim.b2, optim.eps) == ("adamw", 0.9, 0.95, 1e-8)
    assert (optim.schedule, optim.min_lr, optim.weight_decay) == ("videomae", 1e-5, 0.05)
    assert optim.layer_decay is None and recipe.mask.decoder_ratio == 0.5
    assert (recipe.processor, recipe.data.sampler) == ("videomae-imagenet", "hold")
    augment = recipe.augment
    assert (augment.crop, augment.flip, augment.resize) == ("multi_scale", 0, None)
    assert (augment.rand_augment, augment.erase, augment.colour) == (None, 0, 0)
    assert recipe.evaluation.stride == recipe.data.stride and recipe.evaluation.sampler == "hold"
    config = model_config(recipe)
    assert config.drop_path_rate == 0 and config.norm_pix_loss
    size = name.split("-")[2]
    deep = name.startswith(V1) and size in ("large", "huge")
    assert config.decoder_num_hidden_layers == (12 if deep else 4)
    widths = {"small": 384, "base": 768, "large": 1024, "huge": 1280, "giant": 1408}
    assert config.hidden_size == widths[size]


@pytest.mark.parametrize("name", FINETUNING)
def test_fine_tuning_of_videomae_is_the_scripts(name):
    recipe = recipe_named(f"{name}-finetune")
    optim, train, augment, config = recipe.optim, recipe.train, recipe.augment, model_config(recipe)
    assert FINETUNING[name] == (
        config.num_labels,
        train.batch_size,
        recipe.data.repeats,
        augment.mix_group / recipe.data.repeats,
        pytest.approx(peak(recipe), rel=1e-12),
        train.epochs,
        optim.layer_decay,
        config.drop_path_rate,
        optim.weight_decay,
        config.head_dropout,
        views(recipe),
    )
    assert (optim.algorithm, optim.b1, optim.b2, optim.eps) == ("adamw", 0.9, 0.999, 1e-8)
    slow = name in (V1 + "huge-kinetics400", V1 + "base-ucf101")
    assert (optim.schedule, optim.min_lr) == ("videomae", 1e-5 if slow else 1e-6)
    assert optim.warmup_epochs == (1 if train.epochs == 3 else 5)
    assert optim.clip == (5.0 if name == V2 + "giant-kinetics710" else None)
    assert (augment.crop, augment.resize) == ("random_resized", None)
    assert augment.crop_scale == (0.08, 1) and augment.crop_ratio == (0.75, 4 / 3)
    assert augment.rand_augment == "rand-m7-n4-mstd0.5-inc1" and augment.colour == 0
    assert (augment.erase, augment.mixup, augment.cutmix) == (0.25, 0.8, 1)
    assert (augment.mix_switch, augment.mix_prob, augment.smoothing) == (0.5, 1, 0.1)
    sparse, stride = "ssv2" in name, 2 if "hmdb51" in name else 4
    sampler = "segments" if sparse else "linspace"
    assert augment.flip == (0 if sparse else 0.5) and recipe.data.sampler == sampler
    evaluation = recipe.evaluation
    assert (evaluation.sampler, evaluation.average, evaluation.resize) == (sampler, "softmax", 224)
    assert recipe.data.stride == evaluation.stride == stride
    assert recipe.processor == "videomae-imagenet" and config.drop_path_rescale
    # As the authors compute, not as transformers does.
    assert config.layer_norm_eps == config.fc_norm_eps == 1e-6


@pytest.mark.parametrize("name", VIVIT)
def test_vivit_is_scenic_s(name):
    recipe = recipe_named(name)
    optim, augment, config = recipe.optim, recipe.augment, model_config(recipe)
    assert VIVIT[name] == (
        peak(recipe),
        recipe.train.epochs,
        recipe.data.stride,
        augment.resize,
        config.image_size,
        augment.colour,
        augment.rand_augment,
        augment.mixup,
        augment.smoothing,
        config.drop_path_rate,
        config.temporal_layers,
        config.num_labels,
        views(recipe),
    )
    assert (optim.algorithm, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 0)
    assert (optim.schedule, optim.warmup_epochs, optim.min_lr) == ("scenic", 2.5, 0)
    assert (optim.clip, optim.layer_decay, recipe.train.batch_size) == (1, None, 64)
    assert (augment.crop, augment.jitter_scale, augment.flip) == ("random", (0.9, 1.33), 0.5)
    assert (augment.erase, augment.cutmix, recipe.data.repeats) == (0, 0, 1)
    evaluation = recipe.evaluation
    assert (evaluation.sampler, evaluation.average) == (recipe.data.sampler, "logits")
    assert (recipe.data.sampler, evaluation.stride) == ("loop", recipe.data.stride)
    assert evaluation.resize == augment.resize and recipe.processor == "vivit-scenic"
    assert not config.drop_path_rescale and config.pooling == "cls"


def test_a_recipe_cannot_be_changed_in_place_and_none_shares_its_settings_with_another():
    recipe = recipe_named("videomae-v1-base-ssv2-finetune")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optim.lr = 1.0
    again = recipe_named("videomae-v1-base-ssv2-finetune")
    assert again == recipe and again.model.config is not recipe.model.config


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(UserError, match="no recipe .*did you mean videomae-v1-base-kinetics400-"):
        recipe_named("videomae-v1-base-kinetics400-finetun")
    with pytest.raises(UserError, match="no recipe 'x'; known: vivit-b-16x2-kinetics400, "):
        recipe_named("x")

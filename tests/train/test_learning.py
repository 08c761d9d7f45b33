# SPDX-License-Identifier: Apache-2.0
"""Runs that learn: nouns and verbs from clips in which only time tells the verb, and pixels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL_VIDEOMAE, SMALL_VIVIT
from tiny_recipes import FINETUNE, PRETRAIN, changed

from vivit_jax.recipes.recipe import ModelSettings
from vivit_jax.train.log import read_metrics
from vivit_jax.train.loop import train

NOUNS, VERBS = 3, 2


def write_clips(directory, count, seed, labelled):
    """A list of .npy clips of a coloured square (the noun) that brightens or darkens (the verb)."""
    rng = np.random.default_rng(seed)
    levels = np.linspace(40, 220, 4)
    directory.mkdir()
    lines = []
    for i in range(count):
        noun, verb = int(rng.integers(NOUNS)), int(rng.integers(VERBS))
        clip = rng.integers(0, 30, size=(4, 16, 16, 3))
        clip[:, :, :, noun] = (levels if verb else levels[::-1])[:, None, None]
        np.save(directory / f"{i}.npy", clip.astype(np.uint8))
        lines.append(f"{i}.npy {noun} {verb}" if labelled else f"{i}.npy")
    (directory / "list.txt").write_text("\n".join(lines))
    return str(directory / "list.txt")


def learnt(recipe, tmp_path, **fields):
    data = dict(
        data__train=write_clips(tmp_path / "train", 128, 0, recipe.task == "finetune"),
        data__validation=write_clips(tmp_path / "held-out", 64, 1, recipe.task == "finetune"),
    )
    return train(changed(recipe, **data, **fields), tmp_path / "run", say=lambda text: None)


@pytest.mark.slow
def test_two_heads_are_learnt(tmp_path):
    """By a factorised encoder, whose answers are averaged as scenic does."""
    sizes = SMALL_VIVIT | dict(
        hidden_size=32,
        num_temporal_layers=1,
        intermediate_size=64,
        num_labels=NOUNS + VERBS,
        class_splits=(NOUNS, VERBS),
        split_names=("noun", "verb"),
    )
    recipe = dataclasses.replace(
        FINETUNE,
        processor="vivit-scenic",
        model=ModelSettings(preset="vivit-b-16x2-fe-kinetics400", config=sizes),
        augment=dataclasses.replace(PRETRAIN.augment, crop="center", smoothing=0.1),
        optim=dataclasses.replace(FINETUNE.optim, lr=3e-3, layer_decay=None, ema=None),
        evaluation=dataclasses.replace(FINETUNE.evaluation, average="logits"),
    )
    metrics = learnt(recipe, tmp_path, train__epochs=24, train__evaluate_every=24).metrics
    names = ("noun_accuracy", "verb_accuracy", "noun-verb_accuracy")
    assert min(metrics[name] for name in names) > 0.9, metrics


@pytest.mark.slow
def test_pixels_are_learnt(tmp_path):
    config = SMALL_VIDEOMAE | dict(norm_pix_loss=False, hidden_size=32, decoder_hidden_size=32)
    fields = dict(
        model__config=config, mask__kind="random", mask__ratio=0.5, train__evaluate_every=16
    )
    outcome = learnt(PRETRAIN, tmp_path, train__epochs=16, **fields)
    losses = [
        line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line
    ]
    assert outcome.metrics["loss"] < losses[0] / 3
    assert jnp.isfinite(jnp.array(losses)).all()

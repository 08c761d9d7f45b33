# SPDX-License-Identifier: Apache-2.0
"""A factorised encoder learns nouns and verbs from clips in which only time tells the verb.

And a masked autoencoder learns to fill in the same clips.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vivit_jax
from vivit_jax.masking import random_mask
from vivit_jax.train.fit import fit, init_params, logits_of, normaliser
from vivit_jax.train.metrics import classification_metrics

NOUNS, VERBS = 3, 2
NORMALISE = normaliser(vivit_jax.VideoProcessor.named("vivit-scenic"))


def make_clips(count, seed):
    """uint8 clips of a coloured square (the noun) that brightens or darkens (the verb)."""
    rng = np.random.default_rng(seed)
    nouns, verbs = rng.integers(NOUNS, size=count), rng.integers(VERBS, size=count)
    levels = np.linspace(40, 220, 4)
    clips = rng.integers(0, 30, size=(count, 4, 16, 16, 3))
    for clip, noun, verb in zip(clips, nouns, verbs, strict=True):
        clip[:, :, :, noun] = (levels if verb else levels[::-1])[:, None, None]
    return clips.astype(np.uint8), np.stack([nouns, verbs], axis=1)


def make_model(**values):
    return vivit_jax.VivitForVideoClassification(
        vivit_jax.VivitConfig(
            image_size=16,
            num_frames=4,
            tubelet_size=(2, 8, 8),
            num_hidden_layers=2,
            num_attention_heads=2,
            **values,
        )
    )


def train(model, clips, labels, **options):
    """The parameters, and what was reported after every epoch."""
    epochs = []
    params = fit(
        model,
        init_params(model, seed=0),
        clips,
        labels,
        normalise=NORMALISE,
        report=epochs.append,
        **options,
    )
    return params, epochs


def test_two_heads_are_learnt():
    model = make_model(
        attention_type="factorised_encoder",
        num_temporal_layers=1,
        pooling="mean",
        hidden_size=32,
        intermediate_size=64,
        num_labels=NOUNS + VERBS,
        class_splits=(NOUNS, VERBS),
        split_names=("noun", "verb"),
        drop_path_rate=0.1,
    )
    config = model.config
    clips, labels = make_clips(256, seed=0)
    params, epochs = train(model, clips, labels, epochs=16, batch_size=32, learning_rate=3e-3)
    assert epochs[-1].loss < epochs[0].loss / 2
    held_out, labels = make_clips(128, seed=1)
    logits = logits_of(model, params, np.asarray(NORMALISE(jnp.asarray(held_out))))
    metrics = classification_metrics(logits, labels, config.class_splits, config.split_names)
    accuracies = {name: float(value) for name, value in metrics.items() if "top" not in name}
    assert set(accuracies) == {"noun_accuracy", "verb_accuracy", "noun-verb_accuracy"}
    assert min(accuracies.values()) > 0.9, accuracies


def test_dropout_acts_while_training():
    """The same data and seed give another loss where branches are left out."""
    clips, labels = make_clips(16, seed=0)
    losses = []
    for rate in (0.0, 0.5):
        sizes = dict(hidden_size=16, intermediate_size=16, num_labels=NOUNS, pooling="mean")
        model = make_model(drop_path_rate=rate, **sizes)
        options = dict(epochs=1, batch_size=16, learning_rate=1e-3)
        _, epochs = train(model, clips, labels[:, 0], **options)
        losses.append(epochs[0].loss)
    assert losses[0] != losses[1]


IMAGENET = normaliser(vivit_jax.VideoProcessor.named("videomae-imagenet"))


@pytest.fixture(scope="module")
def autoencoder():
    config = vivit_jax.VideoMAEConfig(
        image_size=16,
        num_frames=4,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        norm_pix_loss=False,
        use_mean_pooling=False,
        initializer_range=0.06,
    )
    model = vivit_jax.VideoMAEForPreTraining(config)
    mask = functools.partial(random_mask, grid=config.grid, ratio=0.5)
    return model, init_params(model, 0, mask(jax.random.key(0), 1)), mask


def test_a_masked_autoencoder_is_learnt(autoencoder):
    model, params, mask = autoencoder
    clips, _ = make_clips(64, seed=0)
    epochs, drawn = [], []

    def spied(key, batch):
        chosen = mask(key, batch)
        jax.debug.callback(lambda hidden: drawn.append(np.asarray(hidden)), chosen.masked)
        return chosen

    options = dict(normalise=IMAGENET, mask=spied, batch_size=16, learning_rate=3e-3, b2=0.95)
    fit(
        model,
        params,
        clips,
        epochs=12,
        augment=lambda rng, clips: (clips[:, ::-1],),
        report=epochs.append,
        **options,
    )
    assert epochs[-1].loss < epochs[0].loss / 3
    assert epochs[-1].accuracy is None
    jax.effects_barrier()
    # A mask of its own for each of 16 clips in every step.
    assert len(drawn) == 12 * 4 and drawn[0].shape == (16, 4)
    assert len(np.unique(np.concatenate(drawn), axis=0)) > 50  # of 70


def test_fit_takes_labels_or_a_mask(autoencoder):
    model, params, mask = autoencoder
    clips, labels = make_clips(4, seed=0)
    options = dict(normalise=IMAGENET, epochs=1, batch_size=2, learning_rate=1e-3)
    with pytest.raises(vivit_jax.UserError, match="neither labels nor a mask"):
        fit(model, params, clips, **options)
    with pytest.raises(vivit_jax.UserError, match="fit got labels and a mask"):
        fit(model, params, clips, labels[:, 0], mask=mask, **options)

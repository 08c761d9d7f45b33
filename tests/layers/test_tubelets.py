# SPDX-License-Identifier: Apache-2.0
"""Tubelets of floats and of bytes, in every order that a platform may ask for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow, random_params
from tiny import VIDEOMAE, config_of

import vivit_jax
from vivit_jax import Mask, UserError, VideoMAEForPreTraining
from vivit_jax.layers import tubelets as tubelets_module
from vivit_jax.layers.tubelets import (
    CHANNELS_FIRST,
    COLUMNS_FIRST,
    FRAMES_FIRST,
    ByteClips,
    reordered,
    tubelets,
)
from vivit_jax.models.losses import reconstruction_targets
from vivit_jax.train.normalise import hashable_arithmetic, normaliser

# Of each axis a size that the tubelet does not divide; five channels are more than a word holds.
SIZE, TUBELET = (5, 9, 14), (2, 4, 3)
GRID = (2, 2, 4)


def processor(channels):
    statistics = np.linspace(0.3, 0.6, channels), np.linspace(0.2, 0.3, channels)
    mean, std = (tuple(v.tolist()) for v in statistics)
    return vivit_jax.VideoProcessor.named("videomae-imagenet", image_mean=mean, image_std=std)


def assert_same(found, expected, tolerance=1e-6):
    """Equal but for a rounding: compilers may take byte * scale + shift as one operation."""
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def both(channels, size=SIZE, batch=2, **changes):
    """The same clips as bytes and as floats, both compiled."""
    rng = np.random.default_rng(channels)
    clips = jnp.asarray(rng.integers(0, 256, (batch, *size, channels), np.uint8))
    made = dataclasses.replace(processor(channels), **changes)
    return ByteClips(clips, *hashable_arithmetic(made)), jax.jit(normaliser(made))(clips)


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("indices", [None, np.array([[3, 0, 15], [7, 7, 2]])], ids=["all", "some"])
@pytest.mark.parametrize("order", [FRAMES_FIRST, CHANNELS_FIRST, COLUMNS_FIRST])
def test_every_order_holds_the_same_pixels(order, indices, channels):
    data, pixels = both(channels)
    cut = jax.jit(tubelets, static_argnums=(1, 3))
    sort = jax.jit(reordered, static_argnums=(1, 2, 3, 4))
    expected = np.asarray(cut(pixels, TUBELET, indices, FRAMES_FIRST))
    given = pixels if order == COLUMNS_FIRST else data
    found = cut(given, TUBELET, indices, order)
    assert found.shape == (2, 3 if indices is not None else np.prod(GRID), 24 * channels)
    back = sort(found, TUBELET, channels, order, FRAMES_FIRST)
    assert_same(back, expected)
    forth = sort(expected, TUBELET, channels, FRAMES_FIRST, order)
    assert_same(forth, found)
    # One value of one pixel, by hand: the second token's second frame, third row, first column.
    if indices is None:
        value = back[1, 1].reshape(*TUBELET, channels)[1, 2, 0]
        assert_same(value, pixels[1, 1, 2, 3])


def test_one_scale_for_all_channels():
    data, pixels = both(3, do_normalize=False)
    assert len(data.scale) == 1
    assert_same(tubelets(data, TUBELET), tubelets(pixels, TUBELET))


@pytest.mark.parametrize("order", [FRAMES_FIRST, CHANNELS_FIRST, COLUMNS_FIRST])
def test_an_index_past_the_end_gives_nan(order):
    data, pixels = both(3)
    given = pixels if order == COLUMNS_FIRST else data
    found = tubelets(given, TUBELET, np.array([[0, 15], [16, 99]]), order)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "place"),
    mostly_slow(itertools.product([True, False], ["cpu", "tpu"]), (True, "tpu")),
)
def test_pre_training_on_bytes_is_that_on_floats(norm, place, monkeypatch):
    """Loss, gradients and the logits' order; on a TPU the tubelets' own order differs."""
    config = vivit_jax.VideoMAEConfig(
        **VIDEOMAE | dict(image_size=(32, 16), use_mean_pooling=False, norm_pix_loss=norm)
    )
    model = VideoMAEForPreTraining(config)
    data, pixels = both(3, (config.num_frames, *config.frame_size))
    mask = vivit_jax.tube_mask(np.random.default_rng(0), 2, config.grid, 0.5)
    params = random_params(model)

    def loss(params, pixel_values):
        out = model.apply({"params": params}, pixel_values, mask)
        return out.loss, out.logits

    step = jax.value_and_grad(loss, has_aux=True)
    (expected, logits), gradients = jax.jit(step)(params, pixels)
    monkeypatch.setattr(tubelets_module, "platform", lambda: place)
    (found, found_logits), found_gradients = jax.jit(lambda *args: step(*args))(params, data)
    assert_same(found, expected, 2e-5)
    assert_same(found_logits, logits, 2e-5)
    for one, other in zip(*map(jax.tree.leaves, (found_gradients, gradients)), strict=True):
        assert_same(one, other, 2e-5)


@pytest.mark.parametrize(
    ("case", "place"),
    mostly_slow(
        itertools.product(["vivit base", "vivit sampled", "videomae classifier"], ["cpu", "tpu"]),
        *(("vivit base", "tpu"), ("vivit sampled", "cpu"), ("videomae classifier", "tpu")),
    ),
)
def test_models_without_masks_take_bytes(case, place, monkeypatch):
    monkeypatch.setattr(tubelets_module, "platform", lambda: place)
    if case == "vivit sampled":
        sampled = dict(num_sampled_frames=4, num_frames=8, tubelet_size=(1, 8, 8))
        config = dataclasses.replace(config_of("vivit base"), **sampled)
        model = vivit_jax.VivitModel(config)
    elif case == "vivit base":
        config = config_of(case)
        model = vivit_jax.VivitModel(config)
    else:
        config = vivit_jax.VideoMAEConfig(**VIDEOMAE)
        model = vivit_jax.VideoMAEForVideoClassification(config)
    data, pixels = both(config.num_channels, (config.num_frames, *config.frame_size))
    params = {"params": random_params(model)}
    found, expected = (jax.jit(model.apply)(params, x) for x in (data, pixels))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_same(one, other, 2e-5)


def test_bytes_are_uint8():
    config = vivit_jax.VideoMAEConfig(**VIDEOMAE | dict(use_mean_pooling=False))
    clips = np.zeros((1, config.num_frames, *config.frame_size, 3), np.int32)
    tokens = np.arange(config.num_tokens)[None]
    mask = Mask(tokens[:, :2], tokens[:, 2:])
    with pytest.raises(UserError, match="ByteClips.clips has dtype int32, expected uint8"):
        reconstruction_targets(ByteClips(clips, (1.0,), (0.0,)), mask, config)


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_bytes_have_numbers_for_each_channel(name):
    values = dict(scale=(1.0,), shift=(0.0,)) | {name: (1.0, 2.0)}
    clips = np.zeros((1, *SIZE, 3), np.uint8)
    with pytest.raises(UserError, match=f"ByteClips.{name} has 2 values for clips of 3 channels"):
        tubelets(ByteClips(clips, **values), TUBELET)

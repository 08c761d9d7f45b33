# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth and dropout in training, and temporal attention that starts at zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import mostly_slow, random_params
from tiny import SMALL_VIVIT

import vivit_jax

SIZES = SMALL_VIVIT | dict(num_temporal_layers=2, num_labels=3)
CLIPS = 256


def config_of(**values):
    return vivit_jax.VivitConfig(**{**SIZES, **values})


def jit_apply(model):
    return jax.jit(model.apply, static_argnames=("output_hidden_states", "deterministic"))


@functools.cache
def added_by_block_1(config, deterministic=False):
    """What the second block adds to each of many equal clips, [clips, frames, values].

    The first block is never left out, so that it sees the same tokens for all of them.
    """
    model = vivit_jax.VivitModel(config, add_pooling_layer=False)
    params = random_params(model)
    x = np.random.default_rng(0).standard_normal((1, 4, 16, 16, 3)).astype(np.float32)
    x = np.repeat(x, CLIPS, axis=0)
    out = jit_apply(model)(
        {"params": params},
        x,
        output_hidden_states=True,
        deterministic=deterministic,
        rngs={"dropout": jax.random.key(0)},
    )
    first, second = np.asarray(out.hidden_states[1:3])
    np.testing.assert_array_equal(first, np.broadcast_to(first[:1], first.shape))
    frames = first.shape[1] if first.ndim == 4 else 1
    return (second - first).reshape(CLIPS, frames, -1)


@pytest.mark.parametrize(
    ("rate", "scan_layers"),
    mostly_slow([(0.5, True), (0.5, False), (0.8, True), (0.8, False)], (0.5, True)),
)
def test_branches_are_left_out_for_whole_clips(rate, scan_layers):
    """Each of the two branches independently, with probability rate * layer / (layers - 1)."""
    config = config_of(drop_path_rate=rate, scan_layers=scan_layers)
    added = added_by_block_1(config)[:, 0]
    both = added_by_block_1(config_of(), deterministic=True)[0, 0]
    kinds = np.unique(np.round(added, 4), axis=0)
    assert len(kinds) == 4  # both branches, either one, none
    neither = np.abs(added).max(axis=1) < 1e-6
    whole = np.abs(added - both).max(axis=1) < 1e-5
    for share, probability in ((neither, rate**2), (whole, (1 - rate) ** 2)):
        sigma = (probability * (1 - probability) / CLIPS) ** 0.5
        assert abs(share.mean() - probability) < 4 * sigma


def test_rescaling_divides_by_the_probability_of_being_kept():
    plain = added_by_block_1(config_of(drop_path_rate=0.5))[:, 0]
    rescaled = added_by_block_1(config_of(drop_path_rate=0.5, drop_path_rescale=True))[:, 0]
    # The same key draws the same branches; where only one is kept it counts twice.
    sizes, larger = (np.abs(x).max(axis=1) for x in (plain, rescaled))
    np.testing.assert_array_equal(sizes > 1e-6, larger > 1e-6)
    alone = np.abs(rescaled - 2 * plain).max(axis=1) < 1e-4
    assert alone.sum() > (sizes < 1e-6).sum() + CLIPS / 8


@pytest.mark.parametrize("attention_type", ["factorised_self_attention", "factorised_dot_product"])
def test_it_acts_in_blocks_that_attend_twice(attention_type):
    """scenic ignores its rate in factorised self-attention; here it is what the config says."""
    added = added_by_block_1(config_of(attention_type=attention_type, drop_path_rate=0.5))
    kinds = np.unique(np.round(added[:, 0], 4), axis=0)
    assert len(kinds) == (8 if attention_type == "factorised_self_attention" else 4)


@pytest.mark.parametrize(
    "rates",
    mostly_slow(
        [
            dict(drop_path_rate=0.5),
            dict(hidden_dropout_prob=0.5),
            dict(attention_probs_dropout_prob=0.5),
        ],
        dict(attention_probs_dropout_prob=0.5),
    ),
)
def test_frames_of_a_clip_share_what_is_dropped(rates):
    """As in scenic, which maps the spatial stage over frames with one key: equal frames stay so."""
    config = config_of(attention_type="factorised_encoder", **rates)
    model = vivit_jax.VivitModel(config, add_pooling_layer=False)
    frame = np.random.default_rng(0).standard_normal((8, 1, 16, 16, 3)).astype(np.float32)
    clip = np.repeat(frame, 4, axis=1)

    apply, params = jit_apply(model), random_params(model)

    def states(seed):
        return apply(
            {"params": params},
            clip,
            output_hidden_states=True,
            deterministic=False,
            rngs={"dropout": jax.random.key(seed)},
        ).hidden_states[-1]

    one, other = states(0), states(1)  # [b, t, tokens, d]
    np.testing.assert_allclose(one[:, 0], one[:, 1], atol=1e-5)
    assert np.abs(one - other).max() > 0.1
    assert len(np.unique(np.round(np.abs(one - other).max(axis=(1, 2, 3)), 3))) > 1  # per clip


def test_nothing_is_dropped_in_evaluation():
    config = config_of(drop_path_rate=0.9, hidden_dropout_prob=0.9)
    both = added_by_block_1(config, deterministic=True)
    np.testing.assert_array_equal(both, added_by_block_1(config_of(), deterministic=True))


@pytest.mark.slow
def test_temporal_attention_can_start_at_zero_and_learns():
    config = config_of(
        attention_type="factorised_self_attention", zero_init_temporal_attention=True
    )
    model = vivit_jax.VivitForVideoClassification(config)
    clip = np.random.default_rng(0).standard_normal((2, 4, 16, 16, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), clip)
    params = nn.unbox(variables)["params"]
    layers = params["backbone"]["layers"]
    assert not layers["attention_time"]["out"]["kernel"].any()
    assert layers["attention_space"]["out"]["kernel"].any()

    @jax.jit
    def run(params, labels=None):
        return model.apply({"params": params}, clip, labels=labels)

    # What the temporal attention sees changes nothing, and yet its output learns at once.
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1 if "attention_time" in str(path) and "value" in str(path) else x,
        params,
    )
    np.testing.assert_array_equal(run(params).logits, run(moved).logits)
    grads = jax.grad(lambda p: run(p, jnp.array([0, 2])).loss)(params)
    assert np.abs(grads["backbone"]["layers"]["attention_time"]["out"]["kernel"]).max() > 1e-7


@pytest.mark.parametrize(
    ("family", "scan_layers"),
    mostly_slow([("factorised encoder", True), ("videomae", False)], ("videomae", False)),
)
def test_a_batch_in_parts_drops_what_the_whole_one_does(family, scan_layers):
    """What is dropped is drawn from a key for each clip's number, by every kind of dropout."""
    rates = dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, drop_path_rate=0.5)
    if family == "videomae":
        sizes = {**SIZES, "tubelet_size": 2, "patch_size": 8, "scan_layers": scan_layers}
        del sizes["num_temporal_layers"]
        config = vivit_jax.VideoMAEConfig(**sizes, **rates, head_dropout=0.3)
        model = vivit_jax.VideoMAEForVideoClassification(config)
    else:
        config = config_of(
            attention_type="factorised_encoder", pooling=None, scan_layers=scan_layers, **rates
        )
        model = vivit_jax.VivitForVideoClassification(config)
    params = random_params(model)
    x = np.random.default_rng(0).standard_normal((4, 4, 16, 16, 3)).astype(np.float32)

    @jax.jit
    def logits(x, clip_ids):
        # The generator of numbers that do not depend on the shape they are drawn in.
        rngs = {"dropout": jax.random.key(0, impl="threefry2x32")}
        return model.apply(
            {"params": params}, x, deterministic=False, clip_ids=clip_ids, rngs=rngs
        ).logits

    clip_ids = jnp.arange(4)
    whole = logits(x, clip_ids)
    parts = jnp.concatenate([logits(x[:2], clip_ids[:2]), logits(x[2:], clip_ids[2:])])
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    # Numbered from 0 both times, the second half would drop what the first does.
    assert np.abs(logits(x[2:], clip_ids[:2]) - whole[2:]).max() > 1e-3

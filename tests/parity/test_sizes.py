# SPDX-License-Identifier: Apache-2.0
"""Sizes, depths, labels and activations at the ends of what transformers runs."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, forward, random_params, to_torch, torch_model
from tiny import config_of

import vivit_jax
from vivit_jax import Mask, UserError
from vivit_jax.config_base import HIDDEN_ACTS, PARAMETRIC_ACTS
from vivit_jax.layers import embed
from vivit_jax.layers.linear import ACTIVATIONS
from vivit_jax.models.videomae import VideoMAEForPreTraining


@pytest.fixture
def said(caplog):
    """The warnings of sizes so far; each is said once a process."""
    embed._log_dropped_pixels.cache_clear()
    return lambda: [r for r in caplog.messages if "not a multiple of the tubelet" in r]


def opened(case, directory, **changes):
    reference = torch_model(case, **changes)
    reference.save_pretrained(directory)
    return reference, *vivit_jax.from_pretrained(directory)


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("case", ["vivit cls", "mae cls"])
def test_the_rest_is_left_out_with_one_warning(case, tmp_path, said):
    reference, model, params = opened(case, tmp_path, image_size=(31, 18), num_frames=7)
    assert model.config.grid == (3, 3, 2)
    for frames in (6, 7):  # the same three tubelets
        x = noise(2, frames, 31, 18, 3)
        theirs = reference(to_torch(x)).logits.detach().numpy()
        assert_close(forward(model, params, x).logits, theirs, "logits")
    x[:, 6:], x[:, :, 24:], x[:, :, :, 16:] = 1e3, 1e3, 1e3
    assert_close(forward(model, params, x).logits, theirs, "logits")
    whole, rows = said()
    assert "(7, 31, 18)" in whole and "1 of 7 frames and 7 of 31 rows and 2 of 18 columns" in whole
    assert "(6, 31, 18)" in rows and "7 of 31 rows and 2 of 18 columns" in rows
    with pytest.raises(UserError, match="configured for"):
        forward(model, params, noise(2, 8, 31, 18, 3))
    with pytest.raises(RuntimeError):
        reference(to_torch(noise(2, 8, 31, 18, 3)))


def test_a_larger_clip_of_the_same_tokens(tmp_path):
    """What transformers' own test of interpolation does: 232 for 224, here 17 for 16."""
    reference, model, params = opened("vivit base", tmp_path, image_size=(16, 16))
    x = noise(2, 6, 17, 17, 3)
    theirs = reference(to_torch(x), interpolate_pos_encoding=True).last_hidden_state
    ours = forward(model, params, x, interpolate_pos_encoding=True).last_hidden_state
    assert_close(ours, theirs.detach().numpy(), "last_hidden_state")


def test_pre_training_predicts_whole_tubelets():
    """transformers cannot cut such clips into targets; here they are those of the whole part."""
    config = config_of("mae pretraining", image_size=(25, 19), num_frames=7)
    model = VideoMAEForPreTraining(config)
    params = random_params(model)
    x = noise(2, 7, 25, 19, 3)
    mask = Mask.from_bool(np.arange(config.num_tokens)[None].repeat(2, 0) % 3 > 0)
    out = forward(model, params, x, mask=mask)
    whole = VideoMAEForPreTraining(config_of("mae pretraining", image_size=(24, 16), num_frames=6))
    cut = forward(whole, params, x[:, :6, :24, :16], mask=mask)
    np.testing.assert_array_equal(out.logits, cut.logits)
    np.testing.assert_array_equal(out.loss, cut.loss)


@pytest.mark.parametrize("case", ["vivit base", "mae cls"])
def test_no_blocks(case, tmp_path):
    reference, model, params = opened(case, tmp_path, num_hidden_layers=0)
    x = noise(2, 6, 24, 16, 3)
    field = "logits" if "cls" in case else "pooler_output"
    flags = dict(output_hidden_states=True, output_attentions=True)
    out = forward(model, params, x, **flags)
    assert_close(out[field], reference(to_torch(x))[field].detach().numpy(), field)
    assert out.hidden_states.shape[0] == 1 and out.attentions.shape[:2] == (0, 2)
    vivit_jax.save_pretrained(tmp_path / "again", model, params)
    again = type(reference).from_pretrained(tmp_path / "again")
    assert_close(out[field], again(to_torch(x))[field].detach().numpy(), field)


@pytest.mark.parametrize("case", ["vivit cls", "mae cls"])
def test_no_labels(case, tmp_path):
    reference, model, params = opened(case, tmp_path, num_labels=0)
    x = noise(2, 6, 24, 16, 3)
    logits = forward(model, params, x).logits
    assert logits.shape == (2, 48) and "head" not in params
    assert_close(logits, reference(to_torch(x)).logits.detach().numpy(), "logits")


def test_heads_that_do_not_divide_the_width(tmp_path):
    import transformers

    made = transformers.VivitConfig(
        image_size=8, num_frames=2, tubelet_size=[2, 4, 4], hidden_size=16, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=8, attn_implementation="eager",
    )  # fmt: skip
    reference = transformers.VivitForVideoClassification(made).eval()
    reference.save_pretrained(tmp_path)
    model, params = vivit_jax.from_pretrained(tmp_path)
    assert (model.config.head_dim, model.config.head_width) == (5, 5)
    x = noise(2, 2, 8, 8, 3)
    theirs = reference(to_torch(x)).logits.detach().numpy()
    assert_close(forward(model, params, x).logits, theirs, "logits")


def test_dropout_of_one_leaves_the_residual(tmp_path):
    """As in PyTorch: nothing is divided by 0, values and gradients are those of no blocks."""
    dropped = dict(hidden_dropout_prob=1.0, attention_probs_dropout_prob=1.0)
    reference, model, params = opened("mae cls", tmp_path, **dropped)
    x = noise(2, 6, 24, 16, 3)
    theirs = reference.train()(to_torch(x)).logits.detach().numpy()

    @jax.jit
    def run(params):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, x, deterministic=False, rngs=rngs).logits

    assert_close(run(params), theirs, "logits")
    gradients = jax.grad(lambda params: run(params).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not np.any(gradients["backbone"]["layers"]["mlp_out"]["kernel"])


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({1: "a", 2: "b", 3: "c"}, ("LABEL_0", "a", "b")),
        ({0: "a", 2: "b", 7: "c"}, ("a", "LABEL_1", "b")),
    ],
)
def test_labels_that_skip_indices(names, labels, tmp_path):
    """transformers counts them, whatever their indices are, and keeps them as they are."""
    reference, model, params = opened("mae cls", tmp_path, num_labels=3, id2label=None)
    values = json.loads((tmp_path / "config.json").read_text())
    values["id2label"] = {str(i): name for i, name in names.items()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = type(reference).from_pretrained(tmp_path)
    assert theirs.config.num_labels == 3 and theirs.config.id2label == names
    model, params = vivit_jax.from_pretrained(tmp_path)
    assert model.config.num_labels == 3 and model.config.labels == labels
    hash(model.config)
    vivit_jax.save_pretrained(tmp_path / "again", model, params)
    again = type(reference).from_pretrained(tmp_path / "again").config
    assert (again.num_labels, again.id2label) == (3, names)


def test_the_activations_are_transformers_own():
    from transformers.activations import ACT2FN

    assert set(ACTIVATIONS) == set(HIDDEN_ACTS)
    assert set(ACT2FN) == (set(HIDDEN_ACTS) | set(PARAMETRIC_ACTS)) - {"selu"}


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("name", HIDDEN_ACTS)
def test_activations_and_gradients_are_pytorchs(name):
    """Float64, on the kinks too; PyTorch cuts softplus off at 20, which leaves out 2e-9."""
    import torch
    from transformers.activations import ACT2FN

    kinks = [0.0, -0.0, 3.0, -3.0, 6.0]
    x = np.concatenate([np.linspace(-60, 60, 1001), np.linspace(-8, 8, 1001), kinks])
    inputs = torch.tensor(x, requires_grad=True)
    theirs = (torch.nn.SELU() if name == "selu" else ACT2FN[name])(inputs)
    (gradient,) = torch.autograd.grad(theirs.sum(), inputs)
    with jax.enable_x64(True):
        function = ACTIVATIONS[name]
        ours, pull = jax.vjp(function, jnp.asarray(x))
        (slope,) = pull(jnp.ones_like(ours))
        for mine, wanted in ((ours, theirs.detach().numpy()), (slope, gradient.numpy())):
            assert mine.dtype == np.float64
            error = np.abs(np.asarray(mine) - wanted) / np.maximum(1, np.abs(wanted))
            assert error.max() < (1e-9 if name == "sqrtsoftplus" else 1e-11)
    assert function(jnp.ones((), jnp.bfloat16)).dtype == jnp.bfloat16


def test_sqrtsoftplus_has_a_gradient_where_pytorchs_is_nan():
    slope = jax.grad(ACTIVATIONS["sqrtsoftplus"])(jnp.float32(-120.0))
    np.testing.assert_allclose(slope, np.exp(-60.0) / 2, rtol=1e-5)


def test_each_size_is_said_once(said, caplog):
    caplog.set_level(logging.WARNING)
    config = config_of("mae cls", image_size=(25, 16))
    for _ in range(3):
        assert embed.check_clip(config, (2, 6, 25, 16, 3), any_size=False) == (3, 3, 2)
    assert embed.check_clip(config, (2, 6, 24, 16, 3), any_size=True) == (3, 3, 2)
    assert len(said()) == 1


def test_maps_and_reconstructions_show_the_whole_tubelets():
    """What the model sees of a clip, and nothing drawn over what it does not."""
    from vivit_jax.inference.attention_maps import map_attention
    from vivit_jax.inference.reconstruction import reconstruct

    config = config_of("mae pretraining", image_size=(25, 19), num_frames=7)
    model = VideoMAEForPreTraining(config)
    params = random_params(model)
    x = noise(1, 7, 25, 19, 3)
    found = map_attention(model, params, x)
    assert found.maps.shape == (1, 3, 3, 2) and list(found.frames) == list(range(6))
    mask = Mask.from_bool(np.arange(config.num_tokens)[None] % 3 > 0)
    processor = vivit_jax.VideoProcessor.videomae(size=24, crop_size=(25, 19))
    result = reconstruct(model, params, x, mask, processor)
    assert result.original.shape == result.clips.shape == (1, 6, 24, 16, 3)
    assert np.isfinite(result.squared_errors).all()
    assert np.isnan(result.masked_clips).mean() == mask.masked.shape[1] / config.num_tokens

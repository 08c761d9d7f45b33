# SPDX-License-Identifier: Apache-2.0
"""From pre-training to fine-tuning: what is taken, what is dropped, what starts fresh."""

import logging

import jax
import numpy as np
import pytest
from helpers import clip, mostly_slow, random_params
from safetensors.numpy import load_file
from tiny import VIDEOMAE, config_of
from tiny_authors import DECODER, state, write

import vivit_jax
from checkpoints_convert.pretrained import load_report
from vivit_jax import ConfigError, UserError, init_from_pretraining, param_tree


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-trained directory with large weights, and its tensors."""
    directory = tmp_path_factory.mktemp("pretrained")
    model = vivit_jax.VideoMAEForPreTraining(config_of("mae pretraining"))
    vivit_jax.save_pretrained(directory, model, random_params(model))
    return directory, load_file(directory / "model.safetensors")


def test_the_encoder_goes_over_and_nothing_else(pretrained, caplog):
    directory, tensors = pretrained
    with caplog.at_level(logging.WARNING):
        model, params, report = init_from_pretraining(directory, {"num_labels": 7})
    flat = param_tree.flatten(params)
    assert model.config.use_mean_pooling and model.config.num_labels == 7
    assert not any("ln_final" in path or "decoder" in path for path in flat)
    kernel = tensors["videomae.encoder.layer.2.intermediate.dense.weight"].T
    np.testing.assert_array_equal(flat["backbone/layers/mlp_in/kernel"][2], kernel)
    np.testing.assert_array_equal(flat["fc_norm/scale"], np.ones(48))
    np.testing.assert_array_equal(flat["fc_norm/bias"], np.zeros(48))
    assert set(report.fresh) == {"fc_norm/scale", "fc_norm/bias", "head/kernel", "head/bias"}
    dropped = {name for name in tensors if not name.startswith("videomae.")}
    assert set(report.dropped) == dropped | {"videomae.layernorm.weight", "videomae.layernorm.bias"}
    for text in ("the classifier is multiplied by 0.001", "fc_norm, on the mean of all tokens"):
        assert text in str(report) and text in caplog.text


def test_what_the_authors_compute_otherwise_is_kept_and_named(pretrained):
    """A HuggingFace directory has HuggingFace's epsilons; `config` gives it the authors'."""
    directory, _ = pretrained
    model, _, report = init_from_pretraining(directory, {"num_labels": 7})
    assert (model.config.layer_norm_eps, model.config.fc_norm_eps) == (1e-12, 1e-5)
    assert (
        "kept as the checkpoint has them: layer_norm_eps=1e-12, fc_norm_eps=1e-05; the authors "
        "have layer_norm_eps=1e-06, fc_norm_eps=1e-06"
    ) in str(report)
    authors = {"num_labels": 7, "layer_norm_eps": 1e-6, "fc_norm_eps": 1e-6}
    model, _, report = init_from_pretraining(directory, authors)
    assert model.config.layer_norm_eps == 1e-6 and "kept as" not in str(report)


def test_the_classifier_is_scaled(pretrained):
    directory, _ = pretrained
    heads = {
        scale: init_from_pretraining(directory, {"num_labels": 400}, init_scale=scale).params[
            "head"
        ]
        for scale in (1.0, 0.001)
    }
    kernel = np.asarray(heads[1.0]["kernel"])
    assert abs(kernel.std() / 0.02 - 1) < 0.02  # 19,200 draws: standard error 0.5 %
    np.testing.assert_allclose(heads[0.001]["kernel"], kernel * 0.001, rtol=1e-6)  # measured 0
    assert not np.any(heads[0.001]["bias"])
    other = init_from_pretraining(directory, {"num_labels": 400}, seed=1).params["head"]["kernel"]
    assert not np.allclose(other, heads[0.001]["kernel"], atol=1e-6)


def test_fine_tuning_may_change_what_has_no_weights(pretrained):
    directory, _ = pretrained
    changes = dict(
        class_splits=[3, 2],
        split_names=["noun", "verb"],
        drop_path_rate=0.1,
        head_dropout=0.5,
        num_frames=8,
        image_size=(16, 32),
        dtype="bfloat16",
        scan_layers=False,
    )
    model, params, _ = init_from_pretraining(directory, changes)
    for name, value in changes.items():
        found = getattr(model.config, name)
        assert (list(found) if isinstance(value, list) else found) == value, name
    apply = jax.jit(
        lambda params, x, labels, key: model.apply(
            {"params": params}, x, labels=labels, deterministic=False, rngs={"dropout": key}
        )
    )
    x, labels = clip(model.config), np.array([[2, 0], [1, 1]])
    losses = [float(apply(params, x, labels, jax.random.key(i)).loss) for i in range(2)]
    assert losses[0] != losses[1]  # dropout acts
    # With a classifier near zero every class is as likely as the others.
    np.testing.assert_allclose(losses, (np.log(3) + np.log(2)) / 2, atol=1e-3)  # measured 4.9e-5


def test_head_dropout_acts_on_the_features_alone(pretrained):
    """Of the features that the classifier reads, in training: zero or scaled by 1 / (1 - rate)."""
    directory, _ = pretrained
    model, params, _ = init_from_pretraining(directory, {"num_labels": 48, "head_dropout": 0.5})
    params["head"] = {"kernel": np.eye(48, dtype=np.float32), "bias": np.zeros(48, np.float32)}
    x, key = clip(model.config), jax.random.key(0)
    apply = jax.jit(model.apply, static_argnames="deterministic")
    kept = np.asarray(apply({"params": params}, x).logits)
    trained = apply({"params": params}, x, deterministic=False, rngs={"dropout": key}).logits
    dropped = np.asarray(trained) == 0
    assert 0.3 < dropped.mean() < 0.7 and not (dropped[0] == dropped[1]).all()
    # measured 0
    np.testing.assert_allclose(trained, np.where(dropped, 0, 2 * kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give num_labels, id2label or class_splits"),
        ({"num_labels": 3, "num_label": 3}, "VideoMAEConfig has no num_label; expected some of"),
        ({"num_labels": 3, "use_mean_pooling": False}, "unlike the authors' classifier"),
        ({"num_labels": 3, "hidden_size": 96}, "wrong shape"),
        (None, "must be a mapping of fields, such as .* got NoneType"),
        (config_of("mae cls"), "must be a mapping of fields, .* got VideoMAEConfig"),
    ],
)
def test_bad_settings(pretrained, config, message):
    with pytest.raises(UserError, match=message):
        init_from_pretraining(pretrained[0], config)


def test_models_that_are_not_pretrained(tmp_path, pretrained):
    model, params, _ = init_from_pretraining(pretrained[0], {"num_labels": 3})
    vivit_jax.save_pretrained(tmp_path / "tuned", model, params)
    with pytest.raises(UserError, match="holds VideoMAEForVideoClassification, expected a pre-tr"):
        init_from_pretraining(tmp_path / "tuned", {"num_labels": 5})
    model = vivit_jax.VivitModel(config_of("vivit base"))
    vivit_jax.save_pretrained(tmp_path / "vivit", model, random_params(model))
    with pytest.raises(UserError, match="holds VivitModel, expected a pre-trained VideoMAE"):
        init_from_pretraining(tmp_path / "vivit", {"num_labels": 5})


@pytest.mark.parametrize("channels", mostly_slow([1, 2, 4, 13], 13))
def test_other_channels_from_pretraining_to_classification(tmp_path, channels):
    """The processor's statistics: saved with the model, used by the loss, handed over."""
    processor = vivit_jax.VideoProcessor.videomae(
        size=16,
        crop_size={"height": 24, "width": 16},
        image_mean=list(np.linspace(0.3, 0.6, channels)),
        image_std=list(np.linspace(0.2, 0.4, channels)),
        independent_channels=True,
    )
    config = vivit_jax.VideoMAEConfig(
        **VIDEOMAE | dict(use_mean_pooling=False, norm_pix_loss=False, scan_layers=False),
        num_channels=channels,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    model = vivit_jax.VideoMAEForPreTraining(config)
    frames = np.random.default_rng(0).integers(0, 256, (6, 30, 20, channels), np.uint8)
    pixels = processor(frames)
    mask = vivit_jax.tube_mask(np.random.default_rng(0), 1, config.grid, 0.7)
    params = random_params(model)
    out = jax.jit(model.apply)({"params": params}, pixels, mask)
    # The target is the frames themselves, in [0, 1].
    shown = processor(frames, do_normalize=False)
    patches = shown[0].reshape(3, 2, 3, 8, 2, 8, channels).transpose(0, 2, 4, 1, 3, 5, 6)
    wanted = patches.reshape(18, -1)[np.asarray(mask.masked[0])]
    loss = np.mean((np.asarray(out.logits[0], np.float64) - wanted) ** 2)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)  # measured 2.9e-7

    vivit_jax.save_pretrained(tmp_path / "pre", model, params, processor)
    model, params, _ = init_from_pretraining(tmp_path / "pre", {"num_labels": 3})
    assert model.config.image_mean == config.image_mean and model.config.num_channels == channels
    logits = jax.jit(model.apply)({"params": params}, pixels).logits
    assert logits.shape == (1, 3) and np.isfinite(logits).all()
    other = vivit_jax.VideoProcessor.videomae(image_mean=0.5, image_std=0.5)
    with pytest.raises(ConfigError, match=r"image_mean is \(0.3.* and 0.5 in the processor"):
        vivit_jax.save_pretrained(tmp_path / "other", model, params, other)
    assert not (tmp_path / "other").exists()


def test_what_is_assumed_of_an_authors_file_is_reported(tmp_path, caplog):
    """Nothing in a .pth says how many frames or pixels its model takes, nor how many heads."""
    sizes = dict(width=384, layers=1, decoder=DECODER | dict(width=192, layers=1))
    path = write(tmp_path / "checkpoint.pth", state("pretraining", **sizes))
    assumed = "norm_pix_loss=true, num_frames=16, image_size=224: assumed"
    assert assumed in str(load_report(path))
    with caplog.at_level(logging.WARNING):
        model, _ = vivit_jax.from_pretrained(path)
    assert assumed in caplog.text and model.config.num_attention_heads == 6
    given = {"num_frames": 32, "image_size": 112, "norm_pix_loss": False}
    assert not load_report(path, config=given)
    _, _, report = init_from_pretraining(path, {"num_labels": 3, "num_frames": 32})
    assert "norm_pix_loss=true, image_size=224: assumed" in str(report)
    model, _ = vivit_jax.from_pretrained(path, config=given)
    assert {name: getattr(model.config, name) for name in given} == given

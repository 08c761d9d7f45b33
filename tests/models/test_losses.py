# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vivit_jax import Mask, UserError, VideoMAEConfig
from vivit_jax.models.losses import (
    classification_loss,
    multi_head_loss,
    reconstruction_loss,
    reconstruction_targets,
)

# Each as one program: their operations one by one take several times as long to compile.
classification_loss = jax.jit(classification_loss, static_argnames=("problem_type", "class_splits"))
multi_head_loss = jax.jit(multi_head_loss, static_argnames=("class_splits", "label_smoothing"))
reconstruction_targets = jax.jit(reconstruction_targets, static_argnames="config")
LOGITS = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32) * 3


def torch_loss(logits, labels, problem_type=None):
    import torch
    from transformers.loss.loss_utils import LOSS_MAPPING

    config = type("C", (), {"num_labels": logits.shape[1], "problem_type": problem_type})()
    labels = torch.from_numpy(labels)
    name = "ForSequenceClassification"
    return float(LOSS_MAPPING[name](labels, torch.from_numpy(logits), config))


@pytest.mark.parametrize(
    ("logits", "labels", "problem_type"),
    [
        (LOGITS, np.array([0, 4, 2, 1]), None),
        (LOGITS, np.array([0, -100, 2, -100]), None),
        (LOGITS, (LOGITS > 0).astype(np.float32), None),
        (LOGITS, LOGITS[::-1].copy(), "regression"),
        (LOGITS[:, :1], np.array([0.5, 1.0, -2.0, 3.0], np.float32), None),
        (LOGITS[:, :1], np.array([[0.5], [1.0], [-2.0], [3.0]], np.float32), None),
        (LOGITS[:, :1], np.array([1, 2, 3, 4]), None),
        (LOGITS * 40, np.array([0, 4, 2, 1]), None),
        (LOGITS * 40, (LOGITS > 0).astype(np.float32), None),
    ],
)
def test_loss_is_transformers_loss(logits, labels, problem_type):
    theirs = torch_loss(logits, labels, problem_type)
    ours = classification_loss(jnp.asarray(logits), jnp.asarray(labels), problem_type)
    # Measured 7e-9 absolute where large logits leave a loss of 3e-4.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-8)


def test_every_row_ignored_is_nan_as_in_pytorch():
    labels = np.full(4, -100)
    assert np.isnan(torch_loss(LOGITS, labels))
    assert np.isnan(classification_loss(jnp.asarray(LOGITS), jnp.asarray(labels)))


@pytest.mark.parametrize("label", [5, -1, 100])
def test_class_outside_the_range_is_nan_never_another_class(label):
    loss = classification_loss(jnp.asarray(LOGITS), jnp.array([0, 1, 2, label]))
    assert np.isnan(loss)


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (np.zeros((4, 5), int), None, "do not fit single_label_classification"),
        (np.zeros(4, np.float32), None, "do not fit multi_label_classification"),
        (np.zeros((4, 5), int), "multi_label_classification", "expected floats"),
        (np.zeros(3, int), None, r"labels of shape \(3,\)"),
        (np.zeros(4, np.float32), "regression", r"expected floats of shape \(4, 5\)"),
    ],
)
def test_labels_that_do_not_fit(labels, problem_type, message):
    with pytest.raises(UserError, match=message):
        classification_loss(jnp.asarray(LOGITS), jnp.asarray(labels), problem_type)


def test_bfloat16_logits_are_widened():
    loss = classification_loss(jnp.asarray(LOGITS, jnp.bfloat16), jnp.array([0, 4, 2, 1]))
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "int64"])
def test_labels_of_any_integer_type(dtype):
    # uint8 156 has the bits of -100, and int8 cannot hold the class count.
    logits = np.random.default_rng(3).standard_normal((2, 400)).astype(np.float32)
    labels = np.array([156 if dtype == "uint8" else 100, 3])
    loss = classification_loss(jnp.asarray(logits), jnp.asarray(labels.astype(dtype)))
    np.testing.assert_allclose(loss, torch_loss(logits, labels), rtol=1e-6)


SPLITS = (3, 6, 2)
HEAD_LOGITS = np.random.default_rng(4).standard_normal((4, 11)).astype(np.float32) * 3
HEAD_LABELS = np.array([[0, 5, 1], [2, -100, 0], [-100, -100, 1], [1, 3, -100]])
SOFT = np.concatenate(
    [np.random.default_rng(5).dirichlet(np.ones(n), 4).astype(np.float32) for n in SPLITS], axis=1
)


def torch_heads(logits, labels, splits, label_smoothing=0.0):
    import torch

    losses, start = [], 0
    for i, count in enumerate(splits):
        columns = slice(start, start + count)
        target = labels[:, columns] if labels.dtype == np.float32 else labels[:, i]
        losses.append(
            torch.nn.functional.cross_entropy(
                torch.from_numpy(logits[:, columns].copy()),
                torch.from_numpy(target.copy()),
                label_smoothing=label_smoothing,
            )
        )
        start += count
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("labels", [HEAD_LABELS, SOFT], ids=["integers", "soft"])
def test_multi_head_loss_is_the_mean_of_pytorchs(labels, smoothing):
    theirs = torch_heads(HEAD_LOGITS, labels, SPLITS, smoothing)
    ours = multi_head_loss(HEAD_LOGITS, labels, SPLITS, smoothing)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # measured 8.0e-8
    if not smoothing:
        dispatched = classification_loss(HEAD_LOGITS, labels, class_splits=SPLITS)
        np.testing.assert_allclose(dispatched, theirs, rtol=1e-6)


def test_multi_head_loss_of_nouns_and_verbs():
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((3, 397)).astype(np.float32)
    labels = np.stack([rng.integers(300, size=3), rng.integers(97, size=3)], axis=1)
    one_hot = np.concatenate([np.eye(300)[labels[:, 0]], np.eye(97)[labels[:, 1]]], axis=1)
    expected = 0.0
    for row, (noun, verb) in zip(logits.astype(np.float64), labels, strict=True):
        for part, label in ((row[:300], noun), (row[300:], verb)):
            target = np.full(len(part), 0.2 / len(part))
            target[label] += 0.8
            expected -= target @ (part - np.log(np.exp(part).sum())) / 2 / 3
    for form in (labels, one_hot.astype(np.float32), one_hot.astype(jnp.bfloat16)):
        ours = multi_head_loss(logits, form, (300, 97), 0.2)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_one_head_is_plain_cross_entropy():
    labels = np.array([0, 4, -100, 1])
    ours = multi_head_loss(LOGITS, labels[:, None], (5,))
    assert ours == classification_loss(LOGITS, labels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("labels", [HEAD_LABELS, SOFT], ids=["integers", "soft"])
def test_multi_head_gradient_is_finite(dtype, labels):
    logits = jnp.asarray(HEAD_LOGITS * 40, dtype)
    loss, gradient = jax.value_and_grad(multi_head_loss)(logits, labels, SPLITS, 0.1)
    assert loss.dtype == jnp.float32 and gradient.dtype == dtype
    assert np.isfinite(loss) and np.isfinite(np.asarray(gradient, np.float32)).all()
    assert np.abs(np.asarray(gradient, np.float32)).max() > 1e-3


@pytest.mark.parametrize("labels", [[3, 0, 0], [0, -1, 0], [0, 0, 2]])
def test_class_outside_its_head_is_nan(labels):
    assert np.isnan(multi_head_loss(HEAD_LOGITS[:1], np.array([labels]), SPLITS, 0.1))
    assert np.isfinite(multi_head_loss(HEAD_LOGITS[:1], np.array([[2, 5, 1]]), SPLITS, 0.1))


def test_head_with_every_row_ignored_is_nan_as_in_pytorch():
    labels = np.where(np.arange(3) == 1, -100, HEAD_LABELS)
    assert np.isnan(torch_heads(HEAD_LOGITS, labels, SPLITS))
    assert np.isnan(multi_head_loss(HEAD_LOGITS, labels, SPLITS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(class_splits=(3, 6)), r"logits of shape \(4, 11\) do not fit class_splits \(3, 6\)"),
        (dict(class_splits=()), r"class_splits must be .* got \(\); for example \(300, 97\)"),
        (dict(class_splits=(11, 0)), r"positive class count per head, got \(11, 0\)"),
        (dict(class_splits=11), "class_splits must be a tuple .* got 11"),
        (dict(logits=HEAD_LOGITS[0]), r"logits of shape \(11,\) .* expected \[batch, 11\]"),
        (dict(labels=HEAD_LABELS[:, :2]), r"expected integers of shape \(4, 3\)"),
        (dict(labels=HEAD_LABELS[:2]), r"labels of shape \(2, 3\)"),
        (dict(labels=SOFT[:, :10]), r"floats of shape \(4, 11\), concatenated one-hots"),
        (dict(labels=SOFT.astype(int)), "and dtype int"),
        (dict(labels=HEAD_LABELS.astype(np.float32)), "and dtype float32 do not fit"),
        (dict(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (dict(label_smoothing=-0.1), "got -0.1"),
    ],
)
def test_multi_head_inputs_that_do_not_fit(changes, message):
    inputs = dict(logits=HEAD_LOGITS, labels=HEAD_LABELS, class_splits=SPLITS)
    with pytest.raises(UserError, match=message):
        multi_head_loss(**inputs | changes)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_heads_are_single_label(problem_type):
    with pytest.raises(UserError, match=f"problem_type '{problem_type}' does not go with class_sp"):
        classification_loss(HEAD_LOGITS, HEAD_LABELS, problem_type, class_splits=SPLITS)
    single = "single_label_classification"
    assert np.isfinite(classification_loss(HEAD_LOGITS, HEAD_LABELS, single, class_splits=SPLITS))


def _numpy_targets(x, config):
    """From the paper's description, token by token in float64."""
    (pt, ph, pw), (gt, gh, gw) = config.tubelet, config.grid
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    if config.image_mean is not None:
        mean, std = np.array(config.image_mean), np.array(config.image_std)
    x = x.astype(np.float64)
    if config.num_channels == 3 or config.image_mean is not None:
        x = x * std + mean
    rows = []
    for t in range(gt):
        for h in range(gh):
            for w in range(gw):
                block = x[t * pt : (t + 1) * pt, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw]
                block = block.reshape(-1, config.num_channels)
                if config.norm_pix_loss:
                    spread = np.sqrt(block.var(axis=0, ddof=1)) + 1e-6
                    block = (block - block.mean(axis=0)) / spread
                rows.append(block.reshape(-1))
    return np.stack(rows)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize(("norm", "given"), [(True, False), (True, True), (False, True)])
def test_reconstruction_targets(channels, norm, given):
    statistics = {}
    if given:
        mean, std = np.linspace(0.1, 0.6, channels), np.linspace(0.4, 0.2, channels)
        statistics = dict(image_mean=tuple(mean), image_std=tuple(std))
    config = VideoMAEConfig(
        image_size=(16, 24),
        patch_size=8,
        num_frames=4,
        num_channels=channels,
        norm_pix_loss=norm,
        **statistics,
    )
    x = np.random.default_rng(1).standard_normal((2, 4, 16, 24, channels)).astype(np.float32)
    hidden = np.random.default_rng(2).permuted(np.tile(np.arange(12) < 9, (2, 1)), axis=1)
    ours = reconstruction_targets(x, Mask.from_bool(hidden), config)
    for b in range(2):
        np.testing.assert_allclose(ours[b], _numpy_targets(x[b], config)[hidden[b]], atol=5e-6)


def test_raw_targets_of_rgb_are_un_normalised_with_imagenets():
    config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=2, norm_pix_loss=False)
    x = np.random.default_rng(1).standard_normal((1, 2, 16, 16, 3)).astype(np.float32)
    mask = Mask.from_bool(np.array([[True, True, False, True]]))
    ours = reconstruction_targets(x, mask, config)[0]
    np.testing.assert_allclose(ours, _numpy_targets(x[0], config)[[0, 1, 3]], atol=5e-6)


def test_the_loss_counts_only_what_the_encoder_did_not_see():
    rng = np.random.default_rng(0)
    logits, targets = (rng.standard_normal((2, 6, 8)).astype(np.float32) for _ in range(2))
    counted = np.array([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]], bool)
    errors = ((logits - targets) ** 2)[counted]  # of both clips together, as the authors sum
    loss = reconstruction_loss(logits, targets, jnp.asarray(counted))
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        reconstruction_loss(logits, targets), ((logits - targets) ** 2).mean(), rtol=1e-6
    )


def test_raw_targets_need_rgb_or_statistics():
    config = VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=2, num_channels=4, norm_pix_loss=False
    )
    mask = Mask.from_bool(np.array([[True, True, False, False]]))
    with pytest.raises(UserError, match="num_channels=4"):
        reconstruction_targets(np.zeros((1, 2, 16, 16, 4), np.float32), mask, config)

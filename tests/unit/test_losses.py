# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vivit_jax import Mask, UserError, VideoMAEConfig
from vivit_jax.train.losses import classification_loss, reconstruction_targets

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
    loss = jax.jit(classification_loss)(jnp.asarray(LOGITS), jnp.array([0, 1, 2, label]))
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


def _numpy_targets(x, config):
    """From the paper's description, token by token in float64."""
    (pt, ph, pw), (gt, gh, gw) = config.tubelet, config.grid
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    if config.num_channels == 3:
        x = x.astype(np.float64) * std + mean
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


@pytest.mark.parametrize(("channels", "norm"), [(3, True), (3, False), (1, True), (4, True)])
def test_reconstruction_targets(channels, norm):
    config = VideoMAEConfig(
        image_size=(16, 24), patch_size=8, num_frames=4, num_channels=channels, norm_pix_loss=norm
    )
    x = np.random.default_rng(1).standard_normal((2, 4, 16, 24, channels)).astype(np.float32)
    hidden = np.random.default_rng(2).permuted(np.tile(np.arange(12) < 9, (2, 1)), axis=1)
    ours = reconstruction_targets(x, Mask.from_bool(hidden), config)
    for b in range(2):
        np.testing.assert_allclose(ours[b], _numpy_targets(x[b], config)[hidden[b]], atol=5e-6)


def test_raw_targets_need_rgb():
    config = VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=2, num_channels=4, norm_pix_loss=False
    )
    mask = Mask.from_bool(np.array([[True, True, False, False]]))
    with pytest.raises(UserError, match="num_channels=4"):
        reconstruction_targets(np.zeros((1, 2, 16, 16, 4), np.float32), mask, config)

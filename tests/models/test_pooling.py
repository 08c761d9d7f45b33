# SPDX-License-Identifier: Apache-2.0
"""What the classifier of VideoMAE reads, with epsilons as large as the variances they join."""

import numpy as np
import pytest
from helpers import clip, forward, random_params
from tiny import SMALL_VIDEOMAE

from vivit_jax import VideoMAEConfig, VideoMAEForVideoClassification


def norm(x, params, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * params["scale"] + params["bias"]


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "first token"])
def test_what_the_classifier_reads(mean):
    values = SMALL_VIDEOMAE | dict(layer_norm_eps=0.1, fc_norm_eps=0.5, num_labels=5)
    config = VideoMAEConfig(**values, use_mean_pooling=mean)
    model = VideoMAEForVideoClassification(config)
    params = random_params(model)
    out = forward(model, params, clip(config), output_hidden_states=True)
    tokens = np.asarray(out.hidden_states[-1], np.float64)
    if mean:
        x = norm(tokens.mean(1), params["fc_norm"], config.fc_norm_eps)
    else:
        x = norm(tokens[:, 0], params["backbone"]["ln_final"], config.layer_norm_eps)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-4)

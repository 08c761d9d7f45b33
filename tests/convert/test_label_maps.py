# SPDX-License-Identifier: Apache-2.0
"""Classes gathered out of a larger classifier."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import clip, random_params
from tiny import VIDEOMAE

from vivit_jax import (
    UserError,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    gather_classes,
    param_tree,
    read_label_map,
)

CONFIG = VideoMAEConfig(**VIDEOMAE | dict(num_labels=5, id2label=tuple("abcde")))
MAP = [3, 0, 4]


@pytest.fixture(scope="module")
def params():
    return random_params(VideoMAEForVideoClassification(CONFIG))


def test_logits_are_those_of_the_classes(params):
    config, fewer = gather_classes(CONFIG, params, MAP)
    assert (config.num_labels, config.id2label) == (3, ("d", "a", "e"))
    run = jax.jit(
        lambda config, params, x: (
            VideoMAEForVideoClassification(config).apply({"params": params}, x).logits
        ),
        static_argnums=0,
    )
    x = clip(CONFIG)
    np.testing.assert_array_equal(run(config, fewer, x), run(CONFIG, params, x)[:, MAP])
    # What model.init returns carries the names of axes; jax's arrays list classes too.
    boxed = jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, (None,) * leaf.ndim), params)
    _, unboxed = gather_classes(CONFIG, boxed, jnp.array(MAP))
    np.testing.assert_array_equal(unboxed["head"]["kernel"], fewer["head"]["kernel"])
    # A flat tree stays flat, and nothing but the classifier changes.
    flat = param_tree.flatten(params)
    _, gathered = gather_classes(CONFIG, flat, np.array(MAP))
    assert gathered.keys() == flat.keys()
    assert {k for k in flat if gathered[k] is not flat[k]} == {"head/kernel", "head/bias"}


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ([0, 5], r"lists class 5, the classifier has 5 \(0 to 4\)"),
        ([], "must be a list of class indices"),
        ([1, -1], r"must be a list of class indices, .* got \[1, -1\]"),
        ([True], "must be a list of class indices"),
        ({"0": 1}, "must be a list of class indices"),
        ("012", "must be a list of class indices"),
    ],
)
def test_maps_that_do_not_fit(params, label_map, message):
    with pytest.raises(UserError, match=message):
        gather_classes(CONFIG, params, label_map)


def test_models_that_do_not_fit(params):
    with pytest.raises(UserError, match="need a classifier of num_labels=5 .* got none"):
        gather_classes(CONFIG, params["backbone"], MAP)
    several = VideoMAEConfig(**VIDEOMAE | dict(num_labels=5, class_splits=(3, 2)))
    with pytest.raises(UserError, match=r"class_splits is \(3, 2\)"):
        gather_classes(several, params, MAP)


def test_label_map_files(tmp_path):
    path = tmp_path / "label_710to3.json"
    path.write_text(json.dumps(MAP))
    assert read_label_map(path) == tuple(MAP)
    path.write_text("[3, 0,")
    with pytest.raises(UserError, match="label_710to3.json is not valid JSON: .*a label map"):
        read_label_map(path)
    path.write_text('{"0": 3}')
    with pytest.raises(UserError, match="label_710to3.json must be a list of class indices"):
        read_label_map(path)

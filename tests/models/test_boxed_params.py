# SPDX-License-Identifier: Apache-2.0
"""Parameters in flax's boxes, as `model.init` returns them, are taken wherever plain ones are."""

import jax
import numpy as np
import pytest
from clips import write_clip
from flax.core import meta
from tiny import VIDEOMAE

import vivit_jax
from vivit_jax.inference.export import export_model


@pytest.fixture(scope="module")
def tiny():
    """(model, boxed params, processor)."""
    config = vivit_jax.VideoMAEConfig(**VIDEOMAE)
    model = vivit_jax.VideoMAEForVideoClassification(config)
    pixels = np.zeros((1, config.num_frames, *config.frame_size, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    assert any(isinstance(x, meta.AxisMetadata) for x in jax.tree.leaves(params, is_leaf=_boxed))
    processor = vivit_jax.VideoProcessor.videomae(size=24, crop_size=config.frame_size)
    return model, params, processor


def _boxed(leaf):
    return isinstance(leaf, meta.AxisMetadata)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("videos") / "a.mp4", frames=12, size=(64, 64))


def test_export(tiny):
    model, params, _ = tiny
    boxed, plain = (
        export_model(model, p, platforms=["cpu"]).about["params"]
        for p in (params, meta.unbox(params))
    )
    assert boxed == plain


@pytest.mark.parametrize("layer", [1, "last"])
def test_features(tiny, video, layer):
    model, params, processor = tiny
    boxed, plain = (
        [
            row.features
            for row in vivit_jax.extract_features(
                model, p, processor, video, layer=layer, frame_stride=1
            )
        ]
        for p in (params, meta.unbox(params))
    )
    np.testing.assert_array_equal(boxed, plain)


def test_classifier(tiny, video):
    model, params, processor = tiny
    boxed, plain = (
        vivit_jax.VideoClassifier(model, p, processor)(video, stride=1)
        for p in (params, meta.unbox(params))
    )
    assert boxed == plain

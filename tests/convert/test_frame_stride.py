# SPDX-License-Identifier: Apache-2.0
"""How a model was trained to read clips: written beside its weights, and read back by every use."""

import json

import numpy as np
import pytest
from commands import run_command
from helpers import forward, random_params
from tiny import SMALL_VIDEOMAE, SMALL_VIVIT

import vivit_jax
from checkpoints_convert.convert import convert_checkpoint
from vivit_jax.config_base import READING
from vivit_jax.data.read_clip import read_clip, read_clips
from vivit_jax.data.sampling import view_indices
from vivit_jax.data.sliding_window import plan_windows
from vivit_jax.train.start.preprocessing import central_view

CONFIGS = {
    "vivit": lambda **fields: vivit_jax.VivitConfig(**SMALL_VIVIT, num_labels=3, **fields),
    "videomae": lambda **fields: vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, num_labels=3, **fields),
}
USUAL = {"vivit": (2, "loop"), "videomae": (4, "linspace")}
MODELS = {
    "vivit": vivit_jax.VivitForVideoClassification,
    "videomae": vivit_jax.VideoMAEForVideoClassification,
}
PROCESSOR = vivit_jax.VideoProcessor.named(
    "videomae-imagenet", size=16, crop_size={"height": 16, "width": 16}
)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_familys_own_way_is_not_written(family):
    stride, sampler = USUAL[family]
    usual = CONFIGS[family]()
    assert (usual.frame_stride, usual.view_sampler) == (stride, sampler)
    assert not usual.has_own_stride and not usual.to_dict().keys() & {*READING}
    assert CONFIGS[family](frame_stride=stride, view_sampler=sampler).to_dict() == usual.to_dict()
    own = CONFIGS[family](frame_stride=1, view_sampler="segments")
    written = json.loads(json.dumps(own.to_dict()))
    assert written == usual.to_dict() | {"frame_stride": 1, "view_sampler": "segments"}
    again = type(own).from_dict(written, warn=False)
    assert again == own and again.has_own_stride
    assert type(own).from_dict(written | {"frame_stride": None}).frame_stride == stride


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("frame_stride", 0, "frame_stride must be a positive integer, got 0"),
        ("frame_stride", -3, "frame_stride must be a positive integer, got -3"),
        ("frame_stride", 2.0, "frame_stride must be a positive integer, got 2.0"),
        ("frame_stride", True, "frame_stride must be a positive integer, got True"),
        ("frame_stride", "4", "frame_stride must be a positive integer, got '4'"),
        ("view_sampler", "dense", "view_sampler must be one of ['hold', 'linspace', 'loop', "),
        ("view_sampler", ["loop"], "view_sampler must be one of ['hold', 'linspace', 'loop', "),
    ],
)
def test_what_a_stride_and_a_sampler_may_be(family, name, value, wanted):
    with pytest.raises(vivit_jax.ConfigError) as caught:
        CONFIGS[family](**{name: value})
    assert wanted in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved VideoMAE that was trained with frames 3 apart, by ViViT's sampler."""
    path = tmp_path_factory.mktemp("trained") / "model"
    net = MODELS["videomae"](CONFIGS["videomae"](frame_stride=3, view_sampler="loop"))
    vivit_jax.save_pretrained(path, net, random_params(net), PROCESSOR)
    return path


def test_transformers_opens_it_with_the_same_logits(model):
    import torch
    import transformers

    net, params = vivit_jax.from_pretrained(model)
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(model)
    assert theirs.config.frame_stride == 3 and theirs.config.view_sampler == "loop"
    pixels = np.random.default_rng(0).normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(np.moveaxis(pixels, -1, 2).copy())).logits.numpy()
    # Measured: 1.8e-7 of logits up to 0.66.
    np.testing.assert_allclose(forward(net, params, pixels).logits, logits, atol=2e-6)


def test_conversions_keep_it(model, tmp_path):
    convert_checkpoint(model, tmp_path / "half", dtype="float16")
    eps = dict(layer_norm_eps=1e-6, fc_norm_eps=1e-6, num_attention_heads=2)
    convert_checkpoint(tmp_path / "half", tmp_path / "authors", to_layout="videomae", settings=eps)
    convert_checkpoint(tmp_path / "authors", tmp_path / "back")
    for name in ("half", "authors", "back"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["frame_stride"], config["view_sampler"]) == (3, "loop"), name
    assert "4 frames, every 3rd, from the middle" in (tmp_path / "back/README.md").read_text()


def test_a_clip_has_the_models_frames(model):
    net, _ = vivit_jax.from_pretrained(model)
    frames = np.zeros((40, 20, 20, 3), np.uint8)
    assert read_clip(frames, net.config).indices.tolist() == [15, 18, 21, 24]
    assert read_clip(frames, net.config, stride=1).indices.tolist() == [18, 19, 20, 21]
    assert read_clip(frames[:8], net.config).indices.tolist() == [0, 2, 4, 6]  # 3 do not fit
    several = np.stack([clip.indices for clip in read_clips(frames, net.config, clips=2)])
    np.testing.assert_array_equal(several, view_indices("loop", 40, 4, 3, 2))
    windows = plan_windows(net.config, None, None, "drop")
    assert (windows.frame_stride, windows.stride) == (3, 12)
    views = central_view(net.config, PROCESSOR)
    assert (views.sampler, views.stride) == ("loop", 3)
    classifier = vivit_jax.VideoClassifier.from_pretrained(model)
    assert "16 x 16 pixels, stride 3; float32" in repr(classifier)


def test_a_clip_of_a_model_of_segments_is_of_the_whole_video():
    config = CONFIGS["videomae"](view_sampler="segments")
    frames = np.zeros((40, 20, 20, 3), np.uint8)
    assert read_clip(frames, config).indices.tolist() == [5, 15, 25, 35]
    several = np.stack([clip.indices for clip in read_clips(frames, config, clips=2)])
    np.testing.assert_array_equal(several, view_indices("segments", 40, 4, 1, 2))
    # What is asked for comes first, and a clip that is too short is an error as elsewhere.
    assert read_clip(frames, config, stride=2).indices.tolist() == [16, 18, 20, 22]
    assert read_clip(frames, config, start="begin").indices.tolist() == [0, 4, 8, 12]
    several = np.stack([clip.indices for clip in read_clips(frames, config, clips=2, stride=2)])
    np.testing.assert_array_equal(several, view_indices("linspace", 40, 4, 2, 2))
    with pytest.raises(vivit_jax.VideoError, match="there are 3 frames"):
        read_clip(frames[:3], config)
    net = MODELS["videomae"](config)
    classifier = vivit_jax.VideoClassifier(net, random_params(net), PROCESSOR)
    assert "16 x 16 pixels, one of each segment; float32" in repr(classifier)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("frame_stride", 0, "config.json: frame_stride must be a positive integer, got 0"),
        ("view_sampler", "all", "config.json: view_sampler must be one of ["),
    ],
)
def test_a_config_with_a_wrong_one_is_refused_in_a_line(
    field, value, wanted, model, tmp_path, capsys
):
    values = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {field: value}))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((model / "model.safetensors").read_bytes())
    np.save(tmp_path / "clip.npy", np.zeros((9, 16, 16, 3), np.uint8))
    status, out, error = run_command(capsys, "predict", tmp_path / "clip.npy", "--model", tmp_path)
    assert status == 2 and out == "" and wanted in error and error.count("\n") == 1

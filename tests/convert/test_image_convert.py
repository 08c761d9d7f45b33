# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert convert` of image models, and the pixels that the result is given."""

import json

import jax
import numpy as np
import pytest

import vivit_jax
from checkpoints_convert.start.from_image import init_from_image_model

FE, FSA = "factorised_encoder", "factorised_self_attention"
SETTINGS = ("--config", f"attention_type={FE}", "num_temporal_layers=2", "num_frames=6")


def test_convert_writes_what_init_from_image_model_gives(run, images, tmp_path):
    status, out, _ = run("convert", images.path("hf"), tmp_path / "out", *SETTINGS)
    assert status == 0
    model, params = vivit_jax.from_pretrained(tmp_path / "out")
    config = dict(attention_type=FE, num_temporal_layers=2, num_frames=6)
    wanted = init_from_image_model(images.path("hf"), config, head="none")
    assert model == wanted.model
    assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted.params))
    for part in (
        f"freshly initialised, not in the checkpoint ({len(wanted.report.fresh)}): temporal/",
        "in the checkpoint, not in this model (2): classifier.bias, classifier.weight",
        "56 tensors read, 2 of them left out",
        "patch kernel inflated to 2 frames: central_frame",
        "wrote model.safetensors, preprocessor_config.json, README.md, config.json to",
    ):
        assert part in out, out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_convert_with_options_and_a_classifier(run, images, tmp_path):
    settings = ("--config", f"attention_type={FSA}", "num_labels=4", "num_frames=6")
    how = ("--inflation", "average", "--positions", "tile", "--temporal-attention", "zero")
    status, out, _ = run("convert", images.path("hf"), tmp_path / "out", *settings, *how)
    assert status == 0 and "temporal attention: zero" in out
    listed = next(line for line in out.splitlines() if "freshly initialised" in line)
    assert "backbone/layers_{0-2}/ln_attention_time/scale" in listed
    assert "head/kernel" in listed and "head/bias" in listed
    config = dict(attention_type=FSA, num_labels=4, num_frames=6)
    model, params, _ = init_from_image_model(
        images.path("hf"), config, inflation="average", temporal_attention="zero"
    )
    loaded, found = vivit_jax.from_pretrained(tmp_path / "out")
    assert loaded == model
    assert jax.tree.all(jax.tree.map(np.array_equal, params, found))


def test_convert_of_a_jax_checkpoint_to_scenic(run, images, tmp_path):
    settings = ("--to", "scenic", "--config", "num_frames=4")
    assert run("convert", images.path("npz"), tmp_path / "out", *settings)[0] == 0
    _, params, _ = init_from_image_model(images.path("npz"), dict(num_frames=4), head="none")
    _, found = vivit_jax.from_pretrained(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, found))


@pytest.mark.parametrize(
    ("option", "value"),
    [("inflation", "average"), ("positions", "tile"), ("temporal-attention", "zero")],
)
def test_image_options_are_refused_for_a_video_model(run, checkpoints, tmp_path, option, value):
    source = checkpoints.path("vivit cls")
    status, _, err = run("convert", source, tmp_path / "out", f"--{option}", value)
    assert status == 2 and f"is not an image model: {option.replace('-', '_')}" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--config", "hidden_size=64"), "hidden_size is 64, the image model's is 48"),
        (("--config", "num_frames=1"), "num_frames 1 is less than one tubelet length of 2"),
        (("--config", "image_size=32", "--positions", "tile"), "positions='tile' needs"),
        (("--dtype", "float64"), "which jax truncates to float32"),
    ],
)
def test_an_error_leaves_no_directory(run, images, tmp_path, arguments, expected):
    status, _, err = run("convert", images.path("hf"), tmp_path / "out", *arguments)
    assert status == 2 and expected in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


FRAMES = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "values",
    [
        None,
        dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        dict(do_normalize=False),
        dict(do_rescale=False, image_mean=[127.0] * 3, image_std=[64.0] * 3),
        dict(rescale_factor=1 / 127.5),
    ],
    ids=["no file", "imagenet", "not normalised", "not rescaled", "other factor"],
)
def test_processor_gives_the_image_models_pixels(run, images, tmp_path, values):
    from transformers import ViTImageProcessorPil

    size = {"height": 24, "width": 24}
    theirs = ViTImageProcessorPil(size=size, **(values or {}))
    source = images.copy(tmp_path, "hf")
    if values is not None:
        theirs.save_pretrained(source)
    settings = ("--config", "num_frames=2")
    assert run("convert", source, tmp_path / "out", *settings)[0] == 0
    ours = vivit_jax.VideoProcessor.from_pretrained(tmp_path / "out")
    assert (ours.size, ours.crop_size) == ({"shortest_edge": 24 + 32}, size)
    if values is None:
        got = ours(FRAMES, do_resize=False)
        assert got.min() == -1 and got.max() == 1
    # At the same size: frames as they are, and frames that both resize.
    large = np.random.default_rng(1).integers(0, 256, (2, 40, 31, 3), dtype=np.uint8)
    for frames in (FRAMES, large):
        wanted = theirs(list(frames), return_tensors="np").pixel_values.transpose(0, 2, 3, 1)
        got = ours(frames, size=(24, 24))[0]
        if values is None:
            # [-1, 1] by another arithmetic: 1/127.5 and minus 1, not 1/255 and 0.5.
            assert np.abs(got - wanted).max() < 2e-7
        else:
            assert np.array_equal(got, wanted)


def test_keys_of_an_old_or_empty_processor_file(run, images, tmp_path):
    source = images.copy(tmp_path, "hf")
    values = dict(feature_extractor_type="ViTFeatureExtractor", size=24, image_mean=None)
    (source / "preprocessor_config.json").write_text(json.dumps(values | {"rescale_factor": None}))
    assert run("convert", source, tmp_path / "out", "--config", "num_frames=2")[0] == 0
    pixels = vivit_jax.VideoProcessor.from_pretrained(tmp_path / "out")(FRAMES, do_resize=False)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    (source / "preprocessor_config.json").write_text("[1]")
    status, _, err = run("convert", source, tmp_path / "bad", "--config", "num_frames=2")
    assert status == 2 and "preprocessor_config.json is not valid JSON of a processor" in err
    assert not (tmp_path / "bad").exists()

# SPDX-License-Identifier: Apache-2.0
"""Processor files in the wild: whatever transformers opens gives the same bits here."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from vivit_jax.data.transforms.frame_ops import resized_to
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import ConfigError, UserError

SMALL = {"size": 20, "crop_size": 18}
# Keys without effect in either class, and the warning about them.
WITHOUT_EFFECT = {
    "num_frames": 16,
    "do_sample_frames": True,
    "do_pad": True,
    "pad_size": {"height": 9, "width": 9},
    "fps": 4,
    "my_own": None,
    "do_flip_channel_order": True,
}
FILES = [
    {},
    WITHOUT_EFFECT,
    {name: None for name in ("do_pad", "device", "return_tensors", "input_data_format", "fps")},
    {"size": [20, 30], "crop_size": [17, 25]},
    {"size": {"height": 21, "width": 19}, "crop_size": 12},
    {"size": {"shortest_edge": 20, "longest_edge": None}},
    {"size": {"shortest_edge": 20, "longest_edge": 24}},
    {"size": {"shortest_edge": 20, "longest_edge": 90}},
    {"size": {"longest_edge": 20}, "do_resize": False},
    {"size": {"min_pixels": 20, "max_pixels": 90}, "do_resize": None},
    {"crop_size": {"shortest_edge": 9}, "do_center_crop": False},
    {"crop_size": {"height": 9, "width": None}, "do_center_crop": None},
    {"resample": 2.0, "do_resize": False},
    {"resample": 99, "do_resize": False, "do_normalize": False, "image_std": [0, 0, 0]},
    {"do_resize": None},
    {"do_resize": 0, "do_center_crop": 1},
    {"do_center_crop": None},
    {"do_normalize": None},
    {"do_rescale": None, "offset": False},
    {"offset": None},
    {"offset": True},
    {"default_to_square": False},
    {"default_to_square": True},
    {"default_to_square": True, "size": {"shortest_edge": 19}},
    {"data_format": "channels_last"},
    {"rescale_factor": 1},
    {"image_mean": 0.4, "image_std": [0.1, 0.2, 0.3]},
    {"do_convert_rgb": True},
    {"resample": 3},
]
VIDEOMAE_FILES = [
    {"size": {"max_height": 20, "max_width": 31}},
    {"size": {"max_height": 40, "max_width": 13}},
    {"resample": "bicubic"},
    {"resample": "BILINEAR"},
    {"resample": 3.0},
]


def reader(family):
    import transformers

    if family == "vivit":
        return transformers.VivitImageProcessor
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    return VideoMAEImageProcessorPil


def write(directory, family, values, **named):
    name = {"vivit": "VivitImageProcessor", "videomae": "VideoMAEImageProcessor"}[family]
    values = {"image_processor_type": name, **SMALL, **values, **named}
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    return directory


def theirs(processor, videos, **options):
    found = processor(videos, return_tensors="np", **options)["pixel_values"]
    return np.moveaxis(np.stack(found), 2, -1).astype(np.float32)


def same_bits(got, expected):
    assert got.dtype == expected.dtype == np.float32
    return got.shape == expected.shape and got.tobytes() == np.ascontiguousarray(expected).tobytes()


def frames(*shape, dtype=np.uint8):
    return list(np.random.RandomState(0).randint(0, 256, (2, *shape)).astype(dtype))


def cases():
    for family in ("vivit", "videomae"):
        for values in FILES + (VIDEOMAE_FILES if family == "videomae" else []):
            yield pytest.param(family, values, id=f"{family} {json.dumps(values)[:60]}")


@pytest.mark.parametrize("family,values", list(cases()))
def test_what_transformers_opens_gives_its_bits(tmp_path, family, values):
    processor = VideoProcessor.from_pretrained(write(tmp_path, family, values))
    reference = reader(family).from_pretrained(tmp_path)
    for shape in ((23, 37, 3), (37, 23, 3), (21, 21, 3)):
        expected = theirs(reference, frames(*shape))
        assert same_bits(processor(frames(*shape)), expected), shape
    # What we write gives the same processor here and in transformers, and keeps foreign keys.
    (tmp_path / "again").mkdir()
    written = json.loads(processor.save_pretrained(tmp_path / "again").read_text())
    again = VideoProcessor.from_pretrained(tmp_path / "again")
    assert again == processor and again.extra == processor.extra
    assert same_bits(
        theirs(reader(family).from_pretrained(tmp_path / "again"), frames(*shape)), expected
    )
    for key in WITHOUT_EFFECT.keys() & values.keys():
        assert written[key] == values[key]


@pytest.mark.parametrize("family", ["vivit", "videomae"])
def test_keys_without_effect_are_named_once(tmp_path, family, caplog):
    write(tmp_path, family, WITHOUT_EFFECT | {"processor_class": "X", "device": None})
    for _ in range(2):
        processor = VideoProcessor.from_pretrained(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "preprocessor_config.json") in record.getMessage()
    assert f": {', '.join(sorted(WITHOUT_EFFECT))}: no effect" in record.getMessage()
    assert {"processor_class", "device", *WITHOUT_EFFECT} <= processor.to_dict().keys()
    caplog.clear()
    VideoProcessor.from_dict(processor.to_dict())
    (record,) = caplog.records


def test_a_filter_by_name(tmp_path, caplog):
    """VideoMAE's class then resizes bilinearly; ViViT's fails, so the name can be honoured."""
    write(tmp_path, "videomae", {"resample": "bicubic"})
    assert VideoProcessor.from_pretrained(tmp_path).resample == 2
    assert "resample 'bicubic' is not a number, so transformers" in caplog.text
    write(tmp_path, "vivit", {"resample": "Bicubic"})
    assert VideoProcessor.from_pretrained(tmp_path).resample == 3
    with pytest.raises(ValueError, match="Unknown resampling filter"):
        reader("vivit").from_pretrained(tmp_path)(frames(9, 9, 3))


@pytest.mark.parametrize(
    "model_type,kind",
    [
        ("vivit", "VivitImageProcessor"),
        ("vivit_jax", "VivitImageProcessor"),
        ("videomae", "VideoMAEImageProcessor"),
        ("VideoMAEv2_Base", "VideoMAEImageProcessor"),
    ],
)
def test_without_a_type_the_model_beside_says_it(tmp_path, model_type, kind):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(SMALL))
    with pytest.raises(ConfigError, match="image_processor_type is None"):
        VideoProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for source in (tmp_path, path):
        assert VideoProcessor.from_pretrained(source).image_processor_type == kind
    other = VideoProcessor.from_pretrained(tmp_path, image_processor_type="VivitImageProcessor")
    assert other.image_processor_type == "VivitImageProcessor"
    if model_type in ("vivit", "videomae"):
        expected = theirs(reader(model_type).from_pretrained(tmp_path), frames(23, 37, 3))
        assert same_bits(VideoProcessor.from_pretrained(tmp_path)(frames(23, 37, 3)), expected)


@pytest.mark.parametrize(
    "shape", [(23, 37, 3), (23, 37, 4), (23, 37, 1), (3, 23, 37), (4, 23, 37), (1, 23, 37)]
)
def test_grey_and_transparent_frames_become_rgb(tmp_path, shape):
    write(tmp_path, "videomae", {"do_convert_rgb": True})
    processor = VideoProcessor.from_pretrained(tmp_path)
    reference = reader("videomae").from_pretrained(tmp_path)
    assert same_bits(processor(frames(*shape)), theirs(reference, frames(*shape)))
    if shape[2] == 37:
        return
    pictures = [Image.fromarray(f.squeeze()) for f in frames(*shape)]
    assert same_bits(processor(pictures), theirs(reference, pictures))
    floats = [(f / 255).astype(np.float32) for f in frames(*shape)]
    call = {"do_rescale": False}
    assert same_bits(processor(floats, **call), theirs(reference, floats, **call))
    if shape[2] == 4:
        with pytest.raises(UserError, match=r"with alpha are in \[0, .*expected \[0, 1\]"):
            processor(frames(*shape, dtype=np.float32))


def test_the_files_own_channel_order(tmp_path):
    write(tmp_path, "videomae", {"input_data_format": "channels_first"})
    processor = VideoProcessor.from_pretrained(tmp_path)
    reference = reader("videomae").from_pretrained(tmp_path)
    first = frames(3, 23, 3)  # ambiguous: either axis may be the channels
    assert same_bits(processor(first), theirs(reference, first))
    last = frames(23, 4, 3)
    call = {"input_data_format": "channels_last"}
    assert same_bits(processor(last, **call), theirs(reference, last, **call))
    pictures = [Image.fromarray(f) for f in frames(23, 37, 3)]
    assert same_bits(processor(pictures), theirs(reference, pictures))
    assert processor.to_dict()["input_data_format"] == "channels_first"


def test_what_vivit_does_not_have_is_refused():
    for name, value in {"do_convert_rgb": True, "input_data_format": "channels_first"}.items():
        with pytest.raises(ConfigError, match=f"{name} is .*VivitImageProcessor lacks"):
            VideoProcessor.vivit(**{name: value})
    video = {"video_processor_type": "VivitVideoProcessor"}
    with pytest.raises(ConfigError, match="keeps the long edge within longest_edge"):
        VideoProcessor.from_dict(video | {"size": {"shortest_edge": 9, "longest_edge": 12}})


def test_a_side_without_a_pixel_is_refused():
    with pytest.raises(UserError, match="100x2 would be resized to 20x0 .*max_height"):
        resized_to({"max_height": 20, "max_width": 20}, 100, 2)
    with pytest.raises(UserError, match="would be resized to 20x0"):
        resized_to({"shortest_edge": 20, "longest_edge": 20}, 100, 2)


@pytest.mark.slow
def test_bounded_sizes_are_those_of_transformers():
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    rng = np.random.default_rng(0)
    for height, width, edge, bound in rng.integers(1, 400, (20000, 4)).tolist():
        expected = get_size_with_aspect_ratio((height, width), edge, bound)
        if min(expected) > 0:
            size = {"shortest_edge": edge, "longest_edge": bound}
            assert resized_to(size, height, width) == expected
        expected = get_image_size_for_max_height_width((height, width), edge, bound)
        if min(expected) > 0:
            assert resized_to({"max_height": edge, "max_width": bound}, height, width) == expected


@pytest.mark.parametrize("name, value", [("image_std", [0.5, [], 0.5]), ("size", {"height": {}})])
def test_nested_values_are_refused_whatever_step_reads_them(name, value):
    off = {"do_normalize": False, "do_resize": False, "image_processor_type": "VivitImageProcessor"}
    with pytest.raises(ConfigError, match=name):
        VideoProcessor.from_dict(off | {name: value})

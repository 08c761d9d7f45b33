# SPDX-License-Identifier: Apache-2.0
"""VideoProcessor against transformers' PIL processors, bit for bit, and against fixed values."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import ConfigError, UserError

FAMILIES = ("vivit", "videomae")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def ours(family, **options):
    return getattr(VideoProcessor, family)(**options)


def theirs(family, **options):
    import transformers

    if family == "vivit":
        return transformers.VivitImageProcessor(**options)
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    return VideoMAEImageProcessorPil(**options)


def run_theirs(processor, videos, **options):
    pixels = np.stack(processor(videos, return_tensors="np", **options)["pixel_values"])
    return np.moveaxis(pixels, 2, -1).astype(np.float32)


def same_bits(got, expected):
    assert got.dtype == np.float32
    return got.shape == expected.shape and np.array_equal(
        np.ascontiguousarray(got).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


def frames(*shape, count=2, seed=0, dtype=np.uint8):
    return list(np.random.RandomState(seed).randint(0, 256, (count, *shape)).astype(dtype))


def assert_same(family, videos, options=(), call=()):
    """The same options given to the constructors, and the same overrides given to the calls."""
    options, call = dict(options), dict(call)
    got = ours(family, **options)(videos, **call)
    assert same_bits(got, run_theirs(theirs(family, **options), videos, **call))
    return got


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "height,width",
    [(270, 360), (360, 270), (225, 301), (301, 225), (90, 120), (121, 89), (256, 256), (224, 341)],
)
def test_default_options_at_many_sizes(family, height, width):
    assert_same(family, frames(height, width, 3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "size,crop",
    list(itertools.product((9, 18, 33, (15, 21), {"height": 40, "width": 12}), (18, (17, 8)))),
)
@pytest.mark.parametrize("shape", [(20, 31, 3), (31, 20, 3), (47, 13, 3), (18, 18, 3), (7, 9, 3)])
def test_size_and_crop_forms(family, shape, size, crop):
    """Upscaling, downscaling, and crops larger than the frame on one side or both."""
    assert_same(family, frames(*shape), {"size": size, "crop_size": crop})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(40, 57, 3), (57, 40, 3), (13, 11, 3)])
@pytest.mark.parametrize("resample", list(Image.Resampling)[:6])
def test_every_filter(family, shape, resample):
    options = {"size": 18, "crop_size": 18}
    as_enum = assert_same(family, frames(*shape), {**options, "resample": resample})
    assert same_bits(as_enum, ours(family, **options, resample=int(resample))(frames(*shape)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "resize,crop,rescale,normalize", list(itertools.product((True, False), repeat=4))
)
@pytest.mark.parametrize("offset", (True, False))
def test_every_step_on_and_off(family, resize, crop, rescale, normalize, offset):
    options = {
        "do_resize": resize,
        "do_center_crop": crop,
        "do_rescale": rescale,
        "do_normalize": normalize,
        "size": 20,
        "crop_size": 24,
    }
    if family == "vivit":
        options["offset"] = offset and rescale
    assert_same(family, frames(21, 30, 3), options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "call",
    [
        {"size": 42, "crop_size": 84},
        {"size": {"height": 19, "width": 27}, "crop_size": {"height": 22, "width": 11}},
        {"resample": 3},
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 100},
        {"rescale_factor": 1.0},
        IMAGENET,
        {"image_mean": 0.4, "image_std": 0.3},
        {"image_mean": [0.5, 0.5, 0.4], "image_std": 0.3},
    ],
)
def test_overrides_per_call(family, call):
    processor = ours(family, size=18, crop_size=18)
    before = processor.to_dict()
    assert_same(family, frames(23, 31, 3), {"size": 18, "crop_size": 18}, call)
    assert not same_bits(processor(frames(23, 31, 3), **call), processor(frames(23, 31, 3)))
    assert processor.to_dict() == before


def test_overrides_of_the_vivit_offset():
    assert_same("vivit", frames(20, 20, 3), call={"offset": False})
    assert_same("vivit", frames(20, 20, 3), call={"offset": False, "do_rescale": False})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_channel_counts_and_layouts(family, channels, layout):
    options = {
        "size": 18,
        "crop_size": 20,
        "image_mean": [0.1, 0.2, 0.3, 0.4][:channels],
        "image_std": [0.5, 0.6, 0.7, 0.8][:channels],
    }
    videos = frames(25, 31, channels)
    if layout == "channels_first":
        videos = [np.ascontiguousarray(frame.transpose(2, 0, 1)) for frame in videos]
    got = ours(family, **options)(videos, input_data_format=layout)
    assert same_bits(got, run_theirs(theirs(family, **options), videos, input_data_format=layout))
    assert same_bits(got, ours(family, **options)(videos))


@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_channels_that_are_data_are_resized_one_by_one(tmp_path, resample, channels):
    mean, std = (list(np.linspace(*ends, channels)) for ends in ((0.1, 0.9), (0.9, 0.2)))
    options = {"size": 18, "crop_size": 16, "resample": resample}
    videos = frames(25, 31, channels)
    processor = ours(
        "videomae", **options, image_mean=mean, image_std=std, independent_channels=channels < 5
    )
    processor.save_pretrained(tmp_path)
    got = VideoProcessor.from_pretrained(tmp_path)(videos)
    for c in range(channels):
        single = {**options, "image_mean": mean[c], "image_std": std[c]}
        plane = [frame[..., c : c + 1] for frame in videos]
        assert same_bits(got[..., c : c + 1], run_theirs(theirs("videomae", **single), plane))


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_of_input_agree(family):
    import torch

    processor = ours(family, size=18, crop_size=18)
    clip = np.stack(frames(25, 31, 3, count=3))
    expected = run_theirs(theirs(family, size=18, crop_size=18), list(clip))
    one_video = [
        clip,
        list(clip),
        tuple(clip),
        [Image.fromarray(frame) for frame in clip],
        clip.transpose(0, 3, 1, 2),
        list(clip.transpose(0, 3, 1, 2)),
        torch.from_numpy(clip),
        list(torch.from_numpy(clip)),
        torch.from_numpy(clip).permute(0, 3, 1, 2),
        clip.astype(np.int64),
        clip.astype(np.float32),
        [clip],
        [list(clip)],
        clip[None],
    ]
    for videos in one_video:
        assert same_bits(processor(videos), expected)
    second = clip[:, ::-1]
    batch = run_theirs(theirs(family, size=18, crop_size=18), [list(clip), list(second)])
    for videos in ([clip, second], [list(clip), list(second)], np.stack([clip, second])):
        assert same_bits(processor(videos), batch)
    assert same_bits(processor(clip[0]), expected[:, :1])
    assert same_bits(processor(Image.fromarray(clip[0])), expected[:, :1])
    grey = ours(family, size=18, crop_size=18, image_mean=0.5, image_std=0.5)
    expected = grey(clip[..., :1])
    assert same_bits(grey(clip[..., 0], input_data_format="none"), expected)
    assert same_bits(grey(list(clip[..., 0])), expected)
    assert same_bits(grey([Image.fromarray(frame[..., 0]) for frame in clip]), expected)


def test_jax_arrays_and_channels_first_output():
    import jax.numpy as jnp

    clip = np.stack(frames(25, 31, 3))
    processor = VideoProcessor.videomae(size=18, crop_size=(18, 16))
    expected = processor(clip)
    assert same_bits(processor(jnp.asarray(clip)), expected)
    assert same_bits(processor.preprocess(clip), expected)
    first = processor(clip, data_format="channels_first")
    assert first.shape == (1, 2, 3, 18, 16)
    assert same_bits(first.transpose(0, 1, 3, 4, 2), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_pillow_modes_and_frames_of_different_size(family):
    mixed = [
        frames(*shape, count=1, seed=i)[0] for i, shape in enumerate([(30, 40, 3), (50, 20, 3)])
    ]
    assert_same(family, mixed, {"size": 18, "crop_size": 18})
    rgba = [Image.fromarray(frame, "RGBA") for frame in frames(30, 41, 4)]
    options = {"size": 18, "crop_size": 18, "image_mean": [0.5] * 4, "image_std": [0.5] * 4}
    got = ours(family, **options)(rgba)
    arrays = [np.array(image) for image in rgba]
    expected = run_theirs(theirs(family, **options), arrays, input_data_format="channels_last")
    assert same_bits(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_frames_without_rescaling(family, resize, dtype):
    rng = np.random.RandomState(0)
    options = {"do_resize": resize, "size": 18, "crop_size": 18, "do_rescale": False, **IMAGENET}
    if family == "vivit":
        options["offset"] = False
    unit = list(rng.uniform(0, 1, (3, 23, 31, 3)).astype(dtype))
    unit[1] = np.zeros_like(unit[1])  # transformers takes an all-black frame for bytes
    assert_same(family, unit, options)
    # Zeros and ones are integers, so transformers resizes them as bytes 0 and 1.
    assert_same(family, list((rng.uniform(size=(2, 23, 31, 3)) > 0.5).astype(dtype)), options)
    assert_same(family, frames(23, 31, 3, dtype=dtype), options)
    if not resize:
        assert_same(family, list(rng.standard_normal((2, 23, 31, 3)).astype(dtype)), options)


@pytest.mark.parametrize("family,factor", [("vivit", 2.0), ("videomae", 1.0)])
def test_unit_floats_with_the_factor_that_the_error_names(family, factor):
    unit = list(np.random.RandomState(0).uniform(0, 1, (2, 23, 31, 3)).astype(np.float32))
    options = {"do_resize": False, "crop_size": 18}
    with pytest.raises(UserError, match=f"rescale_factor={factor:.6g}"):
        ours(family, **options)(unit)
    assert_same(family, unit, {**options, "rescale_factor": factor})


def test_other_dtypes_without_resizing():
    options = {"do_resize": False, "crop_size": 18, "rescale_factor": 1 / 65535}
    deep = list(np.random.RandomState(0).randint(0, 65536, (2, 20, 20, 3)).astype(np.uint16))
    assert_same("videomae", deep, options)
    assert_same("videomae", [frame > 3000 for frame in deep], {**options, "do_rescale": False})


@pytest.mark.parametrize(
    "wrong",
    [
        {"resample": 3},
        {"size": 19},
        {"offset": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127},
        {"image_mean": [0.5, 0.5, 0.50001]},
        {"image_std": IMAGENET["image_std"]},
        {"do_center_crop": False},
    ],
)
def test_a_wrong_option_is_seen(wrong):
    options = {"size": 18, "crop_size": 18}
    expected = run_theirs(theirs("vivit", **options), frames(25, 31, 3))
    assert same_bits(ours("vivit", **options)(frames(25, 31, 3)), expected)
    assert not same_bits(ours("vivit", **{**options, **wrong})(frames(25, 31, 3)), expected)


def test_values_computed_by_transformers():
    rng = np.random.RandomState(42)
    large = rng.randint(0, 256, (4, 3, 270, 360)).astype(np.uint8)
    small = rng.randint(0, 256, (4, 3, 90, 120)).astype(np.uint8)
    first = {
        "vivit": [-1.4156862, -0.9137254, -0.86666656, -1.0862745],
        "videomae": [0.49803925, 0.35686278, -0.41960782, 0.427451],
    }
    bounds = {"vivit": (-2.937255, 0.937255), "videomae": (-0.952941, 0.960784)}
    means = {
        ("vivit", "large"): -1.00173330,
        ("videomae", "large"): -0.00022681,
        ("vivit", "small"): -0.99910420,
        ("videomae", "small"): -0.00037725,
    }
    digests = {
        ("vivit", "large"): "578436ff76",
        ("videomae", "large"): "d049ea17e3",
        ("vivit", "small"): "8033d06453",
        ("videomae", "small"): "54272cafdd",
    }
    for family in FAMILIES:
        for name, video in (("large", large), ("small", small)):
            pixels = ours(family)(video, data_format="channels_first")
            assert pixels.shape == (1, 4, 3, 224, 224)
            digest = hashlib.sha1(np.ascontiguousarray(pixels).tobytes()).hexdigest()
            assert digest[:10] == digests[family, name]
            # The recorded means were accumulated in float32.
            assert abs(pixels.mean(dtype=np.float64) - means[family, name]) < 5e-8
            if name == "large":
                assert pixels[0, 0, 0, 0, :4].tolist() == np.float32(first[family]).tolist()
                np.testing.assert_allclose((pixels.min(), pixels.max()), bounds[family], atol=1e-6)


def test_rescaling_of_every_byte():
    every_byte = np.arange(256, dtype=np.uint8).reshape(1, 8, 32, 1)
    processor = VideoProcessor.vivit(do_resize=False, do_center_crop=False, do_normalize=False)
    expected = every_byte[None] * (1 / 127.5) - 1
    np.testing.assert_allclose(processor(every_byte), expected, rtol=0, atol=1e-7)
    expected = every_byte[None] * (1 / 255)
    np.testing.assert_allclose(
        processor(every_byte, offset=False, rescale_factor=1 / 255), expected, atol=1e-7
    )


@pytest.mark.parametrize(
    "processor,low,high",
    [
        (VideoProcessor.vivit(), [-3] * 3, [1] * 3),
        (VideoProcessor.named("vivit-kinetics400"), [-3] * 3, [1] * 3),
        (VideoProcessor.named("vivit-scenic"), [-1] * 3, [1] * 3),
        (VideoProcessor.videomae(), [-1] * 3, [1] * 3),
        (
            VideoProcessor.named("videomae-imagenet"),
            [-2.1179, -2.0357, -1.8044],
            [2.2489, 2.4286, 2.6400],
        ),
    ],
)
def test_ranges(processor, low, high):
    for byte, expected in ((0, low), (255, high)):
        pixels = processor(np.full((1, 30, 30, 3), byte, np.uint8))
        assert pixels.shape == (1, 1, 224, 224, 3)
        np.testing.assert_allclose(pixels[0, 0, 111, 111], expected, atol=1e-4)


def test_input_is_left_as_it_was():
    clip = np.stack(frames(18, 18, 3))
    before = clip.copy()
    VideoProcessor.vivit(size=18, crop_size=18)(clip)
    assert np.array_equal(clip, before)


K400_FILE = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00784313725490196,
    "size": {"shortest_edge": 224},
}
SCENIC_FILE = {
    **K400_FILE,
    "do_normalize": False,
    "do_zero_centering": True,
    "image_processor_type": "VivitImageProcessor",
    "size": {"shortest_edge": 256},
}
VIDEOMAE_FILE = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "VideoMAEFeatureExtractor",
    "resample": 2,
    "size": 224,
    **IMAGENET,
}


@pytest.mark.parametrize(
    "file,named",
    [
        (K400_FILE, "vivit-kinetics400"),
        (SCENIC_FILE, "vivit-scenic"),
        (VIDEOMAE_FILE, "videomae-imagenet"),
    ],
)
def test_published_files(tmp_path, file, named):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(file))
    processor = VideoProcessor.from_pretrained(tmp_path)
    assert processor == VideoProcessor.from_pretrained(path) == VideoProcessor.named(named)
    family = "videomae" if "videomae" in named else "vivit"
    reference = type(theirs(family)).from_pretrained(tmp_path)
    videos = frames(230, 241, 3)
    assert same_bits(processor(videos), run_theirs(reference, videos))
    other = VideoProcessor.from_pretrained(tmp_path, do_normalize=False, rescale_factor=1 / 255)
    assert other != processor and other.rescale_factor == 1 / 255


@pytest.mark.parametrize(
    "processor",
    [
        VideoProcessor.vivit(),
        VideoProcessor.named("vivit-scenic", resample=3, crop_size=(30, 20)),
        VideoProcessor.vivit(do_rescale=False, offset=False, size=(19, 33), crop_size=18),
        VideoProcessor.named("videomae-imagenet", size=40, crop_size=32),
        VideoProcessor.videomae(image_mean=0.4, image_std=[0.1, 0.2, 0.3], do_center_crop=False),
        VideoProcessor.videomae(do_resize=False, rescale_factor=1 / 3),
    ],
)
def test_what_we_write_transformers_reads(tmp_path, processor):
    from transformers import AutoImageProcessor

    path = processor.save_pretrained(tmp_path / "model")
    assert [entry.name for entry in path.parent.iterdir()] == ["preprocessor_config.json"]
    assert VideoProcessor.from_pretrained(path.parent) == processor
    assert VideoProcessor.from_dict(json.loads(json.dumps(processor.to_dict()))) == processor
    family = "videomae" if "VideoMAE" in processor.image_processor_type else "vivit"
    videos = frames(45, 37, 3)
    for reader in (type(theirs(family)), AutoImageProcessor):
        reference = reader.from_pretrained(path.parent)
        assert same_bits(processor(videos), run_theirs(reference, videos))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_we_read(tmp_path, family):
    options = {"size": 40, "crop_size": (30, 20), "resample": 3, "rescale_factor": 0.01}
    theirs(family, **options).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    processor = VideoProcessor.from_pretrained(tmp_path)
    assert processor == ours(family, **options)
    assert processor.to_dict() == written
    saved = json.loads(processor.save_pretrained(tmp_path / "again").read_text())
    assert saved == written


@pytest.mark.parametrize(
    "spelling",
    ["VideoMAEImageProcessor", "VideoMAEImageProcessorPil", "VideoMAEImageProcessorFast"],
)
def test_older_and_newer_names(spelling):
    config = {"image_processor_type": spelling, "feature_extractor_type": "x", "do_pad": None}
    assert VideoProcessor.from_dict(config) == VideoProcessor.videomae()
    assert VideoProcessor.from_dict({}, image_processor_type=spelling) == VideoProcessor.videomae()


def test_other_files_of_a_directory(tmp_path):
    video = {
        "crop_size": {"height": 224, "width": 224},
        "data_format": "channels_first",
        "default_to_square": False,
        "do_convert_rgb": True,
        "do_sample_frames": False,
        "return_metadata": False,
        "size": {"shortest_edge": 200},
        "video_processor_type": "VivitVideoProcessor",
    }
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    assert VideoProcessor.from_pretrained(tmp_path) == VideoProcessor.vivit(size=200)
    assert VideoProcessor.from_pretrained(tmp_path, offset=False).offset is False
    without = VideoProcessor.from_dict({**video, "do_rescale": False})
    assert not without.offset
    nested = tmp_path / "processor_config.json"
    nested.write_text(json.dumps({"video_processor": {**video, "size": 201}}))
    assert VideoProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 201}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIDEOMAE_FILE))
    assert VideoProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 224}
    nested.write_text(json.dumps({"image_processor": K400_FILE, "video_processor": video}))
    for source in (tmp_path, nested):
        assert VideoProcessor.from_pretrained(source) == VideoProcessor.named("vivit-kinetics400")
    nested.write_text(json.dumps({"processor_class": "VideoMAEProcessor"}))
    named = VideoProcessor.named("videomae-imagenet")
    assert VideoProcessor.from_pretrained(tmp_path) == named


def test_hub_id(tmp_path, monkeypatch):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(K400_FILE))
    asked = []

    def resolve_processor(source, revision):
        asked.append((source, revision))
        return file

    where = "vivit_jax.data.transforms.processor.resolve_processor"
    monkeypatch.setattr(where, resolve_processor)
    processor = VideoProcessor.from_pretrained("google/vivit-b-16x2-kinetics400", revision="v1")
    assert processor == VideoProcessor.named("vivit-kinetics400")
    assert asked == [("google/vivit-b-16x2-kinetics400", "v1")]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = VideoProcessor.vivit().save_pretrained(tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        VideoProcessor.videomae().save_pretrained(tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"size": {"longest_edge": 20}}, "size is .*longest_edge.*expected .*shortest_edge"),
        ({"size": {"shortest_edge": 0}}, "size is .*above 0"),
        ({"size": True}, "size is True"),
        ({"size": (1, 2, 3)}, "size is"),
        ({"size": 22.5}, "size is 22.5"),
        ({"crop_size": {"shortest_edge": 9}}, "crop_size is .*expected {'height'"),
        ({"crop_size": -4}, "crop_size is -4"),
        ({"resample": 9}, "resample is 9, expected a Pillow filter: .*2 bilinear"),
        ({"resample": "bilinear"}, "resample is 'bilinear'"),
        ({"do_resize": 1}, "do_resize is 1, expected True or False"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"image_mean": []}, "image_mean is"),
        ({"image_mean": [0.5, "x", 0.5]}, "image_mean is 'x'"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is .*expected no zero"),
        ({"sizes": 3}, "sizes: no such processor option, expected .*crop_size"),
        ({"return_tensors": "pt"}, "return_tensors: no such.*always a numpy array"),
    ],
)
def test_wrong_options(options, message):
    for processor in (VideoProcessor.vivit, VideoProcessor.videomae):
        with pytest.raises(ConfigError, match=message):
            processor(**options)
        with pytest.raises(ConfigError, match=message):
            processor()(frames(9, 9, 3), **options)


def test_offset_needs_rescaling():
    with pytest.raises(ValueError, match="offset is True but do_rescale is False"):
        VideoProcessor.vivit(do_rescale=False)
    with pytest.raises(ValueError, match="set offset=False too"):
        VideoProcessor.vivit()(frames(9, 9, 3), do_rescale=False)
    with pytest.raises(ConfigError, match="offset is True.*VideoProcessor.vivit"):
        VideoProcessor.videomae(offset=True)
    with pytest.raises(ValueError, match="offset"):
        theirs("vivit")(frames(9, 9, 3), do_rescale=False)


@pytest.mark.parametrize(
    "config,message",
    [
        ({}, "image_processor_type is None, expected VivitImageProcessor"),
        ({"image_processor_type": "CLIPImageProcessor"}, "is 'CLIPImageProcessor'"),
        (K400_FILE | {"size": {"max_height": 9, "max_width": 9}}, "size is .*expected .*short"),
        (VIDEOMAE_FILE | {"size": {"longest_edge": 9}}, "size is .*expected .*'max_height': n"),
        (K400_FILE | {"do_rescale": None}, "offset is True but do_rescale is False"),
        (K400_FILE | {"resample": "sinc"}, "resample is 'sinc'"),
        (VIDEOMAE_FILE | {"do_resize": "no"}, "do_resize is 'no', expected True or False"),
        (VIDEOMAE_FILE | {"input_data_format": "hwc"}, "input_data_format is 'hwc'"),
        (["a list"], "a processor is a list, expected a JSON object"),
    ],
)
def test_wrong_files(tmp_path, config, message):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as caught:
        VideoProcessor.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="holds no processor file.*preprocessor_config.json"):
        VideoProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        VideoProcessor.from_pretrained(tmp_path / "missing")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        VideoProcessor.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no processor is named 'vivit'.*vivit-scenic"):
        VideoProcessor.named("vivit")


CLIP = np.stack(frames(9, 9, 3))


@pytest.mark.parametrize(
    "videos,call,message",
    [
        ([], {}, "empty list"),
        ([[]], {}, "empty list"),
        ("clip.mp4", {}, "a frame is a str, expected an array or a Pillow image"),
        ([1, 2], {}, "a frame is a int"),
        ([CLIP, CLIP[0]], {}, "mixes frames, videos or batches"),
        ([[[CLIP[0]]], [[CLIP[0]]]], {}, "nested 3 levels"),
        (np.zeros((0, 9, 9, 3), np.uint8), {}, r"shape \(0, 9, 9, 3\), expected non-empty"),
        (np.zeros(9, np.uint8), {}, r"shape \(9,\)"),
        (np.zeros((9, 9, 3), complex), {}, "dtype complex128"),
        (np.zeros((9, 8, 7), np.uint8), {}, r"shape \(9, 8, 7\), in which no axis.*1, 3, 4 or 3"),
        (CLIP[..., :1], {}, "image_mean has 3 entries but the frames have 1 channels"),
        (CLIP, {"image_std": [1, 1]}, "image_std has 2 entries but the frames have 3"),
        ([CLIP, CLIP[:1]], {}, "videos of 1, 2 frames cannot be stacked"),
        ([CLIP[0], CLIP[0, :8]], {"do_center_crop": False}, "frame 1 of video 0 has shape"),
        ([CLIP, CLIP[:, :8]], {"do_center_crop": False}, "frame 0 of video 1 has shape"),
        (CLIP / 255, {}, r"floats in \[0, 1\] and do_rescale is on.*pass uint8"),
        (CLIP - 0.5, {}, "cannot be resized.*do_resize=False"),
        (CLIP.astype(np.int32) * 2, {}, "cannot be resized"),
        (np.full((9, 9, 3), np.nan), {}, r"in \[nan, nan\] cannot be resized"),
        (Image.new("P", (9, 9)), {}, "mode P, expected L, LA, RGB or RGBA.*convert"),
        (CLIP, {"input_data_format": "hwc"}, "input_data_format is 'hwc', expected 'channels_l"),
        (CLIP, {"data_format": "none"}, "^data_format is 'none', expected 'channels_last'"),
    ],
)
def test_wrong_videos(videos, call, message):
    with pytest.raises(UserError, match=message):
        VideoProcessor.videomae()(videos, **call)


def test_unit_floats_are_refused_per_video_not_per_frame():
    dark = CLIP.astype(np.float32)
    dark[0] = 0
    assert_same("videomae", list(dark))
    assert_same("vivit", list(dark * 0))


def test_tensors_that_numpy_cannot_read():
    import torch

    for tensor in (torch.zeros(9, 9, 3, requires_grad=True), torch.zeros(9, 9, 3).bfloat16()):
        with pytest.raises(UserError, match="a Tensor cannot be read as a numpy array"):
            VideoProcessor.videomae()(tensor)


@pytest.mark.parametrize(
    ("processor", "warns"),
    [
        (VideoProcessor.vivit(offset=False), True),
        (VideoProcessor.vivit(offset=False, do_rescale=False), False),
        (VideoProcessor.vivit(), False),
        (VideoProcessor.videomae(), False),
    ],
)
def test_what_transformers_video_processor_reads_otherwise_is_said(
    processor, warns, tmp_path, caplog
):
    processor.save_pretrained(tmp_path)
    assert ("offset is False" in caplog.text and "AutoVideoProcessor" in caplog.text) is warns
    assert VideoProcessor.from_pretrained(tmp_path) == processor


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("image_std", [0.5, [], 0.5], "image_std is \\[\\], expected a finite number"),
        ("image_mean", [[0.5], [0.5], [0.5]], "image_mean is \\[0.5\\], expected a finite number"),
        ("image_mean", np.full((3, 1), 0.5), "image_mean is \\[0.5\\], expected a finite number"),
        ("image_std", [], "image_std is \\[\\], expected a finite number"),
        ("rescale_factor", 10**400, "rescale_factor is 1000.*, expected a finite number"),
        ("size", {"shortest_edge": 10**9}, "a frame of size .* would take 12,000,000,000,000"),
        ("size", [10**6, 10**4], "a frame of size .* VIVIT_JAX_UNPACK_LIMIT"),
        ("crop_size", 10**6, "a frame of crop_size 1000000 would take"),
    ],
)
def test_values_of_any_shape_or_size_are_one_error(name, value, told):
    with pytest.raises(ConfigError, match=told):
        VideoProcessor.vivit(**{name: value})
    assert VideoProcessor.vivit(image_mean=np.full(3, 0.25)).image_mean == (0.25, 0.25, 0.25)


def test_a_deep_file_or_a_directory_in_its_place_is_one_error(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="preprocessor_config.json is not valid JSON: nested"):
        VideoProcessor.from_pretrained(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="preprocessor_config.json is a directory, expected"):
        VideoProcessor.from_pretrained(tmp_path)

# SPDX-License-Identifier: Apache-2.0
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from vivit_jax.data.settings import AugmentSettings
from vivit_jax.data.transforms.augment import (
    center_crop,
    flip,
    jitter_scale,
    multi_scale_crop,
    random_crop,
    random_resized_crop,
    resize,
    resize_shortest,
    three_crops,
    train_transform,
)
from vivit_jax.data.transforms.randaugment import parse_rand_augment, rand_augment
from vivit_jax.errors import UserError, VideoError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def coordinates(height, width, frames=2):
    """Each pixel states its place: channel 0 its row, channel 1 its column."""
    rows, columns = np.indices((height, width), np.uint8)
    return np.repeat(np.stack([rows, columns, 0 * rows], axis=-1)[None], frames, axis=0)


@pytest.mark.parametrize("size", [(24, 31), (13, 9), (60, 17), (1, 1), (37, 90), (8, 64)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_resize_is_torchs_bilinear_rounded_to_the_nearest_level(size, channels):
    clip = noise(3, 37, 53, channels)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(clip).permute(0, 3, 1, 2).float(), size, mode="bilinear"
    )
    resized = resize(clip, *size)
    assert resized.dtype == np.uint8 and resized.shape == (3, *size, channels)
    # Half a level of rounding; torch computes the weights in single precision.
    assert np.abs(resized - wanted.permute(0, 2, 3, 1).numpy()).max() <= 0.5 + 0.01


def test_resize_does_not_smooth_as_pillow_does():
    clip = noise(1, 64, 64, 3)
    smooth = np.asarray(Image.fromarray(clip[0]).resize((20, 20), Image.Resampling.BILINEAR))
    assert np.abs(resize(clip, 20, 20)[0].astype(int) - smooth).mean() > 20


def test_a_line_of_pixels_is_not_resized_to_gigabytes():
    told = "a frame of 1x20000 would be resized to 224x4480000 by .*, which would take 8,028,160,00"
    with pytest.raises(VideoError, match=told):
        resize_shortest(np.zeros((8, 1, 20000, 3), np.uint8), 224)


def test_resize_to_the_same_size_keeps_every_byte():
    clip = noise(2, 9, 11, 3)
    np.testing.assert_array_equal(resize(clip, 9, 11), clip)


@pytest.mark.parametrize(
    ("frame", "side", "expected"),
    [((240, 320), 256, (256, 341)), ((320, 240), 100, (133, 100)), ((50, 50), 30, (30, 30))],
)
def test_resize_shortest_keeps_the_aspect_and_rounds_the_longer_side_down(frame, side, expected):
    assert resize_shortest(noise(1, *frame, 3), side).shape == (1, *expected, 3)


def test_jitter_scale_draws_height_and_width_apart_from_each_other():
    clip = np.zeros((1, 100, 200, 1), np.uint8)
    rng = np.random.default_rng(0)
    sides = [jitter_scale(rng, clip, (0.9, 1.33)).shape[1:3] for _ in range(400)]
    factors = np.array(sides) / (100, 200)
    assert factors.min() >= 0.89 and factors.max() <= 1.33
    np.testing.assert_allclose(factors.mean(0), (0.9 + 1.33) / 2, atol=0.03)
    np.testing.assert_allclose(factors.std(0), (1.33 - 0.9) / math.sqrt(12), atol=0.02)
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.15


def written_out_boxes(height, width):
    """The 130 boxes (left, top, right, bottom) of TSN's crop, for a target that equals no side."""
    base = min(height, width)
    steps = [base, int(0.875 * base), int(0.75 * base), int(0.66 * base)]
    shapes = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    boxes = []
    for down, across in shapes:
        h, w = steps[down], steps[across]
        dy, dx = (height - h) // 4, (width - w) // 4
        corners = [(0, 0), (4 * dx, 0), (0, 4 * dy), (4 * dx, 4 * dy)]
        middles = [(0, 2 * dy), (4 * dx, 2 * dy), (2 * dx, 4 * dy), (2 * dx, 0)]
        quarters = [(dx, dy), (3 * dx, dy), (dx, 3 * dy), (3 * dx, 3 * dy)]
        for x, y in [*corners, (2 * dx, 2 * dy), *middles, *quarters]:
            boxes.append((x, y, x + w, y + h))
    return boxes


@pytest.mark.parametrize("frame", [(72, 100), (90, 66)])
def test_multi_scale_crop_gives_each_of_its_10_shapes_at_13_places_equally_often(frame):
    clip = coordinates(*frame, frames=1)
    picture = Image.fromarray(clip[0])
    wanted = Counter(
        picture.crop(box).resize((24, 20), Image.Resampling.BILINEAR).tobytes()
        for box in written_out_boxes(*frame)
    )
    assert len(wanted) > 90  # boxes as large as the frame have fewer places
    rng = np.random.default_rng(0)
    draws = 2500
    got = Counter(multi_scale_crop(rng, clip, (20, 24)).tobytes() for _ in range(draws))
    assert got.keys() == wanted.keys()
    for crop, share in wanted.items():
        mean = share / 130 * draws
        assert abs(got[crop] - mean) < 6 * math.sqrt(mean)


def test_multi_scale_crop_takes_the_target_for_sides_within_2_pixels_of_it():
    clip = coordinates(64, 64, frames=1)  # sides 64, 56, 48, 42
    rng = np.random.default_rng(0)
    crops = [multi_scale_crop(rng, clip, (44, 44))[0].astype(int) for _ in range(200)]
    exact = [c for c in crops if (np.diff(c[..., 0], axis=0) == 1).all()]
    exact = [c for c in exact if (np.diff(c[..., 1], axis=1) == 1).all()]
    assert 5 < len(exact) < 50  # the last of 10 shapes is cut without resizing
    # A target larger than the frame is not cut.
    assert multi_scale_crop(rng, coordinates(63, 63), (64, 64)).shape == (2, 64, 64, 3)


def test_random_resized_crop_has_uniform_areas_and_log_uniform_ratios():
    # Linear ramps stay linear, so two inner pixels give the box's borders.
    clip = coordinates(250, 250, frames=1)
    rng = np.random.default_rng(0)
    size, count = 96, 1000
    boxes = []
    for _ in range(count):
        crop = random_resized_crop(rng, clip, (size, size), (0.05, 0.4), (0.5, 2.0))[0]
        low, high = crop[8, 8, :2].astype(float), crop[-9, -9, :2].astype(float)
        length = (high - low) * size / (size - 17)
        start = low + 0.5 - 8.5 / size * length
        boxes.append((*start, *length))
    top, left, height, width = np.array(boxes).T
    area, ratio = height * width / 250**2, np.log(width / height)
    np.testing.assert_allclose(np.quantile(area, [0, 0.5, 1]), [0.05, 0.225, 0.4], atol=0.02)
    spread = [-math.log(2), -math.log(2) / 2, 0, math.log(2) / 2, math.log(2)]
    np.testing.assert_allclose(np.quantile(ratio, np.linspace(0, 1, 5)), spread, atol=0.08)
    for start, length in ((top, height), (left, width)):
        place = start / (250 - length)
        np.testing.assert_allclose(np.quantile(place, [0, 0.5, 1]), [0, 0.5, 1], atol=0.06)


def test_the_recipes_boxes_are_cut():
    settings = AugmentSettings(
        crop="random_resized", crop_scale=(0.2, 0.2), crop_ratio=(2, 2), flip=0.0
    )
    clip = coordinates(100, 100)
    crop = train_transform(settings, (50, 50))(np.random.default_rng(0), clip)
    low, high = crop[0, 5, 5, :2].astype(float), crop[0, 45, 45, :2].astype(float)
    height, width = (high - low) * 50 / 40
    assert abs(width / height - 2) < 0.1 and abs(width * height / 100**2 - 0.2) < 0.02


@pytest.mark.parametrize(
    ("frame", "box"),
    [((20, 200), (0, 86, 20, 27)), ((200, 20), (86, 0, 27, 20)), ((40, 45), (0, 0, 40, 45))],
    ids=str,
)
def test_random_resized_crop_falls_back_to_the_largest_box_in_the_middle(frame, box):
    top, left, height, width = box
    clip = coordinates(*frame)
    crop = random_resized_crop(np.random.default_rng(0), clip, (16, 16), (10, 10))  # never fits
    cut = clip[:, top : top + height, left : left + width]
    np.testing.assert_array_equal(crop, resize(cut, 16, 16))


def test_random_crop_is_uniform_over_all_places():
    clip = coordinates(7, 9)
    rng = np.random.default_rng(0)
    places = Counter()
    for _ in range(3000):
        crop = random_crop(rng, clip, (5, 6))
        np.testing.assert_array_equal(crop - crop[0, 0, 0], coordinates(5, 6))
        places[tuple(crop[0, 0, 0, :2].tolist())] += 1
    assert sorted(places) == [(y, x) for y in range(3) for x in range(4)]
    assert max(abs(count - 250) for count in places.values()) < 5 * math.sqrt(250)


@pytest.mark.parametrize(("size", "corner"), [((4, 4), (1, 2)), ((5, 3), (1, 3)), ((7, 9), (0, 0))])
def test_center_crop_rounds_its_offsets_down(size, corner):
    crop = center_crop(coordinates(7, 9), size)
    assert crop.shape == (2, *size, 3) and tuple(crop[0, 0, 0, :2]) == corner


@pytest.mark.parametrize(
    ("frame", "count", "rounding", "corners"),
    [
        ((8, 15), 3, "floor", [(0, 0), (0, 3), (0, 7)]),
        ((8, 15), 3, "ceil", [(0, 0), (0, 4), (0, 7)]),
        ((15, 8), 3, "floor", [(0, 0), (3, 0), (7, 0)]),
        ((15, 8), 3, "ceil", [(0, 0), (4, 0), (7, 0)]),
        ((11, 15), 3, "floor", [(1, 0), (1, 3), (1, 7)]),
        ((11, 15), 3, "ceil", [(2, 0), (2, 4), (2, 7)]),
        ((8, 15), 1, "floor", [(0, 3)]),
        ((8, 18), 4, "floor", [(0, 0), (0, 3), (0, 6), (0, 10)]),
        ((9, 9), 2, "floor", [(0, 0), (0, 1)]),
    ],
)
def test_three_crops_spread_along_the_longer_side(frame, count, rounding, corners):
    clip = coordinates(*frame)
    crops = three_crops(clip, (8, 8), count, rounding)
    assert crops.shape == (count, 2, 8, 8, 3)
    assert [tuple(crop[0, 0, 0, :2].tolist()) for crop in crops] == corners
    np.testing.assert_array_equal(crops - crops[:, :, :1, :1], [coordinates(8, 8)] * count)


def test_flip_mirrors_the_width_with_its_probability():
    clip = coordinates(4, 5)
    rng = np.random.default_rng(0)
    flipped = sum(bool(flip(rng, clip, 0.3)[0, 0, 0, 1]) for _ in range(4000))
    assert abs(flipped - 1200) < 5 * math.sqrt(4000 * 0.3 * 0.7)
    np.testing.assert_array_equal(flip(rng, clip, 1.0), np.flip(clip, 2))
    assert all(flip(rng, clip, 0.0) is clip for _ in range(50))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_flip_mirrors_clips_of_any_channels_and_views_of_them(channels):
    whole = np.random.default_rng(0).integers(0, 256, (2, 6, 9, channels), dtype=np.uint8)
    for clip in (whole, whole[:, 1:5, 2:7], whole[:, ::-1, ::-1]):
        kept = clip.copy()
        np.testing.assert_array_equal(flip(np.random.default_rng(0), clip, 1.0), np.flip(kept, 2))
        np.testing.assert_array_equal(clip, kept)


VIDEOMAE_PRETRAIN = AugmentSettings(crop="multi_scale", flip=0.0)
VIDEOMAE_FINETUNE = AugmentSettings(rand_augment="rand-m7-n4-mstd0.5-inc1")
SCENIC = AugmentSettings(
    resize=40, crop="random", jitter_scale=(0.9, 1.33), rand_augment="scenic-m15-n2"
)
EACH = pytest.mark.parametrize(
    "settings", [VIDEOMAE_PRETRAIN, VIDEOMAE_FINETUNE, SCENIC], ids=["pre", "fine", "scenic"]
)


@EACH
def test_train_transform_treats_all_frames_alike_and_depends_on_the_seed_alone(settings):
    frame = noise(48, 64, 3)
    clip = np.stack([frame] * 5)
    transform = train_transform(settings, (32, 30))
    results = []
    for seed in range(12):
        before = clip.copy()
        result = transform(np.random.default_rng(seed), clip)
        assert result.shape == (5, 32, 30, 3) and result.dtype == np.uint8
        assert result.flags.c_contiguous
        # scenic's Sharpness mixes a frame's edge with that of its neighbours; the first and the
        # last frame have one neighbour.
        alike = result[1:-1] if settings is SCENIC else result
        np.testing.assert_array_equal(alike, np.stack([alike[0]] * len(alike)))
        np.testing.assert_array_equal(clip, before)
        again = pickle.loads(pickle.dumps(transform))(np.random.default_rng(seed), clip)
        np.testing.assert_array_equal(result, again)
        results.append(result.tobytes())
    assert len(set(results)) > 7


def test_fine_tuning_crops_frames_that_rand_augment_changed_whole():
    clip = np.repeat(np.repeat(noise(2, 12, 16, 3), 4, 1), 4, 2)
    transform = train_transform(VIDEOMAE_FINETUNE, (32, 30))
    for seed in range(40):
        rng = np.random.default_rng(seed)
        whole = rand_augment(rng, clip, parse_rand_augment(VIDEOMAE_FINETUNE.rand_augment))
        wanted = flip(rng, random_resized_crop(rng, whole, (32, 30)), 0.5)
        np.testing.assert_array_equal(transform(np.random.default_rng(seed), clip), wanted)


@EACH
def test_train_transform_keeps_the_order_of_frames(settings):
    clip = coordinates(48, 64)
    clip[1] //= 2
    for seed in range(8):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        transform = train_transform(settings, (32, 32))
        both, swapped = transform(rng, clip), transform(again, clip[::-1])
        np.testing.assert_array_equal(both, swapped[::-1])


@pytest.mark.parametrize("jitter", [None, (0.9, 1.33)])
@pytest.mark.parametrize("crop", ["random", "center"])
def test_train_transform_is_its_steps_one_after_the_other(crop, jitter):
    clip = noise(2, 48, 64, 3)
    settings = AugmentSettings(resize=40, crop=crop, jitter_scale=jitter)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        wanted = resize_shortest(clip, 40)
        if jitter:
            wanted = jitter_scale(rng, wanted, jitter)
        size = (32, 34)
        wanted = random_crop(rng, wanted, size) if crop == "random" else center_crop(wanted, size)
        wanted = flip(rng, wanted, 0.5)
        got = train_transform(settings, size)(np.random.default_rng(seed), clip)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("family", ["rand-m7-n2-p1-inc1", "scenic-m10-n2"])
@pytest.mark.parametrize("crop", ["random", "center"])
def test_train_transform_augments_full_frames_in_timm_and_cropped_ones_in_scenic(family, crop):
    settings = AugmentSettings(resize=40, crop=crop, flip=0.0, rand_augment=family)
    clip, size, spec = noise(2, 48, 60, 3), (32, 24), parse_rand_augment(family)
    for seed in range(8):
        rng, wanted = np.random.default_rng(seed), resize(clip, 40, 50)
        if family.startswith("rand"):
            wanted = rand_augment(rng, wanted, spec)
        cropped = random_crop(rng, wanted, size) if crop == "random" else center_crop(wanted, size)
        wanted = flip(rng, cropped, 0.0)
        if family.startswith("scenic"):
            wanted = rand_augment(rng, wanted, spec)
        got = train_transform(settings, size)(np.random.default_rng(seed), clip)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("crop", ["multi_scale", "random_resized", "random", "center"])
def test_train_transform_keeps_channels_apart(crop, channels):
    clip = noise(2, 40, 50, channels)
    settings = AugmentSettings(resize=36, crop=crop, jitter_scale=(1.0, 1.2))
    transform = train_transform(settings, (24, 24))
    together = transform(np.random.default_rng(5), clip)
    assert together.shape == (2, 24, 24, channels)
    for channel in range(channels):
        alone = transform(np.random.default_rng(5), clip[..., channel : channel + 1])
        np.testing.assert_array_equal(together[..., channel : channel + 1], alone)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(crop="middle"), r"augment\.crop is 'middle', expected one of"),
        (dict(resize=0), r"augment\.resize is 0"),
        (dict(flip=1.5), r"augment\.flip is 1\.5, expected a probability"),
        (dict(crop_scale=(0.5, 2.0)), r"augment\.crop_scale is \(0\.5, 2\.0\), .* at most 1"),
        (dict(crop_ratio=(2.0, 1.0)), r"augment\.crop_ratio is \(2\.0, 1\.0\)"),
        (dict(jitter_scale=(0.0, 1.0)), r"augment\.jitter_scale is \(0\.0, 1\.0\)"),
        (dict(rand_augment="m9"), r"rand_augment is 'm9', expected 'rand-m"),
    ],
    ids=str,
)
def test_train_transform_names_a_setting_that_is_wrong(fields, message):
    with pytest.raises(UserError, match=message):
        train_transform(AugmentSettings(**fields), (8, 8))


def test_clips_that_cannot_be_augmented_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"a clip is float32 \[2, 9, 9, 3\], expected uint8"):
        train_transform(AugmentSettings(), (8, 8))(rng, np.zeros((2, 9, 9, 3), np.float32))
    with pytest.raises(UserError, match=r"frames of 9 x 7 pixels .* crop of 8 x 8: raise resize"):
        random_crop(rng, noise(2, 9, 7, 3), (8, 8))
    with pytest.raises(UserError, match="count is 0"):
        three_crops(noise(2, 9, 9, 3), (8, 8), 0)
    with pytest.raises(UserError, match="rounding is 'up'"):
        three_crops(noise(2, 9, 9, 3), (8, 8), 3, "up")

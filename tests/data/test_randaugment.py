# SPDX-License-Identifier: Apache-2.0
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vivit_jax.data.transforms import randaugment
from vivit_jax.data.transforms.geometric_ops import geometric
from vivit_jax.data.transforms.image_ops import apply_scenic, apply_timm
from vivit_jax.data.transforms.randaugment import (
    SCENIC_OPERATIONS,
    TIMM_OPERATIONS,
    RandAugment,
    apply_operations,
    draw_operations,
    parse_rand_augment,
    rand_augment,
    scenic_argument,
    timm_argument,
)
from vivit_jax.errors import UserError


def smooth_clip(frames=2, height=40, width=56, seed=0):
    """Frames with edges and slopes that do not use the whole range; each differs."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(20, 220, (frames, 5, 7, 3), np.uint8)
    large = [Image.fromarray(f).resize((width, height), Image.Resampling.BILINEAR) for f in rough]
    clip = np.stack(large)
    clip[:, 10:20, 10:20] = (230, 30, 128)
    return clip


def by_hand(image, name, argument):
    """One frame through Pillow, operation by operation."""
    w, h = image.size
    geometric = {"resample": Image.Resampling.BICUBIC, "fillcolor": (128, 128, 128)}
    affine = Image.Transform.AFFINE
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Posterize":
            return ImageOps.posterize(image, argument) if argument else Image.new("RGB", (w, h))
        case "Solarize":
            return ImageOps.solarize(image, argument)
        case "SolarizeAdd":
            return image.point([min(v + argument, 255) if v < 128 else v for v in range(256)] * 3)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return getattr(ImageEnhance, name)(image).enhance(argument)
        case "Rotate":
            return image.rotate(argument, **geometric)
        case "ShearX":
            return image.transform((w, h), affine, (1, argument, 0, 0, 1, 0), **geometric)
        case "ShearY":
            return image.transform((w, h), affine, (1, 0, 0, argument, 1, 0), **geometric)
        case "TranslateX":
            return image.transform((w, h), affine, (1, 0, argument * w, 0, 1, 0), **geometric)
        case "TranslateY":
            return image.transform((w, h), affine, (1, 0, 0, 0, 1, argument * h), **geometric)
    raise AssertionError(name)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0, 3.3, 7, 10])
@pytest.mark.parametrize("name", TIMM_OPERATIONS)
def test_each_operation_is_pillows_on_each_frame(name, level, sign):
    clip = smooth_clip()
    argument = timm_argument(name, level, sign, increasing=True)
    wanted = np.stack([by_hand(Image.fromarray(frame), name, argument) for frame in clip])
    changed = apply_timm(clip, name, argument)
    assert changed.dtype == np.uint8
    np.testing.assert_array_equal(changed, wanted)


@pytest.mark.parametrize("box", [(0, 0, 40, 56), (7, 0, 21, 30), (13, 19, 27, 37)], ids=str)
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_a_part_of_moved_frames_is_cut_out_of_pillows(name, box):
    clip = smooth_clip()
    top, left, height, width = box
    # Some move all out of the box; 0.25 and 0.5 move by whole pixels.
    for argument in (0, 0.25, -0.5, 0.217, -0.0613, 0.9, -1.2, 1 / 3):
        argument *= 90 if name == "Rotate" else 1
        wanted = np.stack([by_hand(Image.fromarray(frame), name, argument) for frame in clip])
        part = geometric(clip, name, argument, box)
        np.testing.assert_array_equal(part, wanted[:, top : top + height, left : left + width])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (101, 77)], ids=str)
def test_the_middle_of_a_rotation_is_pillows(size):
    """Its source is a pixel's centre, so any other rounding would take a level off."""
    height, width = size
    clip = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    for degrees in (-18.537211341228026, 5.655575775373968, -24.559795545642476, 21.1):
        wanted = np.asarray(by_hand(Image.fromarray(clip[0]), "Rotate", degrees))
        top, left = height // 2, width // 2
        part = geometric(clip, "Rotate", degrees, (top, left, height - top, width - left))
        np.testing.assert_array_equal(part[0], wanted[top:, left:])


def test_a_step_between_pixels_that_rounding_makes_is_pillows():
    """Neighbours of a row come from as many pixels away, unless a sum is rounded otherwise."""
    clip = smooth_clip(height=30, width=300)
    argument = 10 * (1 - 1e-15) / 300
    wanted = by_hand(Image.fromarray(clip[0]), "TranslateX", argument)
    np.testing.assert_array_equal(apply_timm(clip, "TranslateX", argument)[0], wanted)


def test_what_a_box_shows_of_operations_is_that_of_whole_frames():
    spec, clip = parse_rand_augment("rand-m7-n4-mstd0.5-inc1"), smooth_clip()
    seen = Counter()
    for seed in range(150):
        operations = draw_operations(np.random.default_rng(seed), spec)
        seen.update(name for name, _ in operations)
        top, left = seed % 17, seed % 29
        height, width = 1 + seed % (40 - top), 2 + seed % (55 - left)
        shown = apply_operations(clip, operations, (top, left, height, width))
        for frame, part in zip(clip, shown, strict=True):
            image = Image.fromarray(frame)
            for name, argument in operations:
                image = by_hand(image, name, argument)
            whole = np.asarray(image)
            np.testing.assert_array_equal(
                part, whole[top : top + height, left : left + width], err_msg=str(operations)
            )
    assert seen.keys() == set(TIMM_OPERATIONS)


def test_operations_go_the_way_their_names_say():
    clip = np.zeros((1, 21, 21, 3), np.uint8)
    clip[0, 10, 15] = 255

    def spot(changed):
        return np.argwhere(changed[0, ..., 0] > 250).tolist()

    assert spot(apply_timm(clip, "TranslateX", 5 / 21)) == [[10, 10]]
    assert spot(apply_timm(clip, "TranslateY", -5 / 21)) == [[15, 15]]
    assert (apply_timm(clip, "TranslateX", 5 / 21)[0, :, -5:] == 128).all()
    assert spot(apply_timm(clip, "Rotate", 90)) == [[5, 10]]  # against the clock


# By hand, from the ranges of the papers' code: 30 degrees at magnitude 10, and so on.
TIMM_LEVELS = {  # increasing: at 0, 7 and 10; not increasing: the same
    "Rotate": ([0, 21, 30], [0, 21, 30]),
    "Posterize": ([4, 2, 0], [0, 2, 4]),
    "Solarize": ([256, 77, 0], [0, 179, 256]),
    "SolarizeAdd": ([0, 77, 110], [0, 77, 110]),
    "Color": ([1, 1.63, 1.9], [0.1, 1.36, 1.9]),
    "Contrast": ([1, 1.63, 1.9], [0.1, 1.36, 1.9]),
    "Brightness": ([1, 1.63, 1.9], [0.1, 1.36, 1.9]),
    "Sharpness": ([1, 1.63, 1.9], [0.1, 1.36, 1.9]),
    "ShearX": ([0, 0.21, 0.3], [0, 0.21, 0.3]),
    "ShearY": ([0, 0.21, 0.3], [0, 0.21, 0.3]),
    "TranslateX": ([0, 0.315, 0.45], [0, 0.315, 0.45]),
    "TranslateY": ([0, 0.315, 0.45], [0, 0.315, 0.45]),
}


@pytest.mark.parametrize("name", TIMM_OPERATIONS)
def test_timm_levels(name):
    for increasing in (True, False):
        wanted = TIMM_LEVELS.get(name, ([0] * 3, [0] * 3))[0 if increasing else 1]
        got = [timm_argument(name, level, 1, increasing) for level in (0, 7, 10)]
        assert got == pytest.approx(wanted)


def test_timm_signs_turn_directions_and_factors_but_no_amounts():
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        assert timm_argument(name, 7, -1, True) == -timm_argument(name, 7, 1, True)
    assert timm_argument("Color", 7, -1, True) == pytest.approx(0.37)
    for name in ("Posterize", "Solarize", "SolarizeAdd"):
        assert timm_argument(name, 7, -1, True) == timm_argument(name, 7, 1, True)
    assert timm_argument("Color", 7, -1, False) == timm_argument("Color", 7, 1, False)


SCENIC_LEVELS = {  # at magnitudes 0, 7, 10, 15 (Epic Kitchens) and 20 (Something-Something)
    "Posterize": [0, 2, 4, 6, 8],
    "Solarize": [0, 179, 256, 384, 512],
    "SolarizeAdd": [0, 77, 110, 165, 220],
    "Cutout": [0, 28, 40, 60, 80],
    "Color": [0.1, 1.36, 1.9, 2.8, 3.7],
    "Contrast": [0.1, 1.36, 1.9, 2.8, 3.7],
    "Brightness": [0.1, 1.36, 1.9, 2.8, 3.7],
    "Sharpness": [0.1, 1.36, 1.9, 2.8, 3.7],
}


@pytest.mark.parametrize("name", SCENIC_OPERATIONS)
def test_scenic_levels_go_on_beyond_10(name):
    got = [scenic_argument(name, magnitude) for magnitude in (0, 7, 10, 15, 20)]
    wanted = SCENIC_LEVELS.get(name, [0] * 5)
    assert got == pytest.approx(wanted)


def only(monkeypatch, family, name):
    """Makes `name` the only operation of a family."""
    monkeypatch.setattr(randaugment, f"{family.upper()}_OPERATIONS", (name,))


def scenic_once(monkeypatch, name, clip, magnitude, seed=0):
    """Applies `name` of the scenic family, drawing until it is not the identity."""
    only(monkeypatch, "scenic", name)
    while np.random.default_rng(seed).integers(2) == 1:
        seed += 1
    spec = RandAugment(family="scenic", layers=1, magnitude=magnitude)
    return rand_augment(np.random.default_rng(seed), clip, spec)


# Results of scenic's operations on `tensorflow_clip()` in TensorFlow 2.21, by name and magnitude.
TENSORFLOW = {
    ("AutoContrast", 7): (
        "005cc92280ee44a50266c92688ed4aaa006ecc2492ee48b6106dda"
        "3291fe54b61376da3798fe5bba117fdc35a3fe59c7207eeb42a200"
    ),
    ("Posterize", 2): (
        "000080008080008000008000808000800000800080800080000080"
        "008080008000008000808000800000800080800080008080008000"
    ),
    ("Posterize", 15): (
        "0460bc2480dc44a00c64c02c84e04ca4106cc4308ce450ac1470cc"
        "3490ec54b01874d03894f058b42078d44098f460b82480d844a008"
    ),
    ("Posterize", 20): (
        "0762bd2782dd47a20c67c22c87e24ca7116cc7318ce751ac1671cc"
        "3691ec56b11b76d13b96f15bb6207bd6409bf660bb2580db45a00a"
    ),
    ("Posterize", 25): (
        "000080008080008000008000808000800000800080800080000080"
        "008080008000008000808000800000800080800080008080008000"
    ),
    ("Solarize", 7): (
        "07624227822247a20c673d2c871d4ca7116c38318c1851ac167133"
        "36911356b11b762e3b960e5b49207b29409b09604425802445a00a"
    ),
    ("Solarize", 10): (
        "f89d42d87d22b85df3983dd3781db358ee9338ce7318ae53e98e33"
        "c96e13a94ee4892ec4690ea449df8429bf64099f44da7f24ba5ff5"
    ),
    ("Solarize", 15): (
        "076242277d22475d0c673d2c781d4c58116c383173185153167133"
        "366e13564e1b762e3b690e5b49207b294064096044257f24455f0a"
    ),
    ("Solarize", 20): (
        "f89d42d87d22b85df3983dd3781db358ee9338ce7318ae53e98e33"
        "c96e13a94ee4892ec4690ea449df8429bf64099f44da7f24ba5ff5"
    ),
    ("SolarizeAdd", 15): (
        "acffbdcc82ddeca2b1ffc2d187e2f1a7b6ffc7d68ce7f6acbbffcc"
        "db91ecfbb1c0ffd1e096f1ffb6c5ffd6e59bf6ffbbca80dbeaa0af"
    ),
    ("Color", 7): (
        "0068e30c88ff36b20056d20676f125c90078e91d98ff3db80077f2"
        "1b97ff45c10065e01485ff34d80c87f82ca7ff4cc70a86ff34b000"
    ),
    ("Color", 20): (
        "008fff00afff00ff0000ff0008ff00ff00cdff00edff00ff009eff"
        "00beff00ff0000ff0017ff00ff00dcff00fcff00ff00adff00ff00"
    ),
    ("Contrast", 20): (
        "19ffff90ffffffff2cffffa2ffffffff3effffb5ffffffff51ffff"
        "c7ffffffff63ffffdaffffffff76ffffecffffffff88ffffffff25"
    ),
    ("Brightness", 7): (
        "0985ff35b0ff60dc108cff3bb7ff67e31792ff42beff6ee91d99ff"
        "49c5ff74f024a0ff50ccff7bf72ba7ff57d2ff82fe32aeff5dd90d"
    ),
    ("Sharpness", 1): (
        "0762bd2782dd47a20c67c22c79ac66a7116cc7318cb16b901671cc"
        "3691ec70955076d13b96f15b9a557bd6409bf660bb2580db45a00a"
    ),
    ("Sharpness", 15): (
        "0762bd2782dd47a20c67c22ca9ff09a7116cc7318cff0ef01671cc"
        "3691ec13f50076d13b96f15bfa007bd6409bf660bb2580db45a00a"
    ),
    ("Sharpness", 20): (
        "0762bd2782dd47a20c67c22cbaff00a7116cc7318cff00ff1671cc"
        "3691ec00ff0076d13b96f15bff007bd6409bf660bb2580db45a00a"
    ),
}


def tensorflow_clip():
    """Two frames of 3 x 3, for which no sum of Sharpness is a whole level."""
    return (np.arange(54) * 91 % 241 + 7).astype(np.uint8).reshape(2, 3, 3, 3)


@pytest.mark.parametrize(("name", "magnitude"), TENSORFLOW)
def test_scenic_operations_are_those_of_tensorflow(monkeypatch, name, magnitude):
    changed = scenic_once(monkeypatch, name, tensorflow_clip(), magnitude)
    wanted = np.frombuffer(bytes.fromhex(TENSORFLOW[name, magnitude]), np.uint8)
    np.testing.assert_array_equal(changed, wanted.reshape(changed.shape))


@pytest.mark.parametrize("magnitude", [7, 15, 20])
@pytest.mark.parametrize("name", ["Equalize", "Invert", "SolarizeAdd", "Brightness"])
def test_scenic_operations_are_pillows_on_all_frames_as_one_tall_image(
    monkeypatch, name, magnitude
):
    clip = smooth_clip(3)
    clip[1] //= 2  # so that equalising each frame by itself differs
    argument = scenic_argument(name, magnitude)
    wanted = np.asarray(by_hand(Image.fromarray(clip.reshape(-1, 56, 3)), name, argument))
    changed = scenic_once(monkeypatch, name, clip, magnitude)
    np.testing.assert_array_equal(changed, wanted.reshape(clip.shape))


@pytest.mark.parametrize(("magnitude", "threshold"), [(7, 179), (10, 0), (15, 128), (20, 0)])
def test_scenic_s_threshold_wraps_as_a_byte(monkeypatch, magnitude, threshold):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    changed = scenic_once(monkeypatch, "Solarize", levels, magnitude)
    wanted = [level if level < threshold else 255 - level for level in range(256)]
    assert changed[..., 1].ravel().tolist() == wanted


@pytest.mark.parametrize("bits", range(-3, 12))
def test_scenic_s_bits_beyond_a_byte_leave_one(bits):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    kept = bits if 1 <= bits <= 8 else 1
    wanted = [level - level % 2 ** (8 - kept) for level in range(256)]
    assert apply_scenic(levels, "Posterize", bits)[..., 0].ravel().tolist() == wanted


@pytest.mark.parametrize("magnitude", [2, 7, 15, 20])
def test_scenic_s_sharpness_filters_one_tall_image(monkeypatch, magnitude):
    clip = smooth_clip(3, 9, 11)
    tall, factor = clip.reshape(27, 11, 3).astype(int), scenic_argument("Sharpness", magnitude)
    smooth = tall.copy()
    for row in range(1, 26):
        for column in range(1, 10):
            square = tall[row - 1 : row + 2, column - 1 : column + 2].sum((0, 1))
            smooth[row, column] = (square + 4 * tall[row, column]) // 13
    wanted = np.clip(smooth + factor * (tall - smooth), 0, 255).reshape(clip.shape)
    changed = scenic_once(monkeypatch, "Sharpness", clip, magnitude)
    assert np.abs(changed + 0.5 - wanted).max() <= 0.5 + 1e-4
    met = np.stack([changed[0, -1, 1:-1], changed[1, 0, 1:-1]])  # where two frames meet
    assert (met != np.stack([clip[0, -1, 1:-1], clip[1, 0, 1:-1]])).any()


def test_scenic_s_autocontrast_and_colour_are_pillows_to_what_they_cut_off(monkeypatch):
    """Pillow rounds its grey, and its curve in float64."""
    clip = smooth_clip(3)
    clip[1] //= 2
    tall = Image.fromarray(clip.reshape(-1, 56, 3))
    for name, magnitude, most in (("AutoContrast", 7, 1), ("Color", 7, 1), ("Color", 20, 3)):
        wanted = np.asarray(by_hand(tall, name, scenic_argument(name, magnitude)))
        changed = scenic_once(monkeypatch, name, clip, magnitude)
        assert np.abs(changed - wanted.reshape(clip.shape).astype(int)).max() <= most


@pytest.mark.parametrize("name", [n for n in SCENIC_OPERATIONS if n != "Cutout"])
def test_scenic_operations_take_frames_of_a_pixel_and_leave_theirs_alone(name):
    for shape in ((1, 1, 1, 3), (3, 1, 2, 3), (2, 2, 5, 3)):
        clip = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        before = clip.copy()
        changed = apply_scenic(clip, name, scenic_argument(name, 20))
        assert changed.shape == shape and changed.dtype == np.uint8
        np.testing.assert_array_equal(clip, before)


@pytest.mark.parametrize(("shape", "grey"), [((2, 48, 85), 31), ((1, 256, 260), 255)])
def test_scenic_contrast_moves_away_from_the_number_of_pixels_over_256(monkeypatch, shape, grey):
    assert min(math.prod(shape) // 256, 255) == grey
    clip = smooth_clip(*shape)
    wanted = np.clip(grey + 3.7 * (clip.astype(np.float64) - grey), 0, 255)
    changed = scenic_once(monkeypatch, "Contrast", clip, 20)
    assert np.abs(changed + 0.5 - wanted).max() <= 0.5 + 1e-4


def test_cutout_blackens_one_square_alike_in_all_frames(monkeypatch):
    clip = np.full((3, 70, 90, 3), 200, np.uint8)
    centres, sizes = [], Counter()
    for seed in range(200):
        black = scenic_once(monkeypatch, "Cutout", clip, 5, seed) == 0  # 20 to each side
        assert (black == black[:1, :, :, :1]).all()
        rows, columns = black[0, :, :, 0].any(1).nonzero()[0], black[0, :, :, 0].any(0).nonzero()[0]
        assert black[0, :, :, 0].sum() == len(rows) * len(columns)
        # Near the edges a part is clipped: the centre lies 20 after the start or before the end.
        centres.append(rows[0] + 20 if rows[0] else rows[-1] + 1 - 20)
        sizes[len(rows), len(columns)] += 1
    assert min(centres) < 10 and max(centres) > 60
    assert max(sizes) == (40, 40) and min(rows for rows, _ in sizes) < 28


def counted(spec, draws, seed=0):
    """How often each operation is applied in `draws` clips, and all arguments."""
    rng = np.random.default_rng(seed)
    drawn = [operation for _ in range(draws) for operation in draw_operations(rng, spec)]
    return Counter(name for name, _ in drawn), [argument for _, argument in drawn]


def test_timm_draws_its_operations_evenly_and_applies_half():
    spec = parse_rand_augment("rand-m7-n4-mstd0.5-inc1")
    names, _ = counted(spec, 3000)
    mean = 3000 * 4 * 0.5 / 15
    assert names.keys() == set(TIMM_OPERATIONS)
    assert max(abs(count - mean) for count in names.values()) < 5 * math.sqrt(mean)


def test_scenic_draws_its_operations_and_nothing_evenly_and_applies_all(monkeypatch):
    names = Counter()
    monkeypatch.setattr(
        randaugment, "_apply_scenic", lambda rng, clip, name, _: names.update([name]) or clip
    )
    spec, rng = parse_rand_augment("scenic-m15-n2"), np.random.default_rng(0)
    for _ in range(3000):
        rand_augment(rng, np.zeros((1, 2, 2, 3), np.uint8), spec)
    assert names.keys() == set(SCENIC_OPERATIONS)
    mean = 3000 * 2 / 12
    assert abs(names.total() - 11 * mean) < 5 * math.sqrt(mean)
    assert max(abs(count - mean) for count in names.values()) < 5 * math.sqrt(mean)


def test_timm_magnitudes_are_normal_with_random_signs_and_clipped_at_10(monkeypatch):
    only(monkeypatch, "timm", "Rotate")
    spec = RandAugment(family="timm", layers=1, magnitude=7, std=0.5, probability=1)
    _, degrees = counted(spec, 2000)
    levels = np.abs(degrees) / 3
    assert len(degrees) == 2000
    np.testing.assert_allclose([levels.mean(), levels.std()], [7, 0.5], atol=0.05)
    assert abs(np.sign(degrees).mean()) < 0.1
    _, strong = counted(parse_rand_augment("rand-m9-n1-mstd3-p1"), 500)
    assert np.abs(strong).max() == 30
    _, fixed = counted(parse_rand_augment("rand-m9-n1-p1"), 50)
    assert set(fixed) == {27.0, -27.0}


@pytest.mark.parametrize("text", ["rand-m9-n2-mstd0.5-inc1-p1", "scenic-m15-n2"])
def test_equal_frames_stay_equal_and_draws_depend_on_the_seed_alone(text):
    spec = parse_rand_augment(text)
    clip = np.repeat(smooth_clip(1), 3, axis=0)
    before, results = clip.copy(), []
    for seed in range(30):
        result = rand_augment(np.random.default_rng(seed), clip, spec)
        assert result.shape == clip.shape and result.dtype == np.uint8
        # Scenic's Sharpness, twice here, mixes the rows in which one frame meets the next.
        inside = result[:, 2:-2] if text.startswith("scenic") else result
        np.testing.assert_array_equal(inside, np.repeat(inside[:1], 3, axis=0))
        again = rand_augment(np.random.default_rng(seed), clip, spec)
        np.testing.assert_array_equal(result, again)
        results.append(result.tobytes())
    assert len(set(results)) > 12  # some draws change nothing
    np.testing.assert_array_equal(clip, before)


def test_each_layer_works_on_the_result_of_the_one_before(monkeypatch):
    only(monkeypatch, "timm", "Invert")
    clip = smooth_clip()
    for layers in (1, 2, 3):
        spec = RandAugment(family="timm", layers=layers, magnitude=5, probability=1)
        changed = rand_augment(np.random.default_rng(0), clip, spec)
        np.testing.assert_array_equal(changed, 255 - clip if layers % 2 else clip)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (
            "rand-m7-n4-mstd0.5-inc1",
            dict(family="timm", magnitude=7, layers=4, std=0.5, increasing=True),
        ),
        ("rand-n2-m9", dict(family="timm", magnitude=9, layers=2)),
        ("rand-m6.5-n1-p1-inc0", dict(family="timm", magnitude=6.5, layers=1, probability=1)),
        ("scenic-m20-n2", dict(family="scenic", magnitude=20, layers=2)),
    ],
)
def test_parse_rand_augment(text, fields):
    assert parse_rand_augment(text) == RandAugment(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augmix-m3", "rand_augment is 'augmix-m3', expected 'rand-m.*'scenic-m"),
        ("rand-m7-n4-w0", "in which 'w0' is unknown .* expected 'rand-m"),
        ("rand-m7-m8-n4", "in which 'm8' is unknown or repeated"),
        ("rand-m7-n4-inc2", "in which 'inc2' is unknown"),
        ("rand-m7-n4.5", r"in which 'n4\.5' is unknown"),
        ("rand-m7", "'rand-m7' without layers"),
        ("scenic-n2", "without magnitude: expected 'scenic-m"),
        ("scenic-m20-n2-inc1", "in which 'inc1' is unknown .* 'scenic-m20-n2'"),
        ("scenic-m20-n0", "'scenic-m20-n0': layers of RandAugment is 0, expected at least 1"),
        ("rand-m7-n4-p3", r"probability of RandAugment is 3\.0, expected 0 to 1"),
        ("", "rand_augment is ''"),
    ],
)
def test_parse_rand_augment_names_what_is_wrong(text, message):
    with pytest.raises(UserError, match=message):
        parse_rand_augment(text)


def test_a_family_that_does_not_exist():
    with pytest.raises(UserError, match="family is 'torch', expected one of"):
        RandAugment(family="torch", layers=1, magnitude=1)


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 8, 8, 4), (8, 8, 3)])
def test_clips_that_are_not_rgb(shape):
    with pytest.raises(UserError, match="needs RGB frames; set augment.rand_augment to None"):
        spec = parse_rand_augment("scenic-m5-n1")
        rand_augment(np.random.default_rng(0), np.zeros(shape, np.uint8), spec)

# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device against loops over pixels, given the same draws."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vivit_jax import UserError
from vivit_jax.data.settings import AugmentSettings
from vivit_jax.layers.dropout import clip_keys
from vivit_jax.models.losses import multi_head_loss
from vivit_jax.train.augment_on_device import (
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour_jitter,
    draw_colours,
    draw_erased,
    draw_mixing,
    mix,
    random_erasing,
    soft_targets,
)

MANY = 4000  # draws; the standard deviation of a share of them is 0.008 at most
SIZE = (12, 10)
VIDEOMAE = AugmentSettings(mixup=0.8, cutmix=1.0, mix_group=4)


def keys(count, seed=0):
    return clip_keys(jax.random.key(seed), np.arange(count))


def clips(count=4, frames=2, size=SIZE, seed=0, low=0.0, high=1.0):
    shape = (count, frames, *size, 3)
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def numpy_of(tree):
    return jax.tree.map(np.asarray, tree)


# Each as one program: their operations one by one take several times as long to compile.
adjust_contrast, adjust_hue, adjust_saturation = map(
    jax.jit, (adjust_contrast, adjust_hue, adjust_saturation)
)
draw_colours = jax.jit(draw_colours, static_argnums=(1, 2))
draw_erased = jax.jit(draw_erased, static_argnums=(1, 2), static_argnames=("area", "aspect"))
draw_mixing = jax.jit(draw_mixing, static_argnums=(1, 2))
mix_by_operation, mix = mix, jax.jit(mix, static_argnames="settings")
soft_targets = jax.jit(soft_targets, static_argnames=("classes", "smoothing", "class_splits"))
jitter = jax.jit(colour_jitter, static_argnums=(2, 3))
erase = jax.jit(random_erasing, static_argnums=2)


# ---- colours


def per_pixel(function, pixels):
    flat = [function(*map(float, pixel)) for pixel in pixels.reshape(-1, 3)]
    return np.array(flat).reshape(pixels.shape)


def saturated(r, g, b, factor):
    h, s, v = colorsys.rgb_to_hsv(r, g, b)
    return colorsys.hsv_to_rgb(h, min(max(s * factor, 0), 1) if v > 0 else 0, v)


def turned(r, g, b, delta):
    h, s, v = colorsys.rgb_to_hsv(r, g, b)
    return colorsys.hsv_to_rgb((h + delta) % 1, s, v)


# Brightness leaves values below 0 and above 1.
PIXELS = np.concatenate(
    [
        clips(1, low=-0.12, high=1.12).reshape(-1, 3),
        [[0, 0, 0], [1, 1, 1], [0.3, 0.3, 0.3], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.7, 0.7]],
        [[-0.1, -0.1, -0.1], [-0.3, -0.1, -0.2], [0.5, 0.5, 0.1], [1.1, -0.1, 0.5]],
    ]
).astype(np.float32)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
def test_saturation_is_that_of_hsv(factor):
    expected = per_pixel(functools.partial(saturated, factor=factor), PIXELS)
    np.testing.assert_allclose(adjust_saturation(PIXELS, factor), expected, atol=1e-6)


@pytest.mark.parametrize("delta", [-0.2, 0.0, 0.13, 0.5, 1.0])
def test_hue_is_that_of_hsv(delta):
    expected = per_pixel(functools.partial(turned, delta=delta), PIXELS)
    np.testing.assert_allclose(adjust_hue(PIXELS, delta), expected, atol=2e-6)


def test_contrast_is_about_the_mean_of_each_frame_and_channel():
    pixels = clips(2)
    out = np.asarray(adjust_contrast(pixels, 1.3))
    for i in np.ndindex(2, 2):
        for c in range(3):
            mean = pixels[i][..., c].mean(dtype=np.float64)
            expected = (pixels[i][..., c] - mean) * 1.3 + mean
            np.testing.assert_allclose(out[i][..., c], expected, atol=1e-6)


def test_colours_change_as_drawn_and_alike_in_all_frames():
    pixels = clips(12, size=(3, 4))
    pixels[:, 1] = pixels[:, 0]
    drawn = numpy_of(draw_colours(keys(12), 0.5, 0.4))
    kinds = {(bool(a), bool(b)) for a, b in zip(drawn.jittered, drawn.grey, strict=True)}
    assert len(kinds) == 4  # every pair of coins occurs
    out = np.asarray(jitter(keys(12), pixels, 0.5, 0.4))
    np.testing.assert_array_equal(out[:, 0], out[:, 1])
    for i, x in enumerate(pixels.astype(np.float64)[:, 0]):
        if drawn.jittered[i]:
            x = x + drawn.brightness[i]
            x = per_pixel(functools.partial(saturated, factor=drawn.saturation[i]), x)
            mean = x.mean((0, 1))
            x = (x - mean) * drawn.contrast[i] + mean
            x = per_pixel(functools.partial(turned, delta=drawn.hue[i]), x).clip(0, 1)
        if drawn.grey[i]:
            x = np.repeat(x @ [[0.2989], [0.587], [0.114]], 3, axis=-1)
        np.testing.assert_allclose(out[i, 0], x, atol=1e-5)
    np.testing.assert_array_equal(jitter(keys(12), pixels, 0.0, 0.0), pixels)


def test_colours_are_drawn_from_scenics_ranges():
    drawn = numpy_of(draw_colours(keys(MANY), 0.8, 0.1))
    ranges = dict(
        brightness=(-32 / 255, 32 / 255),
        saturation=(0.6, 1.4),
        contrast=(0.6, 1.4),
        hue=(-0.2, 0.2),
    )
    for name, (low, high) in ranges.items():
        values = getattr(drawn, name)
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert abs(drawn.jittered.mean() - 0.8) < 0.03 and abs(drawn.grey.mean() - 0.1) < 0.025
    both = drawn.jittered & drawn.grey
    assert abs(both.mean() - 0.08) < 0.025  # the coins are independent
    correlations = np.corrcoef(np.stack([getattr(drawn, name) for name in ranges]))
    assert np.abs(correlations - np.eye(4)).max() < 0.08


def test_colours_need_rgb():
    with pytest.raises(UserError, match=r"takes RGB clips .* got \(1, 2, 4, 4, 1\)"):
        colour_jitter(keys(1), jnp.zeros((1, 2, 4, 4, 1)), 0.8)


# ---- random erasing


def test_one_box_of_each_chosen_clip_becomes_noise():
    pixels = clips(48, low=50, high=51)  # noise never looks like these
    box = numpy_of(draw_erased(keys(48), SIZE, 0.5))
    out = np.asarray(erase(keys(48), pixels, 0.5))
    chosen, values = 0, []
    for i in range(48):
        changed = (out[i] != pixels[i]).all(-1)
        expected = np.zeros(SIZE, bool)
        expected[box.top[i] : box.bottom[i], box.left[i] : box.right[i]] = True
        np.testing.assert_array_equal(changed, np.broadcast_to(expected, changed.shape))
        np.testing.assert_array_equal(out[i][~changed], pixels[i][~changed])
        chosen += expected.any()
        values.append(out[i][changed].reshape(2, -1))  # [frames, values]
    assert 12 < chosen < 36
    first, second = np.concatenate(values, axis=1)
    for noise in (first, second):
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1  # each frame has its own noise
    assert len(np.unique(np.concatenate([first, second]))) > 0.99 * 2 * len(first)


def test_boxes_are_drawn_as_in_the_papers_code():
    height, width = 40, 24
    rng = np.random.default_rng(0)

    def one():
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if h < height and w < width:
                return h, w, rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        raise AssertionError

    expected = np.array([one() for _ in range(20_000)], float)
    box = numpy_of(draw_erased(keys(MANY), (height, width), 1.0))
    drawn = np.stack([box.bottom - box.top, box.right - box.left, box.top, box.left], 1)
    assert (box.bottom <= height).all() and (box.right <= width).all() and (drawn >= 0).all()
    for values in (lambda x: x, lambda x: x**2, lambda x: x[:, :1] * x[:, 1:2]):
        ours, theirs = values(drawn.astype(float)), values(expected)
        deviation = theirs.std(0) * (1 / MANY + 1 / len(theirs)) ** 0.5
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * deviation).all()
    # Negative control: the same check sees a narrower range of aspects.
    other = numpy_of(draw_erased(keys(MANY), (height, width), 1.0, aspect=(0.5, 2.0)))
    heights = (other.bottom - other.top).astype(float)
    assert abs((heights**2).mean() - (expected[:, 0] ** 2).mean()) > 5 * (
        (expected[:, 0] ** 2).std() * (1 / MANY + 1 / len(expected)) ** 0.5
    )


def test_nothing_is_erased_where_no_box_fits():
    box = draw_erased(keys(MANY), SIZE, 1.0, area=(1.0, 1.0), aspect=(1.0, 1.0001))
    assert not np.asarray(box.mask(*SIZE)).any()


# ---- mixup and cutmix


@functools.cache
def many_mixings(**changes):
    settings = AugmentSettings(**{"mixup": 0.8, "cutmix": 1.0, **changes})
    return numpy_of(draw_mixing(keys(MANY), (40, 24), settings))


def test_clips_and_targets_are_mixed_as_drawn():
    groups, group = 6, 4
    pixels = clips(groups * group)
    labels = np.arange(groups * group) % 7
    targets = soft_targets(labels, 7, 0.1)
    drawn = numpy_of(draw_mixing(keys(groups, seed=3), SIZE, VIDEOMAE))
    assert set(drawn.cut) == {True, False}
    out, out_targets = numpy_of(mix(jax.random.key(3), pixels, targets, VIDEOMAE, np.arange(24)))
    for i in range(groups * group):
        g = i // group
        partner = g * group + group - 1 - i % group
        own = np.full(SIZE, drawn.drawn[g], np.float64)
        if drawn.cut[g]:
            own[:] = 1
            box = [int(edge[g]) for edge in drawn.box]
            own[box[0] : box[1], box[2] : box[3]] = 0
        share = own.mean()
        own = own[None, :, :, None]
        expected = own * pixels[i] + (1 - own) * pixels[partner]
        np.testing.assert_allclose(out[i], expected, atol=1e-6)
        expected = share * np.eye(7)[labels[i]] + (1 - share) * np.eye(7)[labels[partner]]
        np.testing.assert_allclose(out_targets[i], 0.9 * expected + 0.1 / 7, atol=1e-6)


@pytest.mark.slow
def test_shares_have_the_moments_of_their_beta_distributions():
    drawn = many_mixings()
    for cut, alpha in ((False, 0.8), (True, 1.0)):
        shares = drawn.drawn[drawn.cut == cut]
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(shares.mean() - 0.5) < 5 * (variance / len(shares)) ** 0.5
        assert shares.var() == pytest.approx(variance, rel=0.07)
    assert abs(drawn.cut.mean() - 0.5) < 0.04
    few = many_mixings(cutmix=0.0, mixup=0.3, mix_prob=0.25)
    assert not few.cut.any() and abs((few.drawn < 1).mean() - 0.25) < 0.035
    assert few.drawn[few.drawn < 1].var() == pytest.approx(1 / (4 * 1.6), rel=0.1)
    assert abs(many_mixings(mix_switch=0.2).cut.mean() - 0.2) < 0.03
    assert many_mixings(mixup=0.0, mix_switch=0.0).cut.all()  # there is nothing to switch to


def test_boxes_of_cutmix_are_cut_off_at_the_border():
    height, width = 40, 24
    drawn = many_mixings()
    cut = drawn.cut
    box = [edge[cut] for edge in drawn.box]
    for low, high, whole, axis in ((*box[:2], height, 0), (*box[2:], width, 1)):
        full = np.floor(whole * np.sqrt(1 - drawn.drawn[cut])).astype(int) // 2 * 2
        inner = (low > 0) & (high < whole)
        # At whole lengths float32 may round a square root the other way.
        assert (np.abs(high - low - full)[inner] <= 2).all(), axis
        assert (high - low - full)[inner].astype(bool).mean() < 0.01
        assert (high - low <= full + 2).all() and (low >= 0).all() and (high <= whole).all()
        assert ((high - low < full) & ~inner).mean() > 0.2
    area = (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
    np.testing.assert_allclose(drawn.share[cut], 1 - area, atol=1e-6)
    np.testing.assert_array_equal(drawn.share[~cut], drawn.drawn[~cut])
    # By definition, with a centre anywhere in the frame.
    rng = np.random.default_rng(0)
    areas = []
    for share in rng.uniform(size=20_000):
        sides = 1
        for whole in (height, width):
            half, centre = int(whole * (1 - share) ** 0.5) // 2, rng.integers(whole)
            sides *= np.clip(centre + half, 0, whole) - np.clip(centre - half, 0, whole)
        areas.append(sides / (height * width))
    deviation = np.std(areas) * (1 / cut.sum() + 1 / len(areas)) ** 0.5
    assert abs(area.mean() - np.mean(areas)) < 5 * deviation


def test_no_group_size_mixes_the_whole_batch_alike():
    pixels, targets = clips(6), np.eye(6, dtype=np.float32)
    settings = AugmentSettings(mixup=0.8)
    _, out = mix(jax.random.key(0), pixels, targets, settings, np.arange(6))
    out = np.asarray(out)
    share = out[0, 0]
    assert 0 < share < 1
    np.testing.assert_allclose(out, share * targets + (1 - share) * targets[::-1], atol=1e-6)


def test_without_mixing_nothing_changes():
    mix = mix_by_operation  # which returns the arrays themselves
    pixels, targets = clips(3), np.eye(3, dtype=np.float32)
    out = mix(jax.random.key(0), pixels, targets, AugmentSettings(), np.arange(3))
    assert out[0] is pixels and out[1] is targets
    never = AugmentSettings(mixup=1.0, cutmix=1.0, mix_prob=0.0)
    out = mix(jax.random.key(0), pixels[:2], targets[:2], never, np.arange(2))
    np.testing.assert_array_equal(out[0], pixels[:2])
    np.testing.assert_array_equal(out[1], targets[:2])
    out = mix(jax.random.key(0), pixels, targets, never, np.arange(3))  # nor must they be pairs
    assert out[0] is pixels and out[1] is targets


@pytest.mark.parametrize(
    ("count", "group", "message"),
    [
        (3, None, "mix_group=None makes groups of 3 of 3 clips"),
        (6, 3, "mix_group=3 makes groups of 3 of 6 clips"),
        (6, 4, "mix_group=4 makes groups of 4 of 6 clips; a group must be even and divide them"),
    ],
)
def test_groups_that_do_not_fit(count, group, message):
    settings = AugmentSettings(mixup=1.0, mix_group=group)
    with pytest.raises(UserError, match=message):
        mix(jax.random.key(0), clips(count), np.eye(count, dtype="f"), settings, np.arange(count))


def test_labels_cannot_be_mix():
    with pytest.raises(UserError, match="targets of shape .* see soft_targets"):
        mix(jax.random.key(0), clips(4), np.arange(4), VIDEOMAE, np.arange(4))


# ---- parts and devices


def everything(key, pixels, targets, rows):
    colour, erasing, mixing = jax.random.split(key, 3)
    pixels = colour_jitter(clip_keys(colour, rows), pixels, 0.8)
    pixels = random_erasing(clip_keys(erasing, rows), pixels, 0.9)
    return mix(mixing, pixels, targets, VIDEOMAE, rows)


@pytest.mark.slow
def test_a_batch_over_devices_equals_its_parts_on_one():
    """Also for a kind of key that draws differently under vmap, such as this one."""
    augment, key = jax.jit(everything), jax.random.key(5, impl="rbg")
    batch = clips(16, size=(6, 5)), np.eye(16, dtype=np.float32), np.arange(16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = augment(key, *jax.device_put(batch, sharding))
    assert len(whole[0].sharding.device_set) == 8
    # Groups that do not follow one another, as where every device splits its own clips.
    for at in (np.r_[0:4, 8:12], np.r_[4:8, 12:16]):
        part = augment(key, *(x[at] for x in batch))
        for all_of_it, piece in zip(whole, part, strict=True):
            np.testing.assert_allclose(np.asarray(all_of_it)[at], piece, atol=2e-6)
    wrong = augment(key, batch[0][at], batch[1][at], np.arange(8))  # negative control
    assert np.abs(wrong[1] - part[1]).max() > 0.01


# ---- targets


def test_soft_targets_are_smoothed_one_hots():
    out = np.asarray(soft_targets(np.array([2, 0]), 4, 0.1))
    assert out.dtype == np.float32
    np.testing.assert_allclose(
        out, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], atol=1e-7
    )
    assert soft_targets(np.array([2, 0]), 4).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_each_head_is_smoothed_by_its_own_classes():
    out = np.asarray(soft_targets(np.array([[1, 0]]), 6, 0.2, class_splits=(4, 2)))
    np.testing.assert_allclose(out, [[0.05, 0.85, 0.05, 0.05, 0.9, 0.1]], atol=1e-7)


@pytest.mark.parametrize("splits", [None, (4, 2)])
def test_smoothing_before_mixing_equals_scenics_after_it(splits):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 6)).astype(np.float32)
    labels = rng.integers(2, size=4) if splits is None else rng.integers(2, size=(4, 2))
    settings = AugmentSettings(mixup=0.3)
    key, pixels = jax.random.key(0), clips(4)
    before, after = (
        mix(key, pixels, soft_targets(labels, 6, smoothing, splits), settings, np.arange(4))[1]
        for smoothing in (0.3, 0.0)
    )
    splits = splits or (6,)
    loss = float(multi_head_loss(logits, before, splits))
    assert loss == pytest.approx(float(multi_head_loss(logits, after, splits, 0.3)), rel=1e-6)
    assert loss != pytest.approx(float(multi_head_loss(logits, after, splits)), rel=1e-3)


def test_a_label_that_is_no_class_gives_nan():
    out = np.asarray(soft_targets(np.array([0, 3, -1, -100]), 3, 0.1))
    assert np.isfinite(out[0]).all() and np.isnan(out[1:]).all()


@pytest.mark.parametrize(
    ("labels", "splits"),
    [(np.zeros((2, 2), int), None), (np.zeros(2, int), (4, 2)), (np.zeros((2, 2), int), (4, 3)),
     (np.zeros(2), None)],
)  # fmt: skip
def test_labels_that_do_not_fit(labels, splits):
    with pytest.raises(UserError, match=r"do not fit 6 classes"):
        soft_targets(labels, 6, 0.0, splits)
    with pytest.raises(UserError, match=r"augment.smoothing must be in \[0, 1\), got 1.0"):
        soft_targets(np.zeros(2, int), 6, 1.0)

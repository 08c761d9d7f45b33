# SPDX-License-Identifier: Apache-2.0
"""What a reconstruction shows and how its errors are computed, against formulas in loops."""

import itertools

import jax
import numpy as np
import pytest
from helpers import random_params
from tiny import VIDEOMAE

import vivit_jax
from vivit_jax import masking
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.inference import reconstruction
from vivit_jax.inference.reconstruction import COLUMNS, ROWS, error_table, reconstruct, rmse
from vivit_jax.models.losses import reconstruction_targets

TUBELET, GRID = (2, 8, 8), (3, 3, 2)
IMAGENET = VideoProcessor.named("videomae-imagenet", do_resize=False, do_center_crop=False)


def make_model(**values):
    values = VIDEOMAE | dict(num_hidden_layers=1, decoder_num_hidden_layers=1) | values
    return vivit_jax.VideoMAEForPreTraining(
        vivit_jax.VideoMAEConfig(**values, use_mean_pooling=False)
    )


@pytest.fixture(scope="module")
def model():
    net = make_model()
    return net, random_params(net)


def make_clips(batch=2, channels=3, seed=0):
    """uint8 with brightness, contrast and detail that differ from patch to patch."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(60, 190, (batch, 3, 3, 2, channels)).repeat(2, 1).repeat(8, 2).repeat(8, 3)
    return np.rint(level + rng.uniform(-50, 50, level.shape)).astype(np.uint8)


def cut(clip, token):
    """Slices of a token's pixels in a clip [t, h, w, c]."""
    place = np.unravel_index(token, GRID)
    return tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, TUBELET, strict=True))


def make_mask(batch=2, ratio=0.7, seed=0):
    return masking.random_mask(np.random.default_rng(seed), batch, GRID, ratio)


def test_patches_are_cut_as_tokens_are_numbered():
    clips = make_clips() / 255
    patches = reconstruction.to_patches(clips, TUBELET)
    for b, token in itertools.product(range(2), range(18)):
        expected = clips[b][cut(clips[b], token)].reshape(-1, 3)
        np.testing.assert_array_equal(patches[b, token], expected)
    np.testing.assert_array_equal(reconstruction.to_clips(patches, clips.shape, TUBELET), clips)


def test_patches_are_a_copy_where_a_view_would_do():
    clip = np.zeros((1, 6, 8, 8, 1))  # tokens follow each other in memory
    reconstruction.to_patches(clip, TUBELET)[:] = 1
    assert not clip.any()


def test_estimates_are_weighted_by_distance_to_visible_patches():
    patches = reconstruction.to_patches(make_clips() / 255, TUBELET)
    hidden = np.asarray(make_mask().to_bool())
    means, stds = reconstruction.estimate_statistics(patches, hidden, GRID)
    for b, token in itertools.product(range(2), range(18)):
        seen = [token] if not hidden[b, token] else np.flatnonzero(~hidden[b])
        total, mean, std = 0.0, 0.0, 0.0
        for other in seen:
            offset = np.subtract(np.unravel_index(token, GRID), np.unravel_index(other, GRID))
            weight = 1.0 if other == token else 1 / np.sqrt(np.sum(offset**2)) ** 3
            values, count = patches[b, other], len(patches[b, other])
            total += weight
            mean += weight * values.sum(0) / count
            spread = ((values - values.sum(0) / count) ** 2).sum(0) / (count - 1)
            std += weight * np.sqrt(spread)
        np.testing.assert_allclose(means[b, token, 0], mean / total, rtol=1e-12)
        np.testing.assert_allclose(stds[b, token, 0], std / total, rtol=1e-12)


def test_the_first_of_equally_near_patches_is_the_nearest():
    hidden = np.ones((1, 18), bool)
    # Frame 1, row 1, column 0 is token 8: one step from 2 (before), 6 (above), 9 (right), 14.
    for seen, nearest in (((14, 9, 6, 2), 2), ((14, 9, 6), 6), ((14, 9), 9), ((14, 5, 0), 14)):
        tokens = hidden.copy()
        tokens[0, list(seen)] = False
        found = reconstruction.nearest_visible(tokens, GRID)[0]
        assert found[8] == nearest
        assert all(found[token] == token for token in seen)


@pytest.mark.parametrize("true_statistics", [False, True])
def test_hidden_patches_are_predictions_with_the_statistics_asked_for(model, true_statistics):
    clips, mask = make_clips(), make_mask()
    pixel_values = IMAGENET(clips)
    result = reconstruct(*model, pixel_values, mask, IMAGENET, true_statistics=true_statistics)
    assert result.statistics == ("true" if true_statistics else "estimated")
    np.testing.assert_allclose(result.original, clips / 255, atol=1e-6)
    net, params = model
    logits = np.asarray(jax.jit(net.apply)({"params": params}, pixel_values, mask).logits)
    patches = reconstruction.to_patches(clips / 255, TUBELET)
    hidden = np.asarray(mask.to_bool())
    estimated = reconstruction.estimate_statistics(patches, hidden, GRID)
    squares = []
    for b in range(2):
        for k, token in enumerate(mask.masked[b]):
            truth = clips[b][cut(clips[b], token)] / 255
            mean, std = truth.mean((0, 1, 2)), truth.std((0, 1, 2), ddof=1)
            if not true_statistics:
                mean, std = (values[b, token, 0] for values in estimated)
            expected = logits[b, k].reshape(2, 8, 8, 3) * std + mean
            shown = result.clips[b][cut(clips[b], token)]
            np.testing.assert_allclose(shown, expected, atol=2e-5)
            squares.append(np.mean((expected - truth) ** 2))
        for token in mask.visible[b]:
            place = (b, *cut(clips[b], token))
            np.testing.assert_array_equal(result.clips[place], result.original[place])
            assert not np.isnan(result.masked_clips[place]).any()
    assert np.isnan(result.masked_clips).mean() == hidden.mean()
    np.testing.assert_array_equal(result.hidden, result.predicted)
    error = rmse([result])[ROWS.index("reconstruction"), int(true_statistics)]
    np.testing.assert_allclose(error, np.sqrt(np.mean(squares)), rtol=1e-4)


def test_both_baselines_know_what_the_column_says(model):
    clips, mask = make_clips(), make_mask()
    errors = rmse([reconstruct(*model, IMAGENET(clips), mask, IMAGENET)])
    patches = reconstruction.to_patches(clips / 255, TUBELET)
    hidden = np.asarray(mask.to_bool())
    estimated, _ = reconstruction.estimate_statistics(patches, hidden, GRID)
    nearest = reconstruction.nearest_visible(hidden, GRID)
    squares = {(row, column): [] for row in ROWS[1:] for column in COLUMNS}
    for b, token in zip(*np.nonzero(hidden), strict=True):
        truth, copy = patches[b, token], patches[b, nearest[b, token]]
        mean, std = truth.mean(0), truth.std(0, ddof=1)
        scaled = (copy - copy.mean(0)) / copy.std(0, ddof=1) * std + mean
        for (row, column), guess in {
            (ROWS[1], COLUMNS[0]): estimated[b, token],
            (ROWS[1], COLUMNS[1]): mean,
            (ROWS[2], COLUMNS[0]): copy,
            (ROWS[2], COLUMNS[1]): scaled,
        }.items():
            squares[row, column].append(np.mean((guess - truth) ** 2))
    for (row, column), values in squares.items():
        found = errors[ROWS.index(row), COLUMNS.index(column)]
        np.testing.assert_allclose(found, np.sqrt(np.mean(values)), rtol=1e-4)


def test_nothing_hidden_shows_unless_asked_for(model):
    """Other hidden pixels, of other mean and variance, leave the default picture as it is."""
    mask = make_mask()
    hidden = np.asarray(mask.to_bool())
    clips = make_clips() / 255
    patches = reconstruction.to_patches(clips, TUBELET)
    rng = np.random.default_rng(1)
    patches[hidden] = rng.uniform(0, 0.3, patches[hidden].shape) ** 2 + 0.6
    changed = reconstruction.to_clips(patches, clips.shape, TUBELET)
    for true_statistics in (False, True):
        first, second = (
            reconstruct(
                *model,
                IMAGENET((255 * x).astype(np.float32)),
                mask,
                IMAGENET,
                true_statistics=true_statistics,
            )
            for x in (clips, changed)
        )
        assert not np.array_equal(first.original, second.original)
        regions = [reconstruction.to_patches(x.clips, TUBELET)[hidden] for x in (first, second)]
        if true_statistics:
            assert (regions[0] != regions[1]).all(axis=1).any(axis=1).all()  # every hidden patch
            assert abs(regions[0].mean((1, 2)) - regions[1].mean((1, 2))).mean() > 0.05
        else:
            np.testing.assert_array_equal(first.clips, second.clips)
            np.testing.assert_array_equal(first.masked_clips, second.masked_clips)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_targets_as_predictions_give_the_clip_back(monkeypatch, norm_pix_loss):
    """A model that predicts its targets exactly, and a processor that is not the config's."""
    statistics = dict(image_mean=(0.1, 0.2, 0.3, 0.4), image_std=(0.5, 0.6, 0.7, 0.8))
    net = make_model(num_channels=4, norm_pix_loss=norm_pix_loss, **statistics)
    clips, mask = make_clips(channels=4), make_mask()
    processor = VideoProcessor.videomae(do_resize=False, do_center_crop=False)
    processor = VideoProcessor.from_dict(
        processor.to_dict(), image_mean=(0.3,) * 4, image_std=(0.2, 0.3, 0.4, 0.5)
    )
    pixel_values = processor(clips)
    targets = reconstruction_targets(pixel_values, mask, net.config)
    monkeypatch.setattr(reconstruction, "_predictions", lambda *_: targets)
    options = dict(true_statistics=norm_pix_loss)
    result = reconstruct(net, None, pixel_values, mask, processor, **options)
    np.testing.assert_allclose(result.clips, clips / 255, atol=2e-6)
    errors = rmse([result])
    assert errors[0, int(norm_pix_loss)] < 2e-6
    assert np.isnan(errors[0, 1]) == (not norm_pix_loss)


@pytest.mark.parametrize("deviation", [1e-6, 1e-5, 1e-4])
def test_nearly_flat_patches_are_denormalised_with_the_epsilon_of_the_targets(
    model, monkeypatch, deviation
):
    """Without it, or with another, they are off by 2e-6 to 4e-6; float32 leaves 6e-8."""
    noise = np.random.default_rng(0).standard_normal((2, 6, 24, 16, 3))
    pixel_values, mask = IMAGENET((127 + 255 * deviation * noise).astype(np.float32)), make_mask()
    targets = reconstruction_targets(pixel_values, mask, model[0].config)
    monkeypatch.setattr(reconstruction, "_predictions", lambda *_: targets)
    result = reconstruct(*model, pixel_values, mask, IMAGENET, true_statistics=True)
    np.testing.assert_allclose(result.clips, result.original, rtol=0, atol=4e-7)


def test_a_flat_visible_patch_has_no_detail_to_copy(model):
    clips, mask = make_clips(), make_mask()
    patches = reconstruction.to_patches(clips, TUBELET)
    patches[~np.asarray(mask.to_bool())] = 90
    pixel_values = IMAGENET(reconstruction.to_clips(patches, clips.shape, TUBELET))
    result = reconstruct(*model, pixel_values, mask, IMAGENET, true_statistics=True)
    _, flat, copied = rmse([result])[:, 1]
    np.testing.assert_allclose(copied, flat, rtol=1e-4)


def test_dual_masks_leave_hidden_patches_unpredicted():
    # A grid of 3x4x2, because a running cell needs even sides.
    net = make_model(image_size=(32, 16))
    params = random_params(net)
    clips = np.concatenate([make_clips(seed=s)[:, :, :16] for s in (0, 1)], axis=2)
    mask = masking.dual_mask(np.random.default_rng(0), 2, (3, 4, 2), 0.5)
    result = reconstruct(net, params, IMAGENET(clips), mask, IMAGENET)
    hidden, decoded = np.asarray(mask.to_bool()), np.zeros((2, 24), bool)
    np.put_along_axis(decoded, np.asarray(mask.decoded), True, axis=1)
    np.testing.assert_array_equal(result.predicted, hidden & decoded)
    assert (hidden & ~decoded).any() and (decoded & ~hidden).any()
    patches = reconstruction.to_patches(result.clips, TUBELET)
    np.testing.assert_array_equal(np.isnan(patches).any((2, 3)), hidden & ~decoded)
    seen = reconstruction.to_patches(result.original, TUBELET)[~hidden]
    np.testing.assert_array_equal(patches[~hidden], seen)
    truth = reconstruction.to_patches(clips / 255, TUBELET)[result.predicted]
    expected = np.sqrt(np.mean((patches[result.predicted] - truth) ** 2))
    np.testing.assert_allclose(rmse([result])[0, 0], expected, rtol=1e-4)


def test_errors_of_several_batches_count_every_patch_once(model):
    clips, masks = make_clips(4), [make_mask(4, ratio) for ratio in (0.5, 0.8)]
    results = [reconstruct(*model, IMAGENET(clips), mask, IMAGENET) for mask in masks]
    parts = [rmse([result]) ** 2 for result in results]
    counts = [mask.masked.size for mask in masks]
    expected = np.sqrt(sum(c * p for c, p in zip(counts, parts, strict=True)) / sum(counts))
    np.testing.assert_allclose(rmse(results), expected, rtol=1e-12)
    taken = results[0].take([2, 0])
    np.testing.assert_array_equal(taken.clips, results[0].clips[[2, 0]])
    np.testing.assert_array_equal(taken.hidden, results[0].hidden[[2, 0]])
    squares = results[0].squared_errors[[0, 2]].mean(0)
    np.testing.assert_allclose(rmse([taken]), np.sqrt(squares), rtol=1e-12)


def test_the_table_has_a_line_per_row_and_no_number_for_what_does_not_exist():
    lines = error_table(np.array([[0.12345, np.nan], [0.2, 0.1], [0.3, 0.25]]))
    assert lines[0].split() == " ".join(COLUMNS).split()
    assert [line[: len(row)] for line, row in zip(lines[1:], ROWS, strict=True)] == list(ROWS)
    assert lines[1].split() == ["reconstruction", "0.1235", "-"]
    assert len(set(map(len, lines))) == 1


def test_what_cannot_be_reconstructed_is_refused(model, monkeypatch):
    net, params = model
    pixel_values, mask = IMAGENET(make_clips()), make_mask()
    encoder = vivit_jax.VideoMAEModel(net.config)
    with pytest.raises(vivit_jax.UserError, match='head="pretraining"'):
        reconstruct(encoder, params["backbone"], pixel_values, mask, IMAGENET)
    raw = make_model(norm_pix_loss=False)
    with pytest.raises(vivit_jax.UserError, match="norm_pix_loss=False.*predicts pixels"):
        reconstruct(raw, params, pixel_values, mask, IMAGENET, true_statistics=True)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    seen = mask.replace(decoded=mask.visible[:, :2])
    one = np.stack([mask.masked[0, :2], mask.visible[1, :2]])  # nothing in the second clip alone
    for decoded in (seen, mask.replace(decoded=one)):
        with pytest.raises(vivit_jax.UserError, match="nothing to reconstruct"):
            reconstruct(net, params, pixel_values, decoded, IMAGENET)
    one_pixel = np.zeros((1, 4, 1, 3))
    with pytest.raises(vivit_jax.UserError, match="no variance"):
        reconstruction.patch_statistics(one_pixel)
    with pytest.raises(vivit_jax.UserError, match="not finite"):
        reconstruct(net, broken, pixel_values, mask, IMAGENET)
    logits = np.zeros((*mask.masked.shape, net.config.patch_values), np.float32)
    logits[1, 2, 3] = np.inf
    monkeypatch.setattr(reconstruction, "_predictions", lambda *_: logits)
    with pytest.raises(vivit_jax.UserError, match="not finite"):
        reconstruct(net, params, pixel_values, mask, IMAGENET)

# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest
from helpers import clip
from tiny import VIDEOMAE

from vivit_jax import (
    Mask,
    UserError,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    dual_mask,
    random_mask,
    running_cell,
    tube_mask,
)
from vivit_jax.masking import cell_patterns

CLIP = (8, 14, 14)  # the tokens of 16 frames of 224 x 224
GENERATORS = (tube_mask, random_mask, dual_mask)


def source(kind, seed=0):
    return jax.random.key(seed) if kind == "jax" else np.random.default_rng(seed)


def draw(function, kind, *args, seed=0):
    """A mask from either kind of randomness, under jit where it is jax's."""
    if kind == "numpy":
        return function(source(kind, seed), *args)
    return jax.jit(function, static_argnums=range(1, 1 + len(args)))(source(kind, seed), *args)


both_kinds = pytest.mark.parametrize("kind", ["jax", "numpy"])


def test_from_bool_keeps_row_major_order():
    mask = Mask.from_bool(np.array([[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]], bool))
    assert mask.visible.tolist() == [[1, 3], [0, 4]]
    assert mask.masked.tolist() == [[0, 2, 4], [1, 2, 3]]
    assert mask.to_bool().tolist() == [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([[1, 1, 0], [1, 0, 0]], bool), r"\[2, 1\] per row"),
        ([[True], [True, False]], "rows of different lengths"),
        (np.array([[1, 0]]), "must be bool .* got int64"),
        (np.array([True, False]), r"\[batch, tokens\], got shape \(2,\)"),
    ],
)
def test_from_bool_errors(mask, message):
    with pytest.raises(UserError, match=message):
        Mask.from_bool(mask)


def test_from_bool_with_a_mask_for_the_decoder():
    hidden = np.array([[1, 0, 1, 0], [1, 1, 0, 0]], bool)
    dropped = np.array([[1, 0, 0, 1], [0, 0, 1, 1]], bool)
    mask = Mask.from_bool(hidden, dropped)
    assert mask.decoded.tolist() == mask.predicted.tolist() == [[1, 2], [0, 1]]
    assert mask.counted.tolist() == [[False, True], [True, True]]
    plain = Mask.from_bool(hidden)
    assert plain.counted is None and plain.predicted is plain.masked
    with pytest.raises(UserError, match=r"decode_masked_pos has shape \(2, 3\), .* \(2, 4\)"):
        Mask.from_bool(hidden, dropped[:, 1:] | True)
    with pytest.raises(UserError, match="decode_masked_pos must be bool"):
        Mask.from_bool(hidden, dropped.astype(int))


def test_from_bool_under_jit_says_why_it_cannot():
    with pytest.raises(UserError, match=r"outside jax\.jit"):
        jax.jit(Mask.from_bool)(np.zeros((1, 4), bool))


@both_kinds
def test_tube_mask_has_the_papers_counts_and_is_a_tube(kind):
    mask = draw(tube_mask, kind, 3, CLIP, 0.9)
    assert mask.visible.shape == (3, 160) and mask.masked.shape == (3, 1408)
    tubes = np.asarray(mask.to_bool()).reshape(3, 8, 196)
    assert (tubes == tubes[:, :1]).all() and (tubes[:, 0].sum(axis=1) == 176).all()
    assert not (tubes[0] == tubes[1]).all()


@both_kinds
def test_random_mask_hides_other_places_in_every_frame(kind):
    mask = draw(random_mask, kind, 3, CLIP, 0.9)
    assert mask.visible.shape == (3, 157) and mask.masked.shape == (3, 1411)
    hidden = np.asarray(mask.to_bool()).reshape(3, 8, 196)
    assert len({frame.tobytes() for frame in hidden.reshape(-1, 196)}) == 24


@both_kinds
@pytest.mark.parametrize("function", GENERATORS)
def test_every_token_is_visible_or_masked(function, kind):
    mask = draw(function, kind, 4, (3, 6, 4), 0.7)
    both = np.sort(np.concatenate([mask.visible, mask.masked], axis=1))
    assert (both == np.arange(72)).all()
    for indices in (mask.visible, mask.masked, mask.predicted):
        assert (np.diff(indices) > 0).all() and indices.dtype == np.int32
        # numpy's stay numpy, so that a loader's workers touch no device.
        assert isinstance(indices, np.ndarray) is (kind == "numpy")
    again = draw(function, kind, 4, (3, 6, 4), 0.7)
    other = draw(function, kind, 4, (3, 6, 4), 0.7, seed=1)
    assert (np.asarray(mask.masked) == np.asarray(again.masked)).all()
    assert not (np.asarray(mask.masked) == np.asarray(other.masked)).all()


# Of 196 places per frame and of 1568 tokens; int() cuts off, as the authors do.
@both_kinds
@pytest.mark.parametrize(
    ("ratio", "tube", "random"),
    [(0.9, 1408, 1411), (0.75, 1176, 1176), (0.95, 1488, 1489), (0.5, 784, 784), (0.01, 8, 15)],
)
def test_counts(kind, ratio, tube, random):
    shapes = [draw(f, kind, 1, CLIP, ratio).masked.shape for f in (tube_mask, random_mask)]
    assert shapes == [(1, tube), (1, random)]


@both_kinds
def test_giants_counts(kind):
    mask = draw(tube_mask, kind, 1, (8, 16, 16), 0.9)  # patches of 14
    assert mask.visible.shape == (1, 208) and mask.masked.shape == (1, 1840)


@both_kinds
@pytest.mark.parametrize("function", [tube_mask, random_mask])
def test_every_position_is_masked_equally_often(function, kind):
    mask = draw(function, kind, 4000, (1, 4, 4), 0.75)
    frequency = np.asarray(mask.to_bool()).mean(axis=0)
    # Binomial standard deviation 0.0068; five of them.
    assert np.abs(frequency - 0.75).max() < 0.035


# Which of each 2x2 are dropped, frame by frame, for the four places to start (recipe: VideoMAE V2).
SEQUENCE = [[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]]


def test_the_sequence_that_starts_at_place_0():
    kept = cell_patterns((4, 2, 2), dropped=2)[0]
    dropped = ~np.isin(np.arange(16), kept).reshape(4, 2, 2)
    assert dropped.astype(int).tolist() == SEQUENCE


@both_kinds
def test_running_cell_runs_through_the_papers_sequence(kind):
    kept = np.asarray(draw(running_cell, kind, 64, (6, 4, 8), 0.5))
    assert kept.shape == (64, 6 * 4 * 8 // 2)
    starts = set()
    for row in kept:
        dropped = np.ones(6 * 4 * 8, bool)
        dropped[row] = False
        frames = dropped.reshape(6, 4, 8)
        start = SEQUENCE.index(frames[0, :2, :2].astype(int).tolist())
        starts.add(start)
        for t in range(6):
            cell = np.array(SEQUENCE[(start + t) % 4], bool)
            assert (frames[t] == np.tile(cell, (2, 4))).all()
    assert starts == {0, 1, 2, 3}


@both_kinds
@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 1176), (0.5, 784), (0.75, 392), (0.9, 392)])
def test_running_cell_counts(kind, ratio, kept):
    assert running_cell(source(kind), 2, CLIP, ratio).shape == (2, kept)


@both_kinds
def test_dual_mask_counts_704_tokens_and_sees_80_again(kind):
    mask = draw(dual_mask, kind, 16, CLIP, 0.9, 0.5)
    assert mask.visible.shape == (16, 160) and mask.decoded.shape == (16, 784)
    assert (np.asarray(mask.counted).sum(axis=1) == 704).all()
    for b in range(16):
        visible, decoded = set(np.asarray(mask.visible)[b]), set(np.asarray(mask.decoded)[b])
        assert len(decoded & visible) == 80 and len(decoded - visible) == 704
    patterns = {row.tobytes() for row in np.asarray(mask.decoded)}
    assert len(patterns) == 4


def test_the_two_masks_of_a_dual_mask_are_drawn_apart():
    """With one key for both, the running cell would be a function of the tube, or vice versa."""
    key = jax.random.key(3)
    first, second = jax.random.split(key)
    mask = dual_mask(key, 8, CLIP)
    np.testing.assert_array_equal(mask.masked, tube_mask(first, 8, CLIP).masked)
    np.testing.assert_array_equal(mask.decoded, running_cell(second, 8, CLIP))


def test_masks_of_a_loader_are_stacked_clip_by_clip():
    rng = np.random.default_rng(0)
    masks = [dual_mask(rng, 1, CLIP) for _ in range(3)]
    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *masks)
    assert batch.masked.shape == (3, 1408) and batch.counted.shape == (3, 784)


@both_kinds
@pytest.mark.parametrize("function", [*GENERATORS, running_cell])
@pytest.mark.parametrize(
    ("batch", "grid", "ratio"),
    [
        (0, (2, 4, 4), 0.5),
        (2.0, (2, 4, 4), 0.5),
        (1, (4, 4), 0.5),
        (1, (2, 0, 4), 0.5),
        (1, (2, 4.0, 4), 0.5),
        (1, (2, 4, 4), float("nan")),
        (1, (2, 4, 4), "0.5"),
    ],
)
def test_arguments(function, kind, batch, grid, ratio):
    with pytest.raises(UserError, match="needs batch >= 1, a grid .* and a ratio in"):
        function(source(kind), batch, grid, ratio)


@pytest.mark.parametrize("function", [*GENERATORS, running_cell])
@pytest.mark.parametrize("key", [0, None, np.random.RandomState(0)])
def test_what_is_no_source_of_randomness(function, key):
    with pytest.raises(UserError, match="needs a jax PRNG key or a numpy.random.Generator, got"):
        function(key, 1, CLIP)


@pytest.mark.parametrize("function", GENERATORS)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
def test_some_must_be_masked_and_some_left(function, ratio):
    with pytest.raises(UserError, match="masks some and leaves some"):
        function(jax.random.key(0), 1, (2, 2, 2), ratio)


@pytest.mark.parametrize(
    ("grid", "ratio"), [((2, 4, 4), 0.2), ((2, 4, 4), 1.0), ((2, 3, 4), 0.5), ((2, 4, 5), 0.5)]
)
def test_running_cell_needs_whole_cells(grid, ratio):
    with pytest.raises(UserError, match=r"0\.25 to below 1 and an even height .* grid \("):
        running_cell(jax.random.key(0), 1, grid, ratio)


SMALL = VideoMAEConfig(**VIDEOMAE | dict(image_size=(32, 16), use_mean_pooling=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.to_bool(), r"must be a vivit_jax\.Mask, got .*Mask\.from_bool"),
        (lambda mask: mask.replace(masked=mask.masked[:1]), "for 1 clip or 2 clips of 24 tokens"),
        (lambda mask: mask.replace(decoded=mask.decoded[:1]), "for 1 clip or 2 clips of 24 tokens"),
        (lambda mask: jax.tree.map(lambda part: part[:1], mask), "for 1 clip of 24 .* holds 2 of"),
        (lambda mask: mask.replace(masked=mask.masked[:, 1:]), "of 23 tokens, .* holds 2 of 24"),
        (lambda mask: None, "needs a mask, for example vivit_jax.tube_mask"),
    ],
)
def test_masks_that_do_not_fit_the_clips(change, message):
    model = VideoMAEForPreTraining(SMALL)
    mask = change(dual_mask(np.random.default_rng(0), 2, SMALL.grid, 0.5))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), clip(SMALL), mask)

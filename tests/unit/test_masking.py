# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from vivit_jax import Mask, UserError, tube_mask


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


def test_from_bool_under_jit_says_why_it_cannot():
    with pytest.raises(UserError, match=r"outside jax\.jit"):
        jax.jit(Mask.from_bool)(np.zeros((1, 4), bool))


def test_tube_mask_has_the_papers_counts_and_is_a_tube():
    grid = (8, 14, 14)
    mask = jax.jit(tube_mask, static_argnums=(1, 2, 3))(jax.random.key(0), 3, grid, 0.9)
    assert mask.visible.shape == (3, 160) and mask.masked.shape == (3, 1408)
    tubes = np.asarray(mask.to_bool()).reshape(3, 8, 196)
    assert (tubes == tubes[:, :1]).all() and (tubes[:, 0].sum(axis=1) == 176).all()
    assert (np.diff(mask.visible) > 0).all() and (np.diff(mask.masked) > 0).all()
    both = np.sort(np.concatenate([mask.visible, mask.masked], axis=1))
    assert (both == np.arange(1568)).all()
    assert not (tubes[0] == tubes[1]).all()
    other = tube_mask(jax.random.key(1), 3, grid, 0.9)
    assert not (np.asarray(mask.masked) == np.asarray(other.masked)).all()


def test_tube_mask_covers_every_position_evenly():
    mask = tube_mask(jax.random.key(0), 4000, (1, 4, 4), 0.75)
    frequency = np.asarray(mask.to_bool()).mean(axis=0)
    # Binomial standard deviation 0.0068; five of them.
    assert np.abs(frequency - 0.75).max() < 0.035


@pytest.mark.parametrize(
    ("batch", "grid", "ratio"),
    [(0, (2, 4, 4), 0.5), (1, (4, 4), 0.5), (1, (2, 4, 4), float("nan"))],
)
def test_tube_mask_arguments(batch, grid, ratio):
    with pytest.raises(UserError, match="tube_mask needs"):
        tube_mask(jax.random.key(0), batch, grid, ratio)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
def test_tube_mask_must_mask_some_and_leave_some(ratio):
    with pytest.raises(UserError, match="masks some and leaves some"):
        tube_mask(jax.random.key(0), 1, (2, 2, 2), ratio)

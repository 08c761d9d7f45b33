# SPDX-License-Identifier: Apache-2.0
"""What dropout leaves of a value, and what is dropped together."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from vivit_jax.layers.dropout import dropout

CLIPS, SHAPE = 8, (8, 16, 32)


class Dropped(nn.Module):
    rate: float
    shared: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, clip_ids):
        return dropout(self, x, self.rate, clip_ids, self.shared)


@functools.partial(jax.jit, static_argnums=0)
def left(module, x, clip_ids):
    return module.apply({}, x, clip_ids, rngs={"dropout": jax.random.key(0)})


def ones():
    return np.ones(SHAPE, np.float32)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_what_is_kept_makes_up_for_what_is_dropped(rate):
    found = np.asarray(left(Dropped(rate), ones(), np.arange(CLIPS)))
    np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - rate)], rtol=1e-6)
    sigma = (rate * (1 - rate) / found.size) ** 0.5
    assert abs((found == 0).mean() - rate) < 4 * sigma


def test_clips_are_told_apart_by_their_ids():
    ids = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    found = np.asarray(left(Dropped(0.5), ones(), ids))
    np.testing.assert_array_equal(found[:4], found[4:])
    assert len(np.unique(found, axis=0)) == 4


@pytest.mark.parametrize("shared", [(1,), (2,), (1, 2)])
def test_places_along_shared_axes_go_together(shared):
    found = np.asarray(left(Dropped(0.5, shared), ones(), np.arange(CLIPS)))
    first = found.take([0], axis=shared[0])
    if len(shared) == 2:
        first = first[:, :, :1]
    np.testing.assert_array_equal(found, np.broadcast_to(first, SHAPE))
    assert {0, 2} == set(np.unique(found))


def test_all_or_nothing_is_dropped():
    x = ones()
    assert not np.any(left(Dropped(1.0), x, np.arange(CLIPS)))
    np.testing.assert_array_equal(left(Dropped(0.0), x, np.arange(CLIPS)), x)
    np.testing.assert_array_equal(left(Dropped(0.5), x, None), x)

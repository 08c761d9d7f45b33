# SPDX-License-Identifier: Apache-2.0
"""Array types of the packages' annotations are checked in tests, whichever process runs them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_types import ArrayTypeError, checked
from helpers import clip
from jaxtyping import Float
from tiny import VIDEOMAE

import vivit_jax
from vivit_jax.layers.embed import TubeletEmbed, resize_positions
from vivit_jax.layers.linear import LayerNorm
from vivit_jax.layers.tubelets import take_tokens
from vivit_jax.models.losses import reconstruction_loss

Matrix = Float[np.ndarray, "b d"]


@checked
def scaled(x: Matrix, by: Float[np.ndarray, " b"], note: str = "") -> Matrix:
    if note == "refuse":
        raise ValueError("refused")
    return x.sum(0) if note == "sum" else x * np.resize(by, len(x))[:, None]


MATRIX, VECTOR = np.zeros((2, 3)), np.zeros(2)


def test_what_has_no_array_type_is_not_checked():
    assert scaled(MATRIX, VECTOR, note=3).shape == (2, 3)

    def plain(x: int) -> str:
        return x

    assert checked(plain) is plain


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((MATRIX.astype(int), VECTOR), r"scaled: x is int64\[2, 3\], annotated as .*Float"),
        ((MATRIX[None, 0], np.zeros((1, 1))), r"by is float64\[1, 1\]"),
        ((MATRIX, np.zeros(3)), r"by is float64\[3\]"),  # b is 2 already
        ((MATRIX, VECTOR, "sum"), r"what it returns is float64\[3\]"),
    ],
)
def test_a_wrong_array_fails_where_it_is_accepted(args, message):
    with pytest.raises(ArrayTypeError, match=message):
        scaled(*args)


def test_an_error_of_the_functions_own_comes_first():
    with pytest.raises(ValueError, match="refused"):
        scaled(MATRIX.astype(int), VECTOR, "refuse")


CONFIG = vivit_jax.VideoMAEConfig(**VIDEOMAE)


def initialised(module, *args):
    return module.init(jax.random.key(0), *args)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: initialised(LayerNorm(CONFIG, 1e-6), jnp.zeros((2, 3), bool)), "x is bool"),
        (
            lambda: initialised(TubeletEmbed(CONFIG), clip(CONFIG)[:1], np.zeros((3, 5), int)),
            r"indices is int64\[3, 5\]",
        ),
        (lambda: resize_positions(jnp.zeros((1, 8, 4)), (2, 2, 2), (2, 2, 2)), "table is"),
        (lambda: reconstruction_loss(jnp.zeros((2, 3, 4)), jnp.zeros((2, 1, 4))), "targets is"),
    ],
)
def test_the_packages_are_checked(wrong, named):
    with pytest.raises(ArrayTypeError, match=named):
        wrong()


def test_the_hook_is_on_in_this_process():
    """pytest-xdist's workers run this test too: each imports conftest.py, which installs it."""
    assert any(type(finder).__module__ == "array_types" for finder in sys.meta_path)
    for function in (LayerNorm.__call__, vivit_jax.VivitModel.__call__, take_tokens):
        while function.__code__.co_filename != checked.__code__.co_filename:
            function = function.__wrapped__

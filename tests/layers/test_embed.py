# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bool_mask, clip, mostly_slow, random_params
from tiny import CASES, config_of

from vivit_jax import Mask, UserError, VivitModel
from vivit_jax.layers.embed import resize_positions, sincos_positions
from vivit_jax.layers.tubelets import patchify
from vivit_jax.models.build import abstract_params
from vivit_jax.models.losses import reconstruction_targets


def test_patchify_order_is_time_height_width_channel():
    x = np.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3)
    patches = np.asarray(patchify(x, (2, 3, 4)))
    assert patches.shape == (2, 8, 72)
    token = 0
    for t in range(2):
        for h in range(2):
            for w in range(2):
                block = x[:, 2 * t : 2 * t + 2, 3 * h : 3 * h + 3, 4 * w : 4 * w + 4]
                assert (patches[:, token] == block.reshape(2, -1)).all()
                token += 1


def test_sincos_table_has_the_reference_rows():
    table = sincos_positions(1568, 768)
    assert table.dtype == np.float64
    np.testing.assert_allclose(
        table[1, :4], [0.84147096, 0.5403023, 0.8284308, 0.5600915], atol=1e-7
    )
    np.testing.assert_allclose(
        table[1567, :4], [0.6089484, -0.79320985, 0.09323163, -0.99564445], atol=1e-7
    )


@pytest.mark.parametrize("new", [(1, 5, 4), (1, 2, 7), (1, 3, 3), (1, 8, 9), (1, 1, 1)])
def test_spatial_resize_is_pytorchs_bicubic(new):
    import torch

    old = (1, 3, 4)
    table = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    ours = resize_positions(jnp.asarray(table), old, new)
    image = torch.from_numpy(table.reshape(1, 3, 4, 5)).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(image, new[1:], mode="bicubic", align_corners=False)
    theirs = theirs.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-6)  # measured 1.0e-6


@pytest.mark.parametrize("frames", [1, 3, 5, 8])
def test_temporal_resize_is_pytorchs_linear(frames):
    import torch

    table = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    ours = resize_positions(jnp.asarray(table), (4, 1, 1), (frames, 1, 1))
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(table.T[None].copy()), frames, mode="linear", align_corners=False
    )
    np.testing.assert_allclose(ours, theirs[0].numpy().T, atol=1e-6)


def test_resize_is_separable_and_the_identity_on_its_own_grid():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((24, 3)))
    assert resize_positions(table, (2, 3, 4), (2, 3, 4)) is table
    both = resize_positions(table, (2, 3, 4), (3, 5, 2))
    steps = resize_positions(table, (2, 3, 4), (3, 3, 4))
    np.testing.assert_allclose(both, resize_positions(steps, (3, 3, 4), (3, 5, 2)), atol=1e-6)
    constant = resize_positions(jnp.ones((24, 3)), (2, 3, 4), (5, 7, 6))
    np.testing.assert_allclose(constant, 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 6, 24, 16), r"\[batch, frames, height, width, channels\], got shape"),
        ((2, 6, 24, 16, 4), "has 4 channels .* takes 3"),
        ((2, 6, 3, 24, 16), "has 16 channels .* channels last"),
        ((2, 6, 7, 16, 3), "7 height, less than the 8 of one tubelet"),
        ((2, 0, 24, 16, 3), "0 frames, less than the 2 of one tubelet"),
        ((2, 5, 24, 16, 3), r"clip of \(5, 24, 16\).*configured for \(6, 24, 16\)"),
        ((2, 6, 25, 16, 3), r"clip of \(6, 25, 16\).*configured for \(6, 24, 16\)"),
        ((2, 8, 24, 16, 3), r"clip of \(8, 24, 16\).*configured for \(6, 24, 16\)"),
    ],
)
def test_clips_that_do_not_fit(shape, message):
    model = VivitModel(config_of("vivit base"))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("size", [(8, 24, 16), (2, 8, 8), (6, 40, 32), (10, 16, 48)])
@pytest.mark.parametrize("case", ["vivit base", "mae base"])
def test_any_size_works_with_interpolation(case, size):
    config = config_of(case)
    model = CASES[case][0](config)
    x = clip(dataclasses.replace(config, num_frames=size[0], image_size=size[1:]))
    apply = jax.jit(model.apply, static_argnames="interpolate_pos_encoding")
    out = apply({"params": random_params(model)}, x, interpolate_pos_encoding=True)
    tokens = size[0] // 2 * (size[1] // 8) * (size[2] // 8) + (case == "vivit base")
    assert out.last_hidden_state.shape == (2, tokens, 48)
    assert np.isfinite(out.last_hidden_state).all()


def test_native_size_is_unchanged_by_interpolation():
    config = config_of("vivit base")
    model, x = VivitModel(config), clip(config)
    params = {"params": random_params(model)}
    apply = jax.jit(model.apply, static_argnames="interpolate_pos_encoding")
    plain = apply(params, x).last_hidden_state
    flagged = apply(params, x, interpolate_pos_encoding=True).last_hidden_state
    assert (np.asarray(plain) == np.asarray(flagged)).all()


INTEGERS = ("uint8", "int32", "bool")


@pytest.mark.parametrize(
    ("case", "dtype"),
    mostly_slow(
        itertools.product(CASES, INTEGERS), *zip(CASES, itertools.cycle(INTEGERS), strict=False)
    ),
)
def test_frames_that_no_processor_saw(case, dtype):
    """At a shape that fits; under eval_shape and so under jit, in every module."""
    config = config_of(case)
    model, frames = CASES[case][0](config), np.ones(clip(config).shape, dtype)
    inputs = {"mask": Mask.from_bool(bool_mask(config))} if "pretraining" in case else {}
    params = abstract_params(model)
    run = lambda params, x: model.apply({"params": params}, x, **inputs)  # noqa: E731
    with pytest.raises(UserError, match=f"pixel_values has dtype {dtype}, .*processor"):
        jax.eval_shape(run, params, frames)
    with pytest.raises(UserError, match=f"pixel_values has dtype {dtype}, .*processor"):
        run(params, frames)
    jax.eval_shape(run, params, frames.astype(np.float16))
    if inputs:
        with pytest.raises(UserError, match=f"pixel_values has dtype {dtype}, .*processor"):
            reconstruction_targets(frames, inputs["mask"], config)

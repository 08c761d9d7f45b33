# SPDX-License-Identifier: Apache-2.0
"""The patch kernel and the positions of an image model, inflated to those of a video model."""

import numpy as np
import pytest
from scipy import ndimage

import vivit_jax
from checkpoints_convert.start.from_image import (
    inflate_kernel,
    inflate_positions,
    init_from_image_model,
)

SIZES = dict(num_frames=6, tubelet_size=(2, 8, 8))


# --- the kernel over time ------------------------------------------------------------------------

KERNEL = np.random.default_rng(0).standard_normal((1, 8, 8, 3, 4)).astype(np.float32)


@pytest.mark.parametrize(("frames", "central"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_central_frame_and_average(frames, central):
    got = inflate_kernel(KERNEL, frames, "central_frame")
    assert got.shape == (frames, 8, 8, 3, 4) and got.dtype == np.float32
    assert (got[central] == KERNEL[0]).all() and np.count_nonzero(got) == KERNEL.size
    average = inflate_kernel(KERNEL, frames, "average")
    assert np.allclose(average, KERNEL / frames, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("frames", "weights"), [(2, [-0.25, 0.25]), (4, [-0.604, 0.146, 0.271, 0.1875])]
)
def test_rank_pooling(frames, weights):
    got = inflate_kernel(KERNEL, frames, "rank_pooling")
    weights = np.reshape(weights, (-1, 1, 1, 1, 1))
    assert np.abs(got - weights * KERNEL).max() <= 5e-4 * np.abs(KERNEL).max()


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 4), (8, 8)),
        ((14, 14), (16, 16)),
        ((14, 14), (7, 10)),
        ((3, 3), (1, 5)),
        ((1, 1), (2, 3)),
    ],
    ids=str,
)
def test_resized_positions_are_scipys(old, new):
    table = np.random.default_rng(0).standard_normal((*old, 6)).astype(np.float32)
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    wanted = ndimage.zoom(table.astype(np.float64), zoom, order=1).reshape(-1, 6)
    flat = table.reshape(-1, 6)
    for positions, frames in (("resize", 1), ("resize_tile", 1), ("resize_tile", 3)):
        got = inflate_positions(flat, old, (frames, *new), positions)
        assert got.dtype == np.float32 and got.shape == (frames * new[0] * new[1], 6)
        for frame in np.split(got, frames):
            assert np.abs(frame - wanted).max() < 1e-6


def test_positions_of_the_same_grid_are_repeated_bit_for_bit():
    table = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    for positions in ("tile", "resize_tile"):
        got = inflate_positions(table, (4, 3), (5, 4, 3), positions)
        assert (got.reshape(5, 12, 6) == table).all()
    assert (inflate_positions(table, (4, 3), (1, 4, 3), "resize") == table).all()


def test_positions_that_do_not_fit_the_video_model(images):
    def table(positions="resize_tile", **config):
        config = SIZES | dict(image_size=(24, 16)) | config
        return init_from_image_model(images.path("hf"), config, head="none", positions=positions)[1]

    with pytest.raises(vivit_jax.ConfigError, match=r"'tile' needs the image's grid of \(3, 3\)"):
        table("tile")
    with pytest.raises(vivit_jax.ConfigError, match="the table of one frame, the video model's"):
        table("resize")
    # A factorised encoder has one table for all frames.
    staged = dict(attention_type="factorised_encoder", spatial_only=True)
    resized, tiled = (table(how, **staged)["spatial"] for how in ("resize", "resize_tile"))
    assert resized["pos_embed"].shape == (1, 1 + 3 * 2, 48)
    assert (resized["pos_embed"] == tiled["pos_embed"]).all()


@pytest.mark.parametrize("with_cls", [True, False], ids=["cls", "no cls"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_class_token_and_its_position(images, tmp_path, with_cls, pooling):
    def edit(tensors):
        if not with_cls:
            del tensors["cls_token"]
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]

    path = images.copy(tmp_path, "timm", edit)
    table = images.vit.embeddings.position_embeddings[0].detach().numpy()
    fields = SIZES | dict(num_attention_heads=4, pooling=pooling)
    _, params, report = init_from_image_model(path, fields, head="none")
    positions = np.asarray(params["pos_embed"])[0]
    assert (positions[-27:].reshape(3, 9, 48) == table[1:]).all()
    dropped = ("head.bias", "head.weight")
    if pooling == "mean":
        assert "cls" not in params and len(positions) == 27
        assert report.dropped == (("cls_token",) if with_cls else ()) + dropped
        assert report.fresh == ()
    elif with_cls:
        assert (positions[0] == table[0]).all()
        token = images.vit.embeddings.cls_token.detach().numpy()
        assert (np.asarray(params["cls"]) == token).all() and report.fresh == ()
    else:
        assert not positions[0].any() and report.fresh == ("cls",)
        assert "the position of the class token starts at zero" in str(report)
    assert ("the class token and its position are left out" in str(report)) == (
        with_cls and pooling == "mean"
    )

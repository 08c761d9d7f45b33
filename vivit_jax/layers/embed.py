# SPDX-License-Identifier: Apache-2.0
"""From pixels to tokens: the projection of tubelets and the two kinds of positions."""

import functools
import logging

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int

from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.layers.linear import plus_bias, product, with_axes
from vivit_jax.layers.parts import with_whole_kernels
from vivit_jax.layers.tubelets import (
    ByteClips,
    PixelValues,
    check_pixels,
    fastest_order,
    tubelets,
)
from vivit_jax.masking import AnyArray, Grid

logger = logging.getLogger(__name__)


def check_clip(config: Config, shape: tuple[int, ...], any_size: bool) -> Grid:
    """The token grid (t, h, w) of a clip [b, t, h, w, c]; UserError if it does not fit.

    Pixels after the last whole tubelet of an axis are dropped, as by a convolution without padding;
    that is logged once for each size. As in transformers, a clip may have more frames than
    configured if they do not fill another tubelet.
    """
    if len(shape) != 5:
        raise UserError(
            f"pixel_values must be [batch, frames, height, width, channels], got shape {shape}"
        )
    _, *clip, channels = shape
    if channels != config.num_channels:
        hint = "; the layout is channels last" if shape[2] == config.num_channels else ""
        raise UserError(
            f"pixel_values has {channels} channels (shape {shape}), the model takes "
            f"{config.num_channels}{hint}"
        )
    for size, patch, axis in zip(clip, config.tubelet, ("frames", "height", "width"), strict=True):
        if size < patch:
            raise UserError(
                f"pixel_values has {size} {axis}, less than the {patch} of one tubelet "
                f"(shape {shape}, tubelet {config.tubelet}); give a larger clip"
            )
    grid = config.grid_of(*clip)
    if (grid, tuple(clip[1:])) != (config.grid, config.frame_size) and not any_size:
        expected = (config.num_frames, *config.frame_size)
        raise UserError(
            f"clip of {tuple(clip)} (frames, height, width), the model is configured for "
            f"{expected}; resize it, or pass interpolate_pos_encoding=True"
        )
    sampled = config.num_sampled_frames
    if sampled and sampled > clip[0]:
        raise UserError(
            f"pixel_values has {clip[0]} frames, the model picks num_sampled_frames={sampled} of "
            "them; give a longer clip"
        )
    frames, height, width = clip
    _log_dropped_pixels((frames, height, width), config.tubelet)
    return grid


@functools.cache
def _log_dropped_pixels(clip: Grid, tubelet: Grid) -> None:
    axes = zip(("frames", "rows", "columns"), clip, tubelet, strict=True)
    left_out = [f"{size % patch} of {size} {name}" for name, size, patch in axes if size % patch]
    if left_out:
        logger.warning(
            "clips of %s (frames, height, width) are not a multiple of the tubelet %s: the last %s "
            "are dropped, as in transformers",
            *(clip, tubelet, " and ".join(left_out)),
        )


def uniform_frames(total: int, count: int) -> Int[np.ndarray, " t"]:
    """Indices of `count` of `total` frames that cut the clip into count + 1 equal parts.

    All frames if there are no more than `count`; 8 of 32 are 4, 7, 11, 14, 18, 21, 25, 28. Halves
    are rounded to the even index. scenic rounds a sum of floats and so for some sizes (2 of 8, 5 of
    32) returns one frame too many; this returns `count`.
    """
    if count >= total:
        return np.arange(total)
    return np.round(np.arange(1, count + 1) * total / (count + 1)).astype(int)


class TubeletEmbed(nn.Module):
    """Linear projection of tubelets; equals a convolution with stride = kernel size.

    The result is in float32 or wider, so that positions are added before rounding. With `visible`
    only those tokens are computed. With `num_sampled_frames` the clip is first thinned to that
    many. Raises UserError for pixels that are neither floats nor `ByteClips`.
    """

    config: Config

    @nn.compact
    def __call__(
        self, pixel_values: PixelValues, visible: Int[AnyArray, "b v"] | None = None
    ) -> Float[jax.Array, "b l d"]:
        check_pixels(pixel_values)
        config = self.config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        shape = (*config.tubelet, config.num_channels, config.hidden_size)
        init = nn.initializers.normal(config.initializer_range)
        init = with_axes(init, (None, None, None, "channels", "embed"))
        zeros = with_axes(nn.initializers.zeros, ("embed",))
        kernel = jnp.asarray(self.param("kernel", init, shape, param_dtype), dtype)
        bias = jnp.asarray(self.param("bias", zeros, shape[-1:], param_dtype), dtype)
        sampled = config.num_sampled_frames
        if sampled:
            frames = uniform_frames(pixel_values.shape[1], sampled)
            if isinstance(pixel_values, ByteClips):
                pixel_values = pixel_values.frames(frames)
            else:
                pixel_values = pixel_values[:, frames]
        if visible is None and not isinstance(pixel_values, ByteClips):
            pixel_values = jnp.asarray(pixel_values, dtype)  # all are used: cast before moving them
        order = fastest_order(pixel_values)
        patches = tubelets(pixel_values, config.tubelet, visible, order).astype(dtype)
        kernel = einops.rearrange(kernel, f"x y z c d -> ({order}) d")
        (y,) = with_whole_kernels(product, patches, [kernel], (None, "embed"))
        return plus_bias(y, bias)


@functools.cache
def sincos_positions(length: int, width: int) -> Float[np.ndarray, "l d"]:
    """VideoMAE's fixed table over the flattened token index.

    sin on even and cos on odd columns at angles pos / 10000^(2 (j // 2) / width); in float64,
    because float32 arithmetic is off by up to 1.4e-4 at 1568 tokens.
    """
    column = np.arange(width)
    angle = np.arange(length)[:, None] / 10000.0 ** (2 * (column // 2) / width)
    return np.where(column % 2, np.cos(angle), np.sin(angle))


def resize_positions(
    table: Float[AnyArray, "l d"], old: Grid, new: Grid
) -> Float[AnyArray, "l2 d"]:
    """Resize learned positions from one token grid to another, separably.

    Time is linear, space bicubic with PyTorch's coefficient (a = -0.75), both with half-pixel
    centres and no antialiasing: for one frame as in HuggingFace's image models. HuggingFace's ViViT
    takes the square root of the space-time token count instead and fails on real videos.
    """
    if old == new:
        return table
    grid = table.reshape(*old, -1)
    for axis, kind in enumerate(("linear", "cubic", "cubic")):
        if old[axis] != new[axis]:
            weights = jnp.asarray(resize_weights(old[axis], new[axis], kind), table.dtype)
            grid = jnp.moveaxis(jnp.tensordot(weights, grid, axes=(1, axis)), 0, axis)
    return grid.reshape(-1, grid.shape[-1])


@functools.cache
def resize_weights(old: int, new: int, kind: str) -> Float[np.ndarray, "new old"]:
    """Interpolation matrix; border values are repeated.

    "linear" and "cubic" sample at half-pixel centres. "aligned" is linear with both ends aligned,
    as scenic resizes image tables (scipy.ndimage.zoom of order 1).
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    if kind == "aligned":
        centre = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    if kind in ("linear", "aligned"):
        centre = np.clip(centre, 0, old - 1)
        taps, kernel = (0, 1), lambda x: 1 - x
    else:
        taps, kernel = (-1, 0, 1, 2), _cubic
    floor = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in taps:
        source = np.clip(floor + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), source), kernel(np.abs(centre - floor - tap)))
    return weights


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)

# SPDX-License-Identifier: Apache-2.0
"""Tubelets: the pixels of each token, cut from clips of floats or of bytes."""

import dataclasses
import math
from typing import Any

import einops
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int32, Num, Shaped, UInt8

from vivit_jax.errors import UserError
from vivit_jax.layers.platform import platform
from vivit_jax.masking import AnyArray, Grid

# Orders of a tubelet's values: x its frame, y its row, z its column, c the channel.
FRAMES_FIRST = "x y z c"  # that of kernels, targets and logits
COLUMNS_FIRST = "z c x y"
CHANNELS_FIRST = "c z x y"


@flax.struct.dataclass
class ByteClips:
    """Clips as bytes, and how to make pixels of them: byte * scale + shift, in float32.

    Models take it in place of float pixel_values: they rearrange and select bytes, a quarter of the
    floats, and normalise only the tokens that they compute. The results differ by rounding alone.
    """

    clips: jax.Array  # uint8 [b, t, h, w, c]
    scale: tuple[float, ...] = flax.struct.field(pytree_node=False)  # one, or one for each channel
    shift: tuple[float, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The clips' shape."""
        return self.clips.shape

    def frames(self, indices) -> "ByteClips":
        """The frames at these indices of each clip."""
        return dataclasses.replace(self, clips=self.clips[:, indices])

    def of_channels(self) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
        """Scale and shift of each channel; UserError for another number of them."""
        channels = self.shape[-1]
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"ByteClips.{name} has {len(values)} values for clips of {channels} channels, "
                    "expected one, or one for each channel"
                )
        scale, shift = (np.asarray(v, np.float32) for v in (self.scale, self.shift))
        return np.broadcast_to(scale, channels), np.broadcast_to(shift, channels)


PixelValues = Float[AnyArray, "b t h w c"] | ByteClips


def check_pixels(pixel_values) -> None:
    """UserError for pixels that are not floats, such as the frames of a video; any shape."""
    if isinstance(pixel_values, ByteClips):
        dtype = pixel_values.clips.dtype
        if dtype != jnp.uint8:
            raise UserError(f"ByteClips.clips has dtype {dtype}, expected uint8: a video's frames")
        return
    dtype = jnp.result_type(pixel_values)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"pixel_values has dtype {dtype}, the model takes normalised floats; frames go through "
            "the processor first: pixel_values = processor(frames), with processor = "
            "vivit_jax.VideoProcessor.from_pretrained(...)"
        )


def whole_tubelets(
    clips: Shaped[AnyArray, "b t h w ..."], tubelet: Grid
) -> Shaped[AnyArray, "b ..."]:
    """Clips cut off after the last whole tubelet of each axis."""
    t, h, w = (size // patch * patch for size, patch in zip(clips.shape[1:4], tubelet, strict=True))
    return clips[:, :t, :h, :w]


def patchify(clips: Num[AnyArray, "b t h w c"], tubelet: Grid) -> Num[jax.Array, "b l p"]:
    """Cut clips into tubelets, their values in the order FRAMES_FIRST."""
    t, h, w = tubelet
    clips = jnp.asarray(whole_tubelets(clips, tubelet))
    pattern = f"b (t x) (h y) (w z) c -> b (t h w) ({FRAMES_FIRST})"
    return einops.rearrange(clips, pattern, x=t, y=h, z=w)


def fastest_order(pixel_values: PixelValues) -> str:
    """The order in which the platform cuts out tubelets with the least work.

    A TPU computes on tiles of 8 rows of 128. FRAMES_FIRST, whose last axes are a few columns and
    channels long, pads every move: for 8 clips of 16 x 224 x 224 on a v5e its compiler estimates
    5.2 M cycles, 0.7 M for COLUMNS_FIRST (0.3 M in bfloat16) and 0.3 M for CHANNELS_FIRST of bytes.
    Parameters are then put into that order too, see `reordered`.
    """
    if platform() != "tpu":
        return FRAMES_FIRST
    return CHANNELS_FIRST if isinstance(pixel_values, ByteClips) else COLUMNS_FIRST


def tubelets(
    pixel_values: PixelValues,
    tubelet: Grid,
    indices: Int[AnyArray, "b k"] | None = None,
    order: str = FRAMES_FIRST,
) -> Float[jax.Array, "b k p"]:
    """Pixels of the tokens at `indices`, of all tokens for None.

    Floats can be in the orders FRAMES_FIRST and COLUMNS_FIRST, `ByteClips` in FRAMES_FIRST and
    CHANNELS_FIRST. An index past the end gives NaN.
    """
    if not isinstance(pixel_values, ByteClips):
        if order == FRAMES_FIRST:
            return take_tokens(patchify(pixel_values, tubelet), indices)
        return take_tokens(_columns_first(jnp.asarray(pixel_values), tubelet), indices)
    scale, shift = pixel_values.of_channels()

    def pixels(values, scale, shift):
        """Values [b, k, n], NaN for tokens past the end."""
        values = values.astype(jnp.float32) * scale + shift
        if indices is None:
            return values
        steps = zip(pixel_values.shape[1:4], tubelet, strict=True)
        there = indices < math.prod(size // patch for size, patch in steps)
        return jnp.where(there[..., None], values, jnp.float32(np.nan))

    if order == FRAMES_FIRST:
        values = take_tokens(patchify(pixel_values.clips, tubelet), indices)
        times = values.shape[-1] // len(scale)
        return pixels(values, *(np.tile(v, times)[None, None] for v in (scale, shift)))
    of_channels = []
    for first in range(0, len(scale), 4):
        words = _packed(pixel_values.clips[..., first : first + 4])
        words = take_tokens(_columns_first(words[..., None], tubelet), indices)
        for i, c in enumerate(range(first, min(first + 4, len(scale)))):
            of_channels.append(pixels((words >> 8 * i) & 255, scale[c], shift[c]))
    return jnp.concatenate(of_channels, axis=-1)


def reordered(
    x: Shaped[jax.Array, "*l p"], tubelet: Grid, channels: int, old: str, new: str
) -> Shaped[jax.Array, "*l p"]:
    """x with its last axis, the values of a tubelet, in another order."""
    if old == new:
        return x
    sizes = dict(zip("xyz", tubelet, strict=True), c=channels)
    return einops.rearrange(x, f"... ({old}) -> ... ({new})", **sizes)


def take_tokens(
    x: Num[jax.Array, "*b l d"], indices: Int[AnyArray, "b k"] | None
) -> Num[jax.Array, "... d"]:
    """The tokens of x [b, l, d], or the rows of a table [l, d], at `indices`; all for None.

    An index past the end gives NaN, so that a mask for another grid does not go unnoticed; integers
    have no NaN, and give the last token.
    """
    if indices is None:
        return x
    past: dict[str, Any] = {"mode": "clip"}
    if jnp.issubdtype(x.dtype, jnp.floating):
        past = {"mode": "fill", "fill_value": jnp.nan}
    if x.ndim == 2:
        return x.at[indices].get(**past)
    # This keeps clips apart for the partitioner too: x.at[rows, indices] collects the tokens of the
    # whole batch on every device (all-reduce on CPU, all-gather on TPU).
    return jnp.take_along_axis(x, indices[..., None], axis=1, **past)


def _packed(clips: UInt8[AnyArray, "b t h w c"]) -> Int32[jax.Array, "b t h w"]:
    """The bytes of at most 4 channels, packed into one word.

    A TPU moves whole words: it lays bytes out four rows to a word.
    """
    words = [jnp.asarray(clips[..., i], jnp.int32) << 8 * i for i in range(clips.shape[-1])]
    return sum(words[1:], words[0])


def _columns_first(clips: Num[jax.Array, "b t h w c"], tubelet: Grid) -> Num[jax.Array, "b l p"]:
    """Cut clips into tubelets, their values in the order COLUMNS_FIRST."""
    t, h, w = tubelet
    clips = jnp.asarray(whole_tubelets(clips, tubelet))
    clips = einops.rearrange(clips, "b (t x) (h y) w c -> b t h w (c x y)", x=t, y=h)
    # Merged into one move the two would be FRAMES_FIRST's: many times as much work.
    clips = jax.lax.optimization_barrier(clips)
    return einops.rearrange(clips, "b t h (w z) v -> b (t h w) (z v)", z=w)

# SPDX-License-Identifier: Apache-2.0
"""Tubelets: the values of the pixels that make a token, from clips of floats or of bytes."""

import math

import einops
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vivit_jax.errors import UserError
from vivit_jax.layers.platform import platform
from vivit_jax.masking import Grid

# Orders of a tubelet's values: x its frame, y its row, z its column, c the channel.
FRAMES_FIRST = "x y z c"  # that of kernels, targets and logits
COLUMNS_FIRST = "z c x y"
CHANNELS_FIRST = "c z x y"


@flax.struct.dataclass
class ByteClips:
    """Clips as bytes with what makes pixels of them: byte * scale + shift, in float32.

    Models take it for float pixel_values: they rearrange and choose bytes, a quarter of what floats
    take, and make pixels of the tokens that they want. But for rounding it is the same.
    """

    clips: jax.Array  # uint8 [b, t, h, w, c]
    scale: tuple[float, ...] = flax.struct.field(pytree_node=False)  # one, or one for each channel
    shift: tuple[float, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the clips."""
        return self.clips.shape

    def frames(self, indices) -> "ByteClips":
        """Those frames of each clip."""
        return self.replace(clips=self.clips[:, indices])

    def of_channels(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift of each channel, float32 [c]; UserError for another number of them."""
        channels = self.shape[-1]
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"ByteClips.{name} has {len(values)} values for clips of {channels} channels, "
                    "expected one, or one for each channel"
                )
        return tuple(
            np.broadcast_to(np.asarray(v, np.float32), channels) for v in (self.scale, self.shift)
        )


def check_pixels(pixel_values) -> None:
    """UserError for pixels that are no floats, such as the frames a video holds; any shape."""
    bytes_ = isinstance(pixel_values, ByteClips)
    dtype = jnp.result_type(pixel_values.clips if bytes_ else pixel_values)
    if bytes_ and dtype != jnp.uint8:
        raise UserError(f"ByteClips.clips has dtype {dtype}, expected uint8: a video's frames")
    if not bytes_ and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"pixel_values has dtype {dtype}, the model takes normalised floats; frames go through "
            "the processor first: pixel_values = processor(frames), with processor = "
            "vivit_jax.VideoProcessor.from_pretrained(...)"
        )


def whole_tubelets(clips, tubelet: Grid):
    """Clips [b, t, h, w, ...] without what is left of each axis after its last whole tubelet."""
    t, h, w = (size // patch * patch for size, patch in zip(clips.shape[1:4], tubelet, strict=True))
    return clips[:, :t, :h, :w]


def patchify(clips: jax.Array, tubelet: Grid) -> jax.Array:
    """Cut clips into tubelets: [b, t, h, w, c] -> [b, l, values] in the order FRAMES_FIRST."""
    t, h, w = tubelet
    clips = whole_tubelets(jnp.asarray(clips), tubelet)
    pattern = f"b (t x) (h y) (w z) c -> b (t h w) ({FRAMES_FIRST})"
    return einops.rearrange(clips, pattern, x=t, y=h, z=w)


def fastest_order(pixel_values) -> str:
    """The order in which the platform has the values of a clip's tubelets with the least work.

    A TPU computes on tiles of 8 rows of 128, and so FRAMES_FIRST, whose last axes are a few columns
    and channels long, pads every move: for 8 clips of 16 x 224 x 224 on a v5e its compiler
    estimates 5.2 M cycles, 0.7 M for COLUMNS_FIRST (0.3 M in bfloat16) and 0.3 M for
    CHANNELS_FIRST of bytes. Parameters are then taken in that order too, see `reordered`.
    """
    if platform() != "tpu":
        return FRAMES_FIRST
    return CHANNELS_FIRST if isinstance(pixel_values, ByteClips) else COLUMNS_FIRST


def tubelets(pixel_values, tubelet: Grid, indices=None, order: str = FRAMES_FIRST) -> jax.Array:
    """Pixels of the tokens at indices [b, k], of all for None: floats [b, k, values].

    pixel_values are floats [b, t, h, w, c], for FRAMES_FIRST and COLUMNS_FIRST, or `ByteClips`, for
    FRAMES_FIRST and CHANNELS_FIRST. An index past the end gives NaN.
    """
    if not isinstance(pixel_values, ByteClips):
        if order == FRAMES_FIRST:
            return take_tokens(patchify(pixel_values, tubelet), indices)
        return take_tokens(_columns_first(jnp.asarray(pixel_values), tubelet), indices)
    scale, shift = pixel_values.of_channels()

    def pixels(values, scale, shift):
        """Values [b, k, n] with NaN for the tokens that there are not."""
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


def reordered(x: jax.Array, tubelet: Grid, channels: int, old: str, new: str) -> jax.Array:
    """The last axis of x, the values of a tubelet, in another order."""
    if old == new:
        return x
    sizes = dict(zip("xyz", tubelet, strict=True), c=channels)
    return einops.rearrange(x, f"... ({old}) -> ... ({new})", **sizes)


def take_tokens(x: jax.Array, indices: jax.Array | None) -> jax.Array:
    """Rows of x [b, l, d] (or of a table [l, d]) at indices [b, k]; all of them for None.

    An index past the end gives NaN, so that a mask for another grid cannot go unnoticed; of whole
    numbers, which have none, the last token.
    """
    if indices is None:
        return x
    past = {"mode": "clip"}
    if jnp.issubdtype(x.dtype, jnp.floating):
        past = {"mode": "fill", "fill_value": jnp.nan}
    if x.ndim == 2:
        return x.at[indices].get(**past)
    # Each row on its own for the partitioner too, which for x.at[rows, indices] collects the tokens
    # of the whole batch on every device (all-reduce on CPU, all-gather on TPU).
    return jnp.take_along_axis(x, indices[..., None], axis=1, **past)


def _packed(clips: jax.Array) -> jax.Array:
    """uint8 [b, t, h, w, c] of at most 4 channels -> int32 [b, t, h, w] with a byte of each.

    Whole words are what a TPU moves: bytes lie four rows to a word there.
    """
    words = [clips[..., i].astype(jnp.int32) << 8 * i for i in range(clips.shape[-1])]
    return sum(words[1:], words[0])


def _columns_first(clips: jax.Array, tubelet: Grid) -> jax.Array:
    """Clips [b, t, h, w, c] -> [b, l, values] in the order COLUMNS_FIRST."""
    t, h, w = tubelet
    clips = whole_tubelets(clips, tubelet)
    clips = einops.rearrange(clips, "b (t x) (h y) w c -> b t h w (c x y)", x=t, y=h)
    # As one move the two are what FRAMES_FIRST is: many times as much work.
    clips = jax.lax.optimization_barrier(clips)
    return einops.rearrange(clips, "b t h (w z) v -> b (t h w) (z v)", z=w)

# SPDX-License-Identifier: Apache-2.0
"""A processor's normalisation, from the bytes of a batch to pixels, on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vivit_jax.data.transforms.processor import VideoProcessor


def arithmetic(
    processor: VideoProcessor,
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """What the processor does after resize and crop: byte * scale + shift, float64 [] or [c]."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    shift = -1.0 if processor.offset else 0.0
    if processor.do_normalize:
        mean, std = np.asarray(processor.image_mean), np.asarray(processor.image_std)
        scale, shift = scale / std, (shift - mean) / std
    return np.asarray(scale, np.float64), np.asarray(shift, np.float64)


Arithmetic = tuple[tuple[float, ...], ...]


def hashable_arithmetic(processor: VideoProcessor) -> Arithmetic:
    """`arithmetic` as a key of cached compiled functions; `scaled_and_shifted` takes it too."""
    return tuple(tuple(np.atleast_1d(v).tolist()) for v in arithmetic(processor))


def normaliser(processor: VideoProcessor) -> Callable[[jax.Array], jax.Array]:
    """The processor's `arithmetic` on the device: uint8 [b, t, h, w, c] to float32 pixels.

    Bytes may be floats, such as means of bytes.
    """
    return scaled_and_shifted(*arithmetic(processor))


def scaled_and_shifted(scale, shift) -> Callable[[jax.Array], jax.Array]:
    """clips [b, t, h, w, c] -> clips * scale + shift in float32; scale and shift are [] or [c]."""
    scale, shift = (np.asarray(v, np.float32).reshape(1, 1, 1, 1, -1) for v in (scale, shift))
    return lambda clips: clips.astype(jnp.float32) * scale + shift

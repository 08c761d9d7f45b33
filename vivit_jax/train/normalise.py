# SPDX-License-Identifier: Apache-2.0
"""From the bytes of a batch to what the model takes, on the device and inside the jitted step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vivit_jax.data.settings import AugmentSettings
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.layers.dropout import clip_keys
from vivit_jax.layers.tubelets import ByteClips
from vivit_jax.train.augment_on_device import colour_jitter, random_erasing


def arithmetic(processor: VideoProcessor) -> tuple[np.ndarray, np.ndarray]:
    """What the processor does after resize and crop: byte * scale + shift, float64 [] or [c]."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    shift = -1.0 if processor.offset else 0.0
    if processor.do_normalize:
        mean, std = np.asarray(processor.image_mean), np.asarray(processor.image_std)
        scale, shift = scale / std, (shift - mean) / std
    return np.asarray(scale, np.float64), np.asarray(shift, np.float64)


Arithmetic = tuple[tuple[float, ...], ...]


def hashable_arithmetic(processor: VideoProcessor) -> Arithmetic:
    """`arithmetic`, as what compiled functions are kept by; `scaled_and_shifted` takes it too."""
    return tuple(tuple(np.atleast_1d(v).tolist()) for v in arithmetic(processor))


def normaliser(processor: VideoProcessor) -> Callable[[jax.Array], jax.Array]:
    """The processor's `arithmetic` on the device: uint8 [b, t, h, w, c] to float32 pixels.

    Bytes may come as floats that lie between them.
    """
    return scaled_and_shifted(*arithmetic(processor))


def scaled_and_shifted(scale, shift) -> Callable[[jax.Array], jax.Array]:
    """clips [b, t, h, w, c] -> clips * scale + shift in float32; both are numbers or one each c."""
    scale, shift = (np.asarray(v, np.float32).reshape(1, 1, 1, 1, -1) for v in (scale, shift))
    return lambda clips: clips.astype(jnp.float32) * scale + shift


def training_pixels(
    processor: VideoProcessor, settings: AugmentSettings
) -> Callable[[jax.Array, jax.Array, jax.Array], ByteClips | jax.Array]:
    """(key, clip_ids [b], uint8 [b, t, h, w, c]) -> what the model takes, augmented but for mixing.

    Bytes with the processor's arithmetic, where the settings change no pixel; else float32 pixels.
    Colour jitter comes before normalisation, as scenic's, which undoes it first; erasing after it,
    as VideoMAE's. What happens to a clip is a function of the key and of its id.
    """
    values = hashable_arithmetic(processor)
    if not (settings.colour or settings.erase or settings.mixes):
        return lambda key, clip_ids, clips: ByteClips(clips, *values)
    normalise = scaled_and_shifted(*values)

    def pixels(key, clip_ids, clips):
        colour, erase = (clip_keys(jax.random.fold_in(key, i), clip_ids) for i in range(2))
        if settings.colour:
            clips = 255 * colour_jitter(colour, clips.astype(jnp.float32) / 255, settings.colour)
        clips = normalise(clips)
        return random_erasing(erase, clips, settings.erase) if settings.erase else clips

    return pixels

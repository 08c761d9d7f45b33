# SPDX-License-Identifier: Apache-2.0
"""The last steps of a `VideoProcessor`: rescaling and normalising, in transformers' roundings."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vivit_jax.errors import UserError


def pixel_writer(
    processor: Any, width: int, channels: int
) -> Callable[[np.ndarray, np.ndarray], None]:
    """Returns a function that writes a cropped frame's final values into a float32 array.

    Both are [h, w, c] of this `width` and these `channels`. A byte has 256 possible results, so the
    float64 product, its rounding to float32 and the offset are looked up; the normalisation is
    looked up too where all channels share it. Raises `UserError` where the processor's statistics
    are of other channels.
    """
    mean = std = None
    if processor.do_normalize:
        for name in ("image_mean", "image_std"):
            value = getattr(processor, name)
            if isinstance(value, tuple) and len(value) != channels:
                raise UserError(
                    f"{name} has {len(value)} entries but the frames have {channels} channels: "
                    f"pass one number, or {channels} of them, or do_normalize=False"
                )
        mean = np.broadcast_to(np.array(processor.image_mean), channels)
        std = np.broadcast_to(np.array(processor.image_std), channels)
    table = _rescaled(processor, np.arange(256, dtype=np.uint8)).astype(np.float32)
    rows = None
    if processor.do_normalize and np.ptp(mean) == 0 and np.ptp(std) == 0:
        table = _normalized(table, mean[0], std[0])
    elif processor.do_normalize:
        # Whole rows broadcast several times faster than an inner axis of three.
        rows = [np.tile(value, width).astype(np.float32) for value in (mean, std)]

    def write(frame: np.ndarray, out: np.ndarray) -> None:
        if frame.dtype == np.uint8:
            np.take(table, frame, out=out, mode="clip")
            if rows is not None:
                flat = out.reshape(len(out), -1)
                np.subtract(flat, rows[0], out=flat)
                np.divide(flat, rows[1], out=flat)
        else:
            values = _rescaled(processor, frame)
            out[...] = _normalized(values, mean, std) if processor.do_normalize else values

    return write


def _rescaled(processor: Any, values: np.ndarray) -> np.ndarray:
    if not processor.do_rescale:
        return values
    values = (values.astype(np.float64) * processor.rescale_factor).astype(np.float32)
    return values - 1 if processor.offset else values


def _normalized(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        values = values.astype(np.float32)
    # In the dtype of the values, float16 included: transformers does not widen here.
    return (values - mean.astype(values.dtype)) / std.astype(values.dtype)

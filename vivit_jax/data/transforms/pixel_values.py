# SPDX-License-Identifier: Apache-2.0
"""The last steps of a `VideoProcessor`: rescale and normalise, rounded as in transformers."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from jaxtyping import Shaped

from vivit_jax.errors import UserError


class Steps(Protocol):
    """The fields of a `VideoProcessor` that are read here."""

    @property
    def do_rescale(self) -> bool: ...
    @property
    def rescale_factor(self) -> float: ...
    @property
    def offset(self) -> bool: ...
    @property
    def do_normalize(self) -> bool: ...
    @property
    def image_mean(self) -> float | tuple[float, ...]: ...
    @property
    def image_std(self) -> float | tuple[float, ...]: ...


def pixel_writer(
    processor: Steps, width: int, channels: int
) -> Callable[[np.ndarray, np.ndarray], None]:
    """Returns a function that writes a cropped frame's final values into a float32 array.

    Both are [h, w, c] of this `width` and these `channels`. A byte has 256 possible results, so the
    float64 product, its rounding to float32 and the offset are looked up; so is the normalisation
    if all channels share it. Raises `UserError` if the processor's statistics have another number
    of channels.
    """
    statistics = rows = None
    table = _rescaled(processor, np.arange(256, dtype=np.uint8)).astype(np.float32)
    if processor.do_normalize:
        mean = _by_channel("image_mean", processor.image_mean, channels)
        std = _by_channel("image_std", processor.image_std, channels)
        statistics = mean, std
        if np.ptp(mean) == 0 and np.ptp(std) == 0:
            table = _normalized(table, mean[0], std[0])
        else:
            # Whole rows broadcast several times faster than an inner axis of three.
            rows = [np.tile(value, width).astype(np.float32) for value in statistics]

    def write(frame: np.ndarray, out: np.ndarray) -> None:
        if frame.dtype == np.uint8:
            np.take(table, frame, out=out, mode="clip")
            if rows is not None:
                flat = out.reshape(len(out), -1)
                np.subtract(flat, rows[0], out=flat)
                np.divide(flat, rows[1], out=flat)
        else:
            values = _rescaled(processor, frame)
            out[...] = values if statistics is None else _normalized(values, *statistics)

    return write


def _by_channel(
    name: str, value: float | tuple[float, ...], channels: int
) -> Shaped[np.ndarray, " channels"]:
    if isinstance(value, tuple) and len(value) != channels:
        raise UserError(
            f"{name} has {len(value)} entries but the frames have {channels} channels: "
            f"pass one number, or {channels} of them, or do_normalize=False"
        )
    return np.broadcast_to(np.array(value), channels)


def _rescaled(processor: Steps, values: np.ndarray) -> np.ndarray:
    if not processor.do_rescale:
        return values
    values = (values.astype(np.float64) * processor.rescale_factor).astype(np.float32)
    return values - 1 if processor.offset else values


def _normalized(
    values: np.ndarray, mean: np.ndarray | np.floating, std: np.ndarray | np.floating
) -> np.ndarray:
    if values.dtype.kind != "f":
        values = values.astype(np.float32)
    # In the dtype of the values, float16 included: transformers does not widen here.
    return (values - mean.astype(values.dtype)) / std.astype(values.dtype)

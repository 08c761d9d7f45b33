# SPDX-License-Identifier: Apache-2.0
"""The one clip that stands for a file: which frames, and the frames."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from vivit_jax.data.dataset import open_array
from vivit_jax.data.decode import probe_video, read_video
from vivit_jax.data.frames import resize
from vivit_jax.data.sampling import clip_indices
from vivit_jax.errors import ConfigError, VideoError

# Frames between samples that the published recipes train with (Kinetics).
RECIPE_STRIDE = {"vivit": 2, "videomae": 4}
_NEAREST = 0  # Pillow's filter that copies pixels and weights nothing


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of a file and where they lie in it."""

    frames: np.ndarray  # [t, h, w, c], uint8 or float
    indices: np.ndarray  # int64 [t]
    fps: float | None  # of the file, None where it has no times

    def pixel_values(self, processor) -> np.ndarray:
        """The model's input, float32 [1, t, h, w, c]."""
        layout = {"input_data_format": "channels_last"}
        if self.frames.dtype == np.uint8:
            return processor(self.frames, **layout)
        # Floats are in [0, 1], and the processor's factor is one for bytes.
        factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
        return processor(self.frames, do_rescale=True, rescale_factor=factor, **layout)

    def mixes_channels(self, processor) -> bool:
        """Whether `pixel_values` weights channels by the last one: a resize takes it for alpha."""
        if (
            self.frames.shape[-1] not in (2, 4)
            or not processor.do_resize
            or processor.independent_channels
            or processor.resample == _NEAREST
        ):
            return False
        first = self.frames[0]
        # Frames of the right size are not resized.
        return resize(first, processor.size, processor.resample).shape != first.shape


def read_clip(
    path: str | os.PathLike,
    config,
    *,
    stride: int | None = None,
    start: str | int = "center",
    pad: str = "error",
) -> Clip:
    """Read the clip of `config.num_frames` frames that stands for a video file.

    `stride` None is the recipe's (ViViT 2, VideoMAE 4), less where the file is too short for it;
    `start` and `pad` are those of `vivit_jax.data.sampling.clip_indices`. A file that ends in .npy
    holds the frames themselves, [t, h, w, c], of any channel count, uint8 or float in [0, 1].

    Raises VideoError for a file that cannot be read, has too few frames or other channels than the
    model takes, UserError for an argument that is wrong.
    """
    path = Path(path)
    frames = _open_npy(path) if path.suffix.lower() == ".npy" else None
    if frames is None:
        info = probe_video(path)
        total, fps = info.num_frames, info.fps if np.isfinite(info.fps) else None
    else:
        total, fps = len(frames), None
    if stride is None:
        longest = (total - 1) // max(config.num_frames - 1, 1)
        stride = max(1, min(RECIPE_STRIDE[config.model_type], longest))
    indices = clip_indices(total, num_frames=config.num_frames, stride=stride, start=start, pad=pad)
    frames = read_video(path, indices=indices) if frames is None else np.array(frames[indices])
    if frames.shape[-1] != config.num_channels:
        raise VideoError(
            f"{path} has {frames.shape[-1]} channels, the model takes {config.num_channels}; "
            "other channels than RGB come as .npy, [t, h, w, c]"
        )
    return Clip(frames, indices, fps)


def parse_start(text: str) -> str | int:
    """The command lines' --start: begin, center, end or a frame index. Raises ConfigError."""
    if text in ("begin", "center", "end"):
        return text
    if text.isdecimal():
        return int(text)
    raise ConfigError(f"--start must be begin, center, end or a frame index, got {text!r}")


def _open_npy(path: Path) -> np.ndarray:
    frames = open_array(path)
    if frames.dtype != np.uint8 and frames.dtype.kind != "f":
        raise VideoError(f"{path}: an array of {frames.dtype}; expected uint8, or floats in [0, 1]")
    if frames.dtype.kind == "f":
        low, high = float(frames.min()), float(frames.max())
        # Written so that NaN is refused.
        if not (low >= 0 and high <= 1):
            raise VideoError(
                f"{path}: floats from {low:g} to {high:g}; expected pixels in [0, 1]: scale them, "
                "or save uint8"
            )
    return frames

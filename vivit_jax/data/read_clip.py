# SPDX-License-Identifier: Apache-2.0
"""Reads the clips that a model evaluates a video by."""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped, UInt8

from vivit_jax.config import Config
from vivit_jax.data.datasets.arrays import open_array
from vivit_jax.data.datasets.dataset import count_frames, read_frames
from vivit_jax.data.datasets.examples import Example
from vivit_jax.data.datasets.folders import ARRAYS, holds_images
from vivit_jax.data.sampling import clip_indices, view_indices
from vivit_jax.data.transforms.augment import three_crops
from vivit_jax.data.transforms.frame_ops import resize
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.video.decode import probe_video, read_video
from vivit_jax.errors import ConfigError, UserError, VideoError, counted
from vivit_jax.files.addresses import is_address

logger = logging.getLogger(__name__)

Rounding = Literal["floor", "ceil"]
_NEAREST = 0  # Pillow's filter that copies pixels without weighting them


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of a file and where they lie in it."""

    frames: Shaped[np.ndarray, "t h w c"]  # uint8, or floats in [0, 1]
    indices: Int64[np.ndarray, " t"]
    fps: float | None  # of the file, None if it states no times

    def pixel_values(
        self, processor: VideoProcessor, crops: int = 1, rounding: Rounding = "floor"
    ) -> Float32[np.ndarray, "crops t h w c"]:
        """The model's input.

        One crop is the processor's own, in the centre. Several crops of its `crop_size` are spread
        evenly along the longer side, by `three_crops` with this `rounding`. Warns if a resize takes
        the last channel for alpha.

        Raises VideoError for several crops of frames that are smaller than a crop.
        """
        if self.mixes_channels(processor):
            logger.warning(
                "the last of %d channels was taken for alpha, which weights the others in the "
                'resize; if it is data, set "independent_channels": true in '
                "preprocessor_config.json",
                self.frames.shape[-1],
            )
        process = functools.partial(processor, input_data_format="channels_last")
        if self.frames.dtype != np.uint8:
            # Floats are in [0, 1], but the processor's factor is for bytes.
            factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
            process = functools.partial(process, do_rescale=True, rescale_factor=factor)
        if crops == 1:
            return process(self.frames)
        resized = processor(
            self.frames,
            input_data_format="channels_last",
            do_center_crop=False,
            do_rescale=False,
            offset=False,
            do_normalize=False,
        )[0].astype(self.frames.dtype)
        size = processor.crop_size["height"], processor.crop_size["width"]
        tall, wide = resized.shape[1:3]
        if tall < size[0] or wide < size[1]:
            raise VideoError(
                f"frames of {tall} x {wide} pixels (h x w"
                f"{', resized' if processor.do_resize else ''}) are smaller than the {crops} crops "
                f"of {size[0]} x {size[1]}: take one crop, or let the processor resize to more "
                "(its do_resize and size)"
            )
        cut = three_crops(resized, size, crops, rounding)
        return process(cut, do_resize=False, do_center_crop=False)

    def mixes_channels(self, processor: VideoProcessor) -> bool:
        """Whether `pixel_values` resizes with the last channel as alpha, weighting the others."""
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


def read_clip(source: str | os.PathLike | np.ndarray, config: Config, **options) -> Clip:
    """Read the one clip that represents a video: `read_clips` with `clips=1`."""
    (clip,) = read_clips(source, config, **options)
    return clip


def read_clips(
    source: str | os.PathLike | np.ndarray,
    config: Config,
    *,
    stride: int | None = None,
    start: str | int = "center",
    pad: str = "error",
    clips: int = 1,
    square_pixels: bool = False,
) -> list[Clip]:
    """Read clips of `config.num_frames` frames from a video file, a folder of images or an array.

    `stride` None is the model's (`config.frame_stride`), or less if the video is too short for it.
    One clip lies at `start`; `start` and `pad` are those of `vivit_jax.data.sampling.clip_indices`.
    Several clips are spread over the video as `view_indices` does with the model's sampler. A model
    that was trained on segments also reads one clip so, over the whole video, unless `stride` or
    `start` is given or the video has fewer frames than the clip. An array, or an .npy
    or .npz file, holds the frames themselves, [t, h, w, c] with any number of channels, uint8 or
    float in [0, 1]. `square_pixels` is that of `read_video`, for video files.

    Raises VideoError for a video that cannot be read, has too few frames, is mostly undecodable or
    has another number of channels than the model takes; UserError for a wrong argument.
    """
    check_reading(start, pad, clips)
    name = "the array" if isinstance(source, np.ndarray) else os.fspath(source)
    folder = None if isinstance(source, np.ndarray) else _folder_of_images(os.fspath(source))
    frames = None if folder else _open_frames(source)
    if folder:
        total, fps = count_frames(folder), None
    elif frames is None:
        info = probe_video(source)
        total, fps = info.num_frames, info.fps if np.isfinite(info.fps) else None
    else:
        total, fps = len(frames), None
    length = config.num_frames
    segments = stride is None and start == "center" and config.view_sampler == "segments"
    if stride is None:
        stride = usual_stride(config, total)
    if segments and total >= length:
        indices = view_indices("segments", total, length, stride, clips)
    elif clips == 1:
        indices = clip_indices(total, length, stride, start, pad)[None]
    else:
        if (length - 1) * stride >= total:
            raise VideoError(
                f"{name}: {counted(total, 'frame')}, too few for {clips} clips of "
                f"{counted(length, 'frame')} at stride {stride}; take one clip, with pad to fill "
                "it up"
            )
        indices = view_indices(strided_sampler(config), total, length, stride, clips)
    flat = indices.reshape(-1)
    if folder:
        frames = read_frames(folder, flat)
    elif frames is None:
        frames = read_video(source, indices=flat, square_pixels=square_pixels, lost="few")
    else:
        frames = np.array(frames[flat])
    if frames.shape[-1] != config.num_channels:
        raise VideoError(
            f"{name} has {counted(frames.shape[-1], 'channel')}, the model takes "
            f"{config.num_channels}; give frames other than RGB as .npy, [t, h, w, c]"
        )
    frames = frames.reshape(*indices.shape, *frames.shape[1:])
    return [Clip(some, places, fps) for some, places in zip(frames, indices, strict=True)]


def usual_stride(config: Config, total: int) -> int:
    """The model's stride, or the largest with which a clip fits into `total` frames."""
    longest = (total - 1) // max(config.num_frames - 1, 1)
    return max(1, min(config.frame_stride, longest))


def strided_sampler(config: Config) -> str:
    """The model's sampler; its family's in place of segments, which have no stride."""
    own = config.view_sampler
    return type(config).view_sampler if own == "segments" else own


def check_reading(start: str | int, pad: str, clips: int) -> None:
    """UserError for arguments of `read_clips` that are wrong for every video."""
    with contextlib.suppress(VideoError):  # `start` may exist in some videos only
        clip_indices(sys.maxsize // 2, 1, start=start, pad=pad)
    if clips > 1 and start != "center":
        raise UserError(
            f"start is {start!r} and clips is {clips}; several clips are spread over the whole "
            "video: leave start out, or take one clip"
        )


def crop_rounding(sampler: str) -> Rounding:
    """How the papers round a crop's offset: VideoMAE down, scenic up."""
    return "ceil" if sampler == "loop" else "floor"


def parse_start(text: str) -> str | int:
    """Parses --start: begin, center, end or a frame index. Raises ConfigError."""
    if text in ("begin", "center", "end"):
        return text
    if text.isdecimal():
        return int(text)
    raise ConfigError(f"--start must be begin, center, end or a frame index, got {text!r}")


def _folder_of_images(path: str) -> Example | None:
    """A folder of images on this machine as an example of a data set."""
    if is_address(path) or not os.path.isdir(path):
        return None
    try:
        return Example(path, None) if holds_images(path) else None
    except UserError as error:  # it cannot be listed, which others can
        raise VideoError(str(error)) from None


def _open_frames(
    source: str | os.PathLike | np.ndarray,
) -> UInt8[np.ndarray, "t h w c"] | Float[np.ndarray, "t h w c"] | None:
    """The frames of an array or an .npy or .npz file, None for a video file."""
    if isinstance(source, np.ndarray):
        path, frames = "the array", source
        if frames.ndim != 4 or not frames.size:
            raise VideoError(f"an array of shape {frames.shape}; expected frames [t, h, w, c]")
    elif Path(source).suffix.lower() not in ARRAYS:
        return None
    else:
        path, frames = os.fspath(source), open_array(source)
    if frames.dtype != np.uint8 and frames.dtype.kind != "f":
        raise VideoError(f"{path}: an array of {frames.dtype}; expected uint8, or floats in [0, 1]")
    if frames.dtype.kind == "f":
        low, high = float(frames.min()), float(frames.max())
        # This form refuses NaN.
        if not (low >= 0 and high <= 1):
            raise VideoError(
                f"{path}: floats from {low:g} to {high:g}; expected pixels in [0, 1]: scale them, "
                "or save uint8"
            )
    return frames

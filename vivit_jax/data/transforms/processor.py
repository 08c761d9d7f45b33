# SPDX-License-Identifier: Apache-2.0
"""Frames to model input: resize, centre crop, rescale and normalise, bit for bit as transformers.

Preprocessing belongs to the weights: with another pixel range, resize or filter a checkpoint gives
plausible but wrong logits. `VideoProcessor` therefore reads and writes the
`preprocessor_config.json` beside the weights and computes the bits of transformers' PIL path
(`VivitImageProcessor`, `VideoMAEImageProcessorPil`). With torchvision installed, transformers
resizes VideoMAE frames through torchvision instead: up to one uint8 level off in under 0.5% of the
values.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from vivit_jax.data.transforms.frame_ops import as_clips, center_crop, channels_last, resize, to_rgb
from vivit_jax.data.transforms.pixel_values import pixel_writer
from vivit_jax.data.transforms.processor_fields import (
    checked_sides,
    finite,
    is_integer,
    per_channel,
)
from vivit_jax.data.transforms.processor_files import (
    candidate_files,
    first_config,
    processor_type_beside,
)
from vivit_jax.data.transforms.processor_keys import (
    DEFAULTS,
    FILTERS,
    FLAGS,
    NAMED,
    OF_A_STEP,
    VIDEOMAE,
    VIVIT,
    read_keys,
    type_named,
)
from vivit_jax.errors import ConfigError, UserError
from vivit_jax.files.atomic import whole_file
from vivit_jax.hub import resolve_config, resolve_processor

logger = logging.getLogger(__name__)

# Above this, rescale_factor is not for bytes but for floats in [0, 1].
_LARGEST_BYTE_FACTOR = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoProcessor:
    """Turns video frames into a model's float32 pixels, bit for bit as transformers' PIL path.

    Per frame: resize (Pillow, in uint8), centre crop (zero-padded when the frame is smaller),
    multiply by `rescale_factor`, subtract 1 if `offset`, normalise by `image_mean`, `image_std`.

    Build one with `vivit()`, `videomae()`, `named()`, `from_pretrained()` or `from_dict()`; fields
    carry the names of preprocessor_config.json. `size` is {"shortest_edge": n} (the long side is
    truncated), {"height": h, "width": w}, an int (shortest edge) or (h, w), and for VideoMAE
    {"shortest_edge": n, "longest_edge": m} (no side above m) or {"max_height": h, "max_width": w}
    (the largest that fits); `crop_size` is {"height", "width"}, an int (square) or (h, w).
    `resample` is Pillow's filter number. For VideoMAE, `do_convert_rgb` repeats grey and blends
    transparent frames over white, and `input_data_format` applies to calls that give none.
    `extra` holds the other keys of the file it was read from, which are written back.

    transformers resizes 2 and 4 channels with the last as alpha, which weights the others. With
    `independent_channels`, which transformers lacks, every channel is resized by itself, as suits
    depth, infrared or optical flow.

    ViViT has two ranges. Scenic trained it on pixels in [-1, 1], which is what rescaling by 1/127.5
    with `offset` gives; transformers' defaults and the hub file of google/vivit-b-16x2-kinetics400
    then also normalise by 0.5/0.5, which gives [-3, 1]. The hub file of google/vivit-b-16x2 does
    not normalise. So `vivit()` reproduces what transformers computes, for comparison with it, and
    `named("vivit-scenic")` what scenic weights were trained on, for accuracy.

    Raises `ConfigError` for an invalid field or combination.
    """

    image_processor_type: str
    do_resize: bool
    size: Mapping[str, int]  # the constructor also takes an int or (h, w)
    resample: int
    do_center_crop: bool
    crop_size: Mapping[str, int]  # the constructor also takes an int or (h, w)
    do_rescale: bool
    rescale_factor: float
    offset: bool
    do_normalize: bool
    image_mean: float | tuple[float, ...]
    image_std: float | tuple[float, ...]
    independent_channels: bool = False
    do_convert_rgb: bool = False
    input_data_format: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        if self.image_processor_type not in DEFAULTS:
            raise ConfigError(
                f"image_processor_type is {self.image_processor_type!r}, expected one of "
                f"{', '.join(DEFAULTS)}"
            )
        for name in FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}, expected True or False")
        if not is_integer(self.resample) or not 0 <= self.resample <= 5:
            raise ConfigError(
                f"resample is {self.resample!r}, expected a Pillow filter: "
                + ", ".join(f"{number} {name}" for number, name in enumerate(FILTERS))
            )
        checked = {
            "size": self._checked_size(),
            "crop_size": checked_sides(
                "crop_size", self.crop_size, self.do_center_crop, square=True
            ),
            "resample": int(self.resample),
            "rescale_factor": finite("rescale_factor", self.rescale_factor),
            "image_mean": per_channel("image_mean", self.image_mean),
            "image_std": per_channel("image_std", self.image_std),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if 0.0 in np.atleast_1d(self.image_std):
            raise ConfigError(f"image_std is {self.image_std}, expected no zero: it divides")
        formats = (None, "channels_last", "channels_first", "none")
        if self.input_data_format not in formats:
            raise ConfigError(
                f"input_data_format is {self.input_data_format!r}, expected one of {formats}"
            )
        for name in ("do_convert_rgb", "input_data_format"):
            if getattr(self, name) and self.image_processor_type == VIVIT:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which transformers' {VIVIT} lacks: "
                    "prepare the frames before the call, or use VideoProcessor.videomae(...)"
                )
        if self.offset and self.image_processor_type == VIDEOMAE:
            raise ConfigError(
                "offset is True, which transformers' VideoMAEImageProcessor lacks: use "
                "VideoProcessor.vivit(...) to rescale with an offset"
            )
        if self.offset and not self.do_rescale:
            raise ConfigError(
                "offset is True but do_rescale is False: offset is part of rescaling, so set "
                "offset=False too, or leave do_rescale on"
            )

    def _checked_size(self) -> dict[str, int]:
        size, kind = self.size, self.image_processor_type
        if isinstance(size, Mapping) and size.keys() == {"shortest_edge", "longest_edge"}:
            # VivitImageProcessor resizes to the short edge, whatever the long one.
            size = {"shortest_edge": size["shortest_edge"]} if kind == VIVIT else size
        return checked_sides("size", size, self.do_resize, kind)

    @classmethod
    def vivit(cls, **overrides: Any) -> "VideoProcessor":
        """Returns `VivitImageProcessor`'s defaults: resize 256, crop 224, range [-3, 1]."""
        return cls.from_dict({}, image_processor_type=VIVIT, **overrides)

    @classmethod
    def videomae(cls, **overrides: Any) -> "VideoProcessor":
        """Returns `VideoMAEImageProcessor`'s defaults: resize 224, crop 224, range [-1, 1].

        Published checkpoints were trained with ImageNet statistics instead:
        `named("videomae-imagenet")`.
        """
        return cls.from_dict({}, image_processor_type=VIDEOMAE, **overrides)

    @classmethod
    def named(cls, name: str, **overrides: Any) -> "VideoProcessor":
        """Returns a published processor by name.

        vivit-kinetics400: hub file of google/vivit-b-16x2-kinetics400, resize 224, [-3, 1].
        vivit-scenic: hub file of google/vivit-b-16x2, resize 256, [-1, 1], scenic's range.
        videomae-imagenet: hub files of MCG-NJU/videomae-*, resize 224, ImageNet mean and std.
        """
        if name not in NAMED:
            raise ConfigError(f"no processor is named {name!r}, expected one of {', '.join(NAMED)}")
        kind, values = NAMED[name]
        return cls.from_dict(values, image_processor_type=kind, **overrides)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> "VideoProcessor":
        """Builds a processor from the content of a preprocessor_config.json.

        Missing keys take transformers' class defaults, as do null values, except that a null flag
        is off. Keys that transformers' class does not use are kept in `extra`, with a warning that
        names them. `overrides` replace fields of the file, including `image_processor_type`. Raises
        `ConfigError` for a value that transformers refuses too, or that would make it compute
        something this library cannot.
        """
        return cls._read(config, "", overrides)

    @classmethod
    def _read(cls, config: Any, where: str, overrides: dict[str, Any]) -> "VideoProcessor":
        if not isinstance(config, Mapping):
            raise ConfigError(f"a processor is a {type(config).__name__}, expected a JSON object")
        read = read_keys(config, overrides.pop("image_processor_type", None))
        values = {**DEFAULTS[read.kind], **read.values, **_known_options(overrides)}
        notes = [*read.notes, *cls._without_unused(read.kind, values)]
        processor = cls(image_processor_type=read.kind, extra=read.extra, **values)
        if notes:
            warn = _warn_once if where else functools.partial(logger.warning, "%s")
            warn(f"{where}{'; '.join(notes)}")
        return processor

    @classmethod
    def _without_unused(cls, kind: str, values: dict[str, Any]) -> list[str]:
        """Replaces values that transformers would refuse in a step that is off; returns notes.

        No step takes a nested value: such a file is damaged, and refused.
        """
        notes, plain = [], DEFAULTS[kind] | {"offset": False}
        for flag, names in OF_A_STEP.items():
            for name in names if values[flag] is False else ():
                tried: dict[str, Any] = {**plain, flag: False, name: values[name]}
                try:
                    cls(image_processor_type=kind, **tried)
                except ConfigError:
                    value = values[name]
                    parts = value.values() if isinstance(value, Mapping) else value
                    if isinstance(value, Mapping | list | tuple) and any(
                        isinstance(part, Mapping | list | tuple) for part in parts
                    ):
                        raise
                    notes.append(f"{name} is {values[name]!r}, which {flag}=False does not read")
                    values[name] = plain[name]
        return notes

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, revision: str | None = None, **overrides: Any
    ) -> "VideoProcessor":
        """Reads the processor of a checkpoint: a directory, a JSON file or a hub id.

        A directory may hold preprocessor_config.json, video_preprocessor_config.json or a
        processor_config.json with a nested section; of a hub id (`org/name`, `org/name@revision`)
        the first of these that exists is read, at `revision`. If the file names no type, the
        config.json beside it decides. `overrides` replace its fields. Warns once of keys without
        effect, as `from_dict` does. Raises `UserError` if nothing is found, `ConfigError` if the
        file is wrong.
        """
        path = Path(source)
        try:
            is_dir, is_file = path.is_dir(), path.is_file()
        except (OSError, ValueError):  # a name that is too long, or has a zero byte
            is_dir = is_file = False
        if is_dir:
            candidates = candidate_files(path)
        elif is_file:
            candidates = [(path, name) for name in ("image_processor", "video_processor", None)]
        else:
            path = resolve_processor(str(source), revision)
            candidates = [each for each in candidate_files(path.parent) if each[0] == path]
        found = first_config(candidates)
        if found is None:
            raise UserError(
                f"{path if path.is_dir() else path.parent} holds no processor file, expected "
                "preprocessor_config.json: copy there the one that was published with the weights, "
                "or save one: VideoProcessor.vivit() or .videomae() (transformers' defaults), or "
                ".named(...) for published weights, then .save_pretrained(directory)"
            )
        path, config = found
        if isinstance(config, Mapping) and not type_named(config):
            if not Path(source).exists():
                resolve_config(str(source), revision)  # downloads it beside `path`
            kind = processor_type_beside(path)
            overrides = ({"image_processor_type": kind} if kind else {}) | overrides
        try:
            return cls._read(config, f"{path}: ", overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a preprocessor_config.json that transformers reads back."""
        config: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        extra = config.pop("extra")
        if self.image_processor_type == VIDEOMAE:
            del config["offset"]
        for key in ("independent_channels", "do_convert_rgb", "input_data_format"):
            if not config[key]:
                del config[key]
        return extra | config

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Writes preprocessor_config.json into `directory` (created if missing), atomically.

        Returns the file's path. Warns of rescaling without an offset, which transformers' video
        processor of ViViT cannot do.
        """
        if self.image_processor_type == VIVIT and self.do_rescale and not self.offset:
            logger.warning(
                "offset is False: transformers' VivitImageProcessor reads it, but "
                "AutoVideoProcessor, and with torchvision the pipeline, subtract 1 after rescaling "
                "whatever the file says, and so give the model other pixels"
            )
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "preprocessor_config.json"
        with whole_file(path) as partial:
            text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
            partial.write_text(text, encoding="utf-8")
        return path

    def __call__(
        self,
        videos: Any,
        *,
        input_data_format: str | None = None,
        data_format: str = "channels_last",
        **overrides: Any,
    ) -> Float32[np.ndarray, "b t _ _ _"]:
        """Returns the pixels of one video or a batch: float32 [b, t, h, w, c].

        videos: a video is a list of frames or an array [t, h, w, c]; a batch is a list of videos or
            an array [b, t, h, w, c]; a single frame counts as a video of one frame. Frames are
            uint8 arrays [h, w, c], [c, h, w] or [h, w], Pillow images (L, LA, RGB, RGBA), torch or
            jax arrays on the CPU. Frames of one video may differ in size.
        input_data_format: "channels_last", "channels_first" or "none" (frames [h, w]); by default
            the processor's own, else found per frame: the axis of 1, 3 or 4 entries, the first if
            both are, else the axis as long as `image_mean`.
        data_format: "channels_first" returns [b, t, c, h, w], a view in PyTorch's layout.
        overrides: any field of the processor, for this call; None keeps the processor's own.

        As in transformers, 2 and 4 channels are resized with the last one as alpha, which weights
        the others (unless `independent_channels`), and float frames in [0, 1] are resized in 8 bits
        (do_resize=False keeps them exact).
        Unlike transformers, float frames in [0, 1] are refused if `rescale_factor` is for bytes
        (transformers would scale them twice), the result is always float32, and other channel
        counts are resized channel by channel.

        Raises `UserError` for frames that cannot be processed or videos that cannot be stacked.
        """
        if data_format not in ("channels_last", "channels_first"):
            raise UserError(
                f"data_format is {data_format!r}, expected 'channels_last' or 'channels_first'"
            )
        processor = dataclasses.replace(self, **_known_options(overrides))
        pixels = processor._process(videos, input_data_format or self.input_data_format)
        return pixels if data_format == "channels_last" else pixels.transpose(0, 1, 4, 2, 3)

    preprocess = __call__

    def _process(self, videos: Any, input_format: str | None) -> Float32[np.ndarray, "b t h w c"]:
        clips = as_clips(videos, input_format)
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) > 1:
            raise UserError(
                f"videos of {', '.join(map(str, lengths))} frames cannot be stacked into one "
                "batch: sample the same number of frames from each, or process them one by one"
            )
        out = write = None
        for b, clip in enumerate(clips):
            self._refuse_unit_floats(clip)
            for t, frame in enumerate(clip):
                frame = self._resize_and_crop(frame, input_format)
                if out is None or write is None:
                    out = np.empty((len(clips), lengths[0], *frame.shape), np.float32)
                    write = pixel_writer(self, *frame.shape[1:])
                elif frame.shape != out.shape[2:]:
                    raise UserError(
                        f"frame {t} of video {b} has shape {frame.shape} (h, w, c) after resize "
                        f"and crop, the first frame {out.shape[2:]}: turn do_center_crop on, "
                        "resize to a fixed height and width, or process the videos one by one"
                    )
                write(frame, out[b, t])
        assert out is not None, "as_clips gives at least one frame"
        return out

    def _refuse_unit_floats(self, clip: list) -> None:
        if not self.do_rescale or self.rescale_factor > _LARGEST_BYTE_FACTOR:
            return
        floats = [f for f in clip if isinstance(f, np.ndarray) and f.dtype.kind == "f"]
        if floats and min(f.min() for f in floats) >= 0 and 0 < max(f.max() for f in floats) <= 1:
            raise UserError(
                f"frames are floats in [0, 1] and do_rescale is on with factor "
                f"{self.rescale_factor:.6g}, which expects 0 to 255: pass uint8 frames, or "
                f"rescale_factor={255 * self.rescale_factor:.6g}"
                + ("" if self.offset else " or do_rescale=False")
            )

    def _resize_and_crop(self, frame: Any, input_format: str | None) -> Shaped[np.ndarray, "h w c"]:
        if isinstance(frame, np.ndarray):
            channels = len(self.image_mean) if isinstance(self.image_mean, tuple) else None
            frame = channels_last(frame, input_format, channels)
        if self.do_convert_rgb:
            frame = to_rgb(frame)
        if self.do_resize:
            frame = resize(frame, self.size, self.resample, self.independent_channels)
        elif not isinstance(frame, np.ndarray):
            frame = np.asarray(frame)
        if frame.ndim == 2:
            frame = frame[..., None]
        if self.do_center_crop:
            frame = center_crop(frame, self.crop_size["height"], self.crop_size["width"])
        return frame


def _known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that are not None, after checking all names."""
    allowed = DEFAULTS[VIVIT].keys()
    unknown = sorted(options.keys() - allowed)
    if unknown:
        hint = "the result is always a numpy array"
        raise ConfigError(
            f"{', '.join(unknown)}: no such processor option, expected {', '.join(allowed)}"
            + (f"; {hint}" if "return_tensors" in unknown else "")
        )
    return {name: value for name, value in options.items() if value is not None}


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    """Logs a warning about a file once, however often it is read."""
    logger.warning("%s", text)

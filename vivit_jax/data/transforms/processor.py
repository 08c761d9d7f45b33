# SPDX-License-Identifier: Apache-2.0
"""Frames to model input: resize, centre crop, rescale and normalise, to transformers' bytes.

Preprocessing belongs to the weights: a checkpoint read with another pixel range, resize or filter
gives plausible and wrong logits. `VideoProcessor` therefore reads and writes the
`preprocessor_config.json` that lies beside the weights and computes the bytes of transformers' PIL
path (`VivitImageProcessor`, `VideoMAEImageProcessorPil`). With torchvision installed, transformers
resizes VideoMAE frames through torchvision instead: up to one uint8 level away on under 0.5% of
the values.
"""

import dataclasses
import functools
import json
import logging
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vivit_jax.data.transforms.frame_ops import as_clips, center_crop, channels_last, resize, to_rgb
from vivit_jax.data.transforms.pixel_values import pixel_writer
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
    type_of_model,
)
from vivit_jax.errors import ConfigError, UserError
from vivit_jax.files.atomic import whole_file
from vivit_jax.files.json_files import read_json
from vivit_jax.files.limits import check_unpacked
from vivit_jax.hub import resolve_config, resolve_processor

logger = logging.getLogger(__name__)

# transformers 5 looks for a nested section first; its video processors save the video files.
_CONFIG_FILES = (
    ("processor_config.json", "image_processor"),
    ("preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
)

# Forms of a size, and the classes of transformers that resize to them.
_RESIZES = {
    ("shortest_edge",): (VIVIT, VIDEOMAE),
    ("height", "width"): (VIVIT, VIDEOMAE),
    ("longest_edge", "shortest_edge"): (VIDEOMAE,),
    ("max_height", "max_width"): (VIDEOMAE,),
    ("longest_edge",): (),
    ("max_pixels", "min_pixels"): (),
}

# Above this, rescale_factor is not meant for bytes, so floats in [0, 1] are what it expects.
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
    `resample` is Pillow's filter number. For VideoMAE, `do_convert_rgb` repeats grey and lays
    transparent frames on white, and `input_data_format` is that of arrays whose call names none.
    `extra` holds the other keys of the file it was read from, which are written back.

    transformers resizes 2 and 4 channels with the last as alpha that weights the others. With
    `independent_channels`, which it does not have, channels that are data (depth, infrared, optical
    flow) are resized each by itself.

    The two ViViT ranges. Scenic trained ViViT on pixels in [-1, 1]. Rescaling by 1/127.5 with
    `offset` gives exactly that; transformers' defaults and the hub file of
    google/vivit-b-16x2-kinetics400 then also normalise by 0.5/0.5, which makes [-3, 1]. The hub
    file of google/vivit-b-16x2 does not normalise. So `vivit()` reproduces what transformers
    computes and `named("vivit-scenic")` what the weights were trained on: use the latter for
    accuracy with scenic weights, the former to compare with transformers.

    Raises `ConfigError` for an invalid field or combination.
    """

    image_processor_type: str
    do_resize: bool
    size: Mapping[str, int] | int | tuple[int, int]
    resample: int
    do_center_crop: bool
    crop_size: Mapping[str, int] | int | tuple[int, int]
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
        if not _is_integer(self.resample) or not 0 <= self.resample <= 5:
            raise ConfigError(
                f"resample is {self.resample!r}, expected a Pillow filter: "
                + ", ".join(f"{number} {name}" for number, name in enumerate(FILTERS))
            )
        checked = {
            "size": self._checked_size(),
            "crop_size": _size("crop_size", self.crop_size, self.do_center_crop, square=True),
            "resample": int(self.resample),
            "rescale_factor": _number("rescale_factor", self.rescale_factor),
            "image_mean": _per_channel("image_mean", self.image_mean),
            "image_std": _per_channel("image_std", self.image_std),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if 0.0 in np.atleast_1d(self.image_std):
            raise ConfigError(f"image_std is {self.image_std}, expected no zero: it is a divisor")
        formats = (None, "channels_last", "channels_first", "none")
        if self.input_data_format not in formats:
            raise ConfigError(
                f"input_data_format is {self.input_data_format!r}, expected one of {formats}"
            )
        for name in ("do_convert_rgb", "input_data_format"):
            if getattr(self, name) and self.image_processor_type == VIVIT:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which transformers' {VIVIT} does not "
                    "have: prepare the frames before the call, or use VideoProcessor.videomae(...)"
                )
        if self.offset and self.image_processor_type == VIDEOMAE:
            raise ConfigError(
                "offset is True, which transformers' VideoMAEImageProcessor does not have: use "
                "VideoProcessor.vivit(...) for rescaling with an offset"
            )
        if self.offset and not self.do_rescale:
            raise ConfigError(
                "offset is True but do_rescale is False: offset is part of rescaling, so set "
                "offset=False as well or leave do_rescale on"
            )

    def _checked_size(self) -> dict[str, int]:
        size, kind = self.size, self.image_processor_type
        if isinstance(size, Mapping) and size.keys() == {"shortest_edge", "longest_edge"}:
            # VivitImageProcessor resizes to the short edge whatever the long one may be.
            size = {"shortest_edge": size["shortest_edge"]} if kind == VIVIT else size
        return _size("size", size, self.do_resize, kind)

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

        Missing keys take transformers' class default, as do null values of other than the flags,
        which are off. Keys with which transformers' class does not compute are kept in `extra`,
        with a warning that names them. `overrides` replace fields of the file,
        `image_processor_type` included. Raises `ConfigError` for a value that transformers does
        not take either, or that would make it compute what this library cannot.
        """
        return cls._read(config, "", overrides)

    @classmethod
    def _read(cls, config: Any, where: str, overrides: dict[str, Any]) -> "VideoProcessor":
        if not isinstance(config, Mapping):
            raise ConfigError(f"a processor is a {type(config).__name__}, expected a JSON object")
        read = read_keys(config, overrides.pop("image_processor_type", None))
        values = DEFAULTS[read.kind] | read.values | _known_options(overrides)
        notes = [*read.notes, *cls._without_unused(read.kind, values)]
        processor = cls(image_processor_type=read.kind, extra=read.extra, **values)
        if notes:
            warn = _warn_once if where else functools.partial(logger.warning, "%s")
            warn(f"{where}{'; '.join(notes)}")
        return processor

    @classmethod
    def _without_unused(cls, kind: str, values: dict[str, Any]) -> list[str]:
        """Put defaults for what transformers would refuse in a step that is off; what to tell.

        What is nested is no value of any step: such a file is damaged, and refused.
        """
        notes, plain = [], DEFAULTS[kind] | {"offset": False}
        for flag, names in OF_A_STEP.items():
            for name in names if values[flag] is False else ():
                try:
                    cls(image_processor_type=kind, **plain | {flag: False, name: values[name]})
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
        the first of these that it holds is read, at `revision`. Where it names no type, the
        config.json beside it does. `overrides` replace fields of it. Warns once of keys without
        effect, as `from_dict` does. Raises `UserError` if nothing is found, `ConfigError` if the
        file is wrong.
        """
        path = Path(source)
        try:
            is_dir, is_file = path.is_dir(), path.is_file()
        except (OSError, ValueError):  # longer than a name may be, or with a zero byte
            is_dir = is_file = False
        if is_dir:
            candidates = _candidates(path)
        elif is_file:
            candidates = [(path, name) for name in ("image_processor", "video_processor", None)]
        else:
            path = resolve_processor(str(source), revision)
            candidates = [each for each in _candidates(path.parent) if each[0] == path]
        found = _first_config(candidates)
        if found is None:
            raise UserError(
                f"{path if path.is_dir() else path.parent} holds no processor file, expected "
                "preprocessor_config.json: put the one there that the weights were published with, "
                "or save one with save_pretrained, of VideoProcessor.vivit() or .videomae() "
                "(transformers' defaults) or, for published weights, of VideoProcessor.named(...)"
            )
        path, config = found
        if isinstance(config, Mapping) and not type_named(config):
            if not Path(source).exists():
                resolve_config(str(source), revision)  # puts it beside
            kind = _type_beside(path)
            overrides = ({"image_processor_type": kind} if kind else {}) | overrides
        try:
            return cls._read(config, f"{path}: ", overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a preprocessor_config.json that transformers reads back."""
        config = {
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
        processor of ViViT does not have.
        """
        if self.image_processor_type == VIVIT and self.do_rescale and not self.offset:
            logger.warning(
                "offset is False: transformers' VivitImageProcessor reads it, but "
                "AutoVideoProcessor, and with torchvision the pipeline, subtract 1 from what is "
                "rescaled whatever the file says, and so give the model other pixels"
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
    ) -> np.ndarray:
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

        As in transformers, 2 and 4 channels are resized with the last one as alpha weighting the
        others (unless `independent_channels`), and float frames in [0, 1] are resized in 8 bits
        (do_resize=False keeps them exact).
        Unlike it: float frames in [0, 1] are refused while `rescale_factor` is one for bytes
        (transformers would scale them twice), the result is float32 whatever the steps, and
        other channel counts are resized channel by channel.

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

    def _process(self, videos: Any, input_format: str | None) -> np.ndarray:
        clips = as_clips(videos, input_format)
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) > 1:
            raise UserError(
                f"videos of {', '.join(map(str, lengths))} frames cannot be stacked into one "
                "batch: sample the same number of frames from each, or process them one by one"
            )
        out = None
        for b, clip in enumerate(clips):
            self._refuse_unit_floats(clip)
            for t, frame in enumerate(clip):
                frame = self._resize_and_crop(frame, input_format)
                if out is None:
                    out = np.empty((len(clips), lengths[0], *frame.shape), np.float32)
                    write = pixel_writer(self, *frame.shape[1:])
                elif frame.shape != out.shape[2:]:
                    raise UserError(
                        f"frame {t} of video {b} has shape {frame.shape} (h, w, c) after resize "
                        f"and crop, the first frame {out.shape[2:]}: turn do_center_crop on, "
                        "resize to a fixed height and width, or process the videos one by one"
                    )
                write(frame, out[b, t])
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

    def _resize_and_crop(self, frame: Any, input_format: str | None) -> np.ndarray:
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
    """Returns the options that are given, that is not None, after checking the names of all."""
    allowed = DEFAULTS[VIVIT].keys()
    unknown = sorted(options.keys() - allowed)
    if unknown:
        hint = "the result is one numpy array, whatever return_tensors says elsewhere"
        raise ConfigError(
            f"{', '.join(unknown)}: no such processor option, expected {', '.join(allowed)}"
            + (f"; {hint}" if "return_tensors" in unknown else "")
        )
    return {name: value for name, value in options.items() if value is not None}


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    """A warning of a file that is read several times."""
    logger.warning("%s", text)


def _type_beside(path: Path) -> str | None:
    """The processor's type that belongs to the model of the config.json beside a file."""
    try:
        return type_of_model(read_json(path.parent / "config.json"))
    except (OSError, UserError):
        return None  # whoever needs the model says what is wrong with its config


def processor_file(directory: Path) -> Path | None:
    """The file that `from_pretrained` reads in a directory, None if there is none.

    Raises `ConfigError` for a file that is not JSON.
    """
    found = _first_config(_candidates(directory))
    return found and found[0]


def _candidates(directory: Path) -> list[tuple[Path, str | None]]:
    return [(directory / name, section) for name, section in _CONFIG_FILES]


def _first_config(candidates: list[tuple[Path, str | None]]) -> tuple[Path, Any] | None:
    """Returns the first file, or section of a file, that exists, with its content."""
    for path, section in candidates:
        if not path.exists():
            continue
        hint = "expected a preprocessor_config.json, or the directory that holds one"
        config = read_json(path, ConfigError, hint)
        if section is None:
            return path, config
        if isinstance(config, dict) and section in config:
            return path, config[section]
    return None


def _size(
    name: str, value: Any, used: bool, kind: str | None = None, *, square: bool = False
) -> dict[str, int]:
    """A size in pixels by side; where its step is on (`used`), one that the class can make."""
    forms = [form for form, kinds in _RESIZES.items() if kind in kinds or not used]
    if square and used:
        forms = [("height", "width")]
    listed = ("{" + ", ".join(f"{side!r}: n" for side in form) + "}" for form in forms)
    expected = f"{', '.join(listed)}, (h, w) or one int"
    if isinstance(value, Mapping):
        sides = dict(value)
    elif isinstance(value, list | tuple) and len(value) == 2:
        sides = {"height": value[0], "width": value[1]}
    elif square:
        sides = {"height": value, "width": value}
    else:
        sides = {"shortest_edge": value}
    if sides.keys() not in [set(form) for form in forms] or not all(
        _is_integer(side) and side > 0 for side in sides.values()
    ):
        raise ConfigError(f"{name} is {value!r}, expected {expected}, in pixels above 0")
    sides = {key: int(side) for key, side in sides.items()}
    pixels = math.prod(sides.values()) if len(sides) == 2 else next(iter(sides.values())) ** 2
    # Three channels of float32.
    check_unpacked(f"a frame of {name} {value!r}", 12 * pixels, error=ConfigError)
    return sides


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    try:
        found = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, expected a finite number")
    return found


def _per_channel(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value):
        return tuple(_number(name, entry) for entry in value)
    return _number(name, value)

# SPDX-License-Identifier: Apache-2.0
"""Reads the keys of a preprocessor_config.json as the transformers class that it names does.

transformers opens files with any keys. Each of its image processors uses some of them and ignores
the rest.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vivit_jax.config import IMAGENET_MEAN, IMAGENET_STD
from vivit_jax.errors import ConfigError

VIVIT = "VivitImageProcessor"
VIDEOMAE = "VideoMAEImageProcessor"
FLAGS = (
    "do_resize", "do_center_crop", "do_rescale", "offset", "do_normalize", "independent_channels",
    "do_convert_rgb",
)  # fmt: skip
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers

_SHARED = {
    "do_resize": True,
    "resample": 2,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "independent_channels": False,
    "do_convert_rgb": False,
    "input_data_format": None,
}
# The class defaults of transformers, which fill the keys that a preprocessor_config.json lacks.
DEFAULTS = {
    VIVIT: _SHARED | {"size": 256, "rescale_factor": 1 / 127.5, "offset": True},
    VIDEOMAE: _SHARED | {"size": 224, "rescale_factor": 1 / 255, "offset": False},
}
_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
# Published files, by the names of `VideoProcessor.named`.
NAMED = {
    "vivit-kinetics400": (VIVIT, {"size": 224}),
    "vivit-scenic": (VIVIT, {"do_normalize": False}),
    "videomae-imagenet": (VIDEOMAE, _IMAGENET),
}
# What a step reads while its flag is on.
OF_A_STEP = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}

_TYPE_KEYS = ("image_processor_type", "feature_extractor_type", "video_processor_type")
# google/vivit-b-16x2-kinetics400 says "ViViTImageProcessor"; Fast, Pil, the feature extractor and
# the video processor are other releases' names of the same function.
_TYPE_NAME = re.compile(
    r"(vivit|videomae)(ImageProcessor(Fast|Pil)?|VideoProcessor|FeatureExtractor)", re.IGNORECASE
)
_STEPS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "independent_channels",
)  # fmt: skip
_READ = {
    VIVIT: {*_STEPS, "offset"},
    VIDEOMAE: {*_STEPS, "do_convert_rgb", "input_data_format"},
}
_REWRITTEN = (*_TYPE_KEYS, "_valid_processor_keys")
# Keys in transformers' own files that change no pixel of an RGB frame. do_zero_centering meant
# "pixels in [-1, 1]", as `offset` has since; nothing reads it.
_COMMON = ("processor_class", "data_format", "do_convert_rgb", "do_zero_centering")
# Keys of transformers that mean nothing if null or false.
_OF_TRANSFORMERS = (
    "default_to_square", "device", "disable_grouping", "do_pad", "do_sample_frames", "fps",
    "image_seq_length", "input_data_format", "num_frames", "pad_size", "return_metadata",
    "return_tensors", "size_divisor", "video_metadata",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reading:
    """The `VideoProcessor` fields that a file sets, its other keys, and notes for the user."""

    kind: str
    values: Mapping[str, Any]
    extra: Mapping[str, Any]
    notes: tuple[str, ...]


def read_keys(config: Mapping[str, Any], named: Any = None) -> Reading:
    """Read the content of a processor's file; `named` overrides the type that it names.

    A null flag is off, as in transformers; any other null value takes the class default. Raises
    ConfigError for a type that is neither ViViT's nor VideoMAE's.
    """
    kind, video = _kind(type_named(config) if named is None else named)
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    notes = []
    for key, value in config.items():
        if key in _REWRITTEN:
            continue
        if key not in _READ[kind] or (key == "offset" and video):
            extra[key] = value
        elif key in FLAGS:
            values[key] = bool(value) if value in (None, 0, 1) else value
        elif value is not None:
            values[key] = value
    for key in ("size", "crop_size"):
        if isinstance(values.get(key), Mapping):
            values[key] = {side: n for side, n in values[key].items() if n is not None}
    size, resample = values.get("size"), values.get("resample")
    if kind == VIVIT and not isinstance(resample, int | None):
        values["resample"] = _filter_named(resample)
    elif not isinstance(resample, int | None):
        values["resample"] = 2
        notes.append(f"resample {resample!r} is not a number, so transformers resizes bilinearly")
    if kind == VIDEOMAE and extra.get("default_to_square") and isinstance(size, int):
        values["size"] = {"height": size, "width": size}
    if kind == VIVIT and video:
        # VivitVideoProcessor has no offset key: it subtracts 1 whenever it rescales.
        values["offset"] = values.get("do_rescale", True)
        if isinstance(size, Mapping) and "longest_edge" in size:
            raise ConfigError(
                f"size is {size!r}: VivitVideoProcessor keeps the long edge within longest_edge, "
                "which ViViT's image processor cannot do; expected {'shortest_edge': n} or "
                "{'height': h, 'width': w}"
            )
    elif kind == VIVIT and isinstance(size, Mapping) and size.keys() == {*_EDGES}:
        notes.append(f"size's longest_edge has no effect in {VIVIT}")
    unused = sorted(key for key, value in extra.items() if not _means_nothing(key, value))
    if kind == VIDEOMAE and isinstance(size, int) and "default_to_square" in unused:
        unused.remove("default_to_square")
    if unused:
        notes.append(
            f"{', '.join(unused)}: no effect on pixels in {kind}, kept and written back on save"
        )
    return Reading(kind, values, extra, tuple(notes))


_EDGES = ("shortest_edge", "longest_edge")


def type_named(config: Mapping[str, Any]) -> Any:
    """The type that a file names, None if it names none."""
    return next((config[key] for key in _TYPE_KEYS if config.get(key)), None)


def type_of_model(config: Any) -> str | None:
    """The processor type of the model of a config.json; None if it is not one of ours."""
    model = config.get("model_type") if isinstance(config, Mapping) else None
    match = re.match("(vivit|videomae)", model, re.IGNORECASE) if isinstance(model, str) else None
    return match and {"vivit": VIVIT, "videomae": VIDEOMAE}[match[1].lower()]


def _kind(written: Any) -> tuple[str, bool]:
    """The image processor of a type's name, and whether the name is a video processor's."""
    match = _TYPE_NAME.fullmatch(written) if isinstance(written, str) else None
    if match is None:
        raise ConfigError(
            f"image_processor_type is {written!r}, expected {VIVIT} or {VIDEOMAE} (or an older "
            "name of these); if the file names none, pass image_processor_type=..."
        )
    kind = VIVIT if match[1].lower() == "vivit" else VIDEOMAE
    return kind, match[2].lower() == "videoprocessor"


def _filter_named(resample: Any) -> Any:
    """Pillow's number of a filter's name, which transformers' ViViT refuses; others as given."""
    name = resample.lower() if isinstance(resample, str) else None
    return FILTERS.index(name) if name in FILTERS else resample


def _means_nothing(key: str, value: Any) -> bool:
    silent = value is None or value is False
    return key in _COMMON or (key in _OF_TRANSFORMERS and silent)

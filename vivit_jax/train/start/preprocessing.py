# SPDX-License-Identifier: Apache-2.0
"""How frames become pixels in a run: as the checkpoint it starts from says, else the recipe.

Preprocessing belongs to the weights, so the processor beside `model.start` overrides the recipe's
`processor` and `evaluation.resize`, except for `given` fields. Differences are reported.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vivit_jax.data.transforms.processor import VIDEOMAE, VideoProcessor
from vivit_jax.data.transforms.processor_files import processor_file
from vivit_jax.data.transforms.processor_keys import FILTERS
from vivit_jax.errors import UserError
from vivit_jax.files.json_files import read_json
from vivit_jax.recipes.checks import check_frames, model_config, preset_named
from vivit_jax.recipes.recipe import EvalSettings, Recipe
from vivit_jax.train.normalise import arithmetic

NORMALISATION = (
    "do_rescale", "rescale_factor", "offset", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
_BILINEAR = FILTERS.index("bilinear")  # a run resizes frames so, whatever the processor's filter
# Views of a smaller share of the shorter side show less than recipes and processors do.
_USUAL_SHARE = 0.7


class Preprocessing(NamedTuple):
    """What a run does to frames, with notes to report.

    `processor` is saved with the run's models. `recipe` is the run's, with the `evaluation.resize`
    and `augment.resize` that apply.
    """

    processor: VideoProcessor
    recipe: Recipe
    notes: tuple[str, ...] = ()


def preprocessing(
    recipe: Recipe,
    config: Any,
    place: Path | None = None,
    own_size: tuple[int, int] | None = None,
    image: bool = False,
) -> Preprocessing:
    """The preprocessing of a run that trains a model of `config` from a checkpoint at `place`.

    `own_size` is the frame size of the checkpoint's own model, None if not known. If the checkpoint
    is an `image` model, its processor decides how pixels are normalised, and the recipe how frames
    are resized and cropped, since the geometry for images does not suit ViViT's videos. Raises
    UserError if the resulting sizes leave nothing to crop from.
    """
    theirs, notes = _beside(place, image, recipe)
    published = VideoProcessor.named(recipe.processor)
    processor, differs = _normalisation(recipe, published, theirs, image)
    notes += differs
    written, side = min(model_config(recipe).frame_size), min(config.frame_size)
    resize, follow = recipe.evaluation.resize, side != written
    if "evaluation.resize" not in recipe.given:
        if theirs is not None and not image:
            preset = min(preset_named(recipe.model.preset).config.frame_size)
            resize = resize_for(theirs, side) if _crop(theirs) == side or side != preset else resize
            resize = max(resize, *config.frame_size)
        elif follow and resize >= written:  # a smaller one is not for the recipe's frames
            resize = max(round(resize * side / written), *config.frame_size)
    augment = recipe.augment
    if follow and (augment.resize or 0) >= written and "augment.resize" not in recipe.given:
        follows = math.ceil(augment.resize * side / written)
        notes.append(
            f"augment.resize is {follows} for frames of {side} pixels, as the recipe's "
            f"{augment.resize} for {written}"
        )
        augment = dataclasses.replace(augment, resize=follows)
    counting = dataclasses.replace(
        recipe,
        augment=augment,
        evaluation=dataclasses.replace(recipe.evaluation, resize=resize),
    )
    check_frames(counting, config)
    height, width = config.frame_size
    processor = dataclasses.replace(
        processor,
        do_resize=True,
        size={"shortest_edge": resize},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
    )
    resized = own_size not in (None, config.frame_size)
    notes += _geometry_notes(recipe, processor, None if image else theirs, resized)
    notes += _share_notes(counting, side, None if image else theirs)
    return Preprocessing(processor, counting, tuple(notes))


def described(found: Preprocessing) -> dict[str, Any]:
    """The input of `described_preprocessing`, as JSON values."""
    return {
        "processor": found.processor.to_dict(),
        "evaluation.resize": found.recipe.evaluation.resize,
        "augment.resize": found.recipe.augment.resize,
    }


def described_preprocessing(path: Path, recipe: Recipe, config: Any) -> Preprocessing:
    """The preprocessing of a resumed run, from the file that describes its model.

    Older versions did not write it down; their runs follow the recipe.
    """
    hint = "restore it as it was written"
    described = read_json(path, hint=hint)
    values = described.get("preprocessing") if isinstance(described, dict) else ()
    names = ("processor", "evaluation.resize", "augment.resize")
    if values is None:
        own = dataclasses.replace(recipe, given=names)
        return preprocessing(own, config)
    if not isinstance(values, dict) or not all(name in values for name in names):
        raise UserError(f"{path} does not describe preprocessing: expected {names}; {hint}")
    evaluation = dataclasses.replace(recipe.evaluation, resize=values["evaluation.resize"])
    augment = dataclasses.replace(recipe.augment, resize=values["augment.resize"])
    counting = dataclasses.replace(recipe, evaluation=evaluation, augment=augment)
    return Preprocessing(VideoProcessor.from_dict(values["processor"]), counting)


def shortest_side(processor: VideoProcessor) -> int | None:
    """The length to which a processor resizes a frame's shorter side; None if it does not.

    For a box that frames are fitted into it is the box's shorter side, an upper bound.
    """
    if not processor.do_resize:
        return None
    return processor.size.get("shortest_edge") or min(processor.size.values())


def resize_for(processor: VideoProcessor, side: int) -> int:
    """A processor's shortest side before a crop of `side` pixels.

    In proportion to the processor's own crop; `side` if it does not resize.
    """
    crop, shortest = _crop(processor), shortest_side(processor)
    return side if shortest is None or crop is None else round(shortest * side / crop)


def central_view(config: Any, processor: VideoProcessor) -> EvalSettings:
    """One central view, as the model was trained to read clips, resized as its processor says."""
    return EvalSettings(
        sampler=config.view_sampler,
        stride=config.frame_stride,
        resize=max(resize_for(processor, min(config.frame_size)), *config.frame_size),
        average=config.average,
    )


def as_trained(config: Any, sampler: str, stride: int) -> Any:
    """The config of a model that is trained on clips that are read so, which is saved with it.

    The test clips of "hold" are those of "linspace". With "segments" the stride stays as it was.
    """
    values: dict[str, Any] = {"view_sampler": "linspace" if sampler == "hold" else sampler}
    if sampler != "segments":
        values["frame_stride"] = stride
    known = {field.name for field in dataclasses.fields(config)}  # a family may fix them
    return dataclasses.replace(config, **{n: v for n, v in values.items() if n in known})


def differing(ours: Any, theirs: Any, names: Any) -> dict[str, tuple[Any, Any]]:
    """name -> (ours, theirs) of the fields that differ between two dataclasses."""
    values = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    return {name: both for name, both in values.items() if _plain(both[0]) != _plain(both[1])}


def differences_text(fields: Mapping[str, tuple[Any, Any]]) -> str:
    """The fields of `differing` as text."""
    return ", ".join(f"{name} {a!r} (there {b!r})" for name, (a, b) in fields.items())


def _plain(value: Any) -> Any:
    """A tuple of equal numbers, as sizes and statistics may be, as one number."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _beside(
    place: Path | None, image: bool, recipe: Recipe
) -> tuple[VideoProcessor | None, list[str]]:
    """The processor beside a checkpoint, or None and why it cannot be read."""
    if place is None:
        return None, []
    folder = place if place.is_dir() else place.parent
    # ViTImageProcessor normalises like VideoMAE's, with the same defaults.
    known_as = {"image_processor_type": VIDEOMAE} if image else {}
    try:
        if processor_file(folder) is None:
            return None, []
        return VideoProcessor.from_pretrained(folder, **known_as), []
    except UserError as error:
        return None, [
            f"pixels are not compared with the checkpoint's: {error}; the recipe's "
            f"processor={recipe.processor} decides"
        ]


def _normalisation(
    recipe: Recipe, published: VideoProcessor, theirs: VideoProcessor | None, image: bool
) -> tuple[VideoProcessor, list[str]]:
    """The processor that decides the pixel values, with notes on differences."""
    if theirs is None:
        return published, []
    pairs = zip(arithmetic(published), arithmetic(theirs), strict=True)
    # Fewer digits, or other steps to the same values, make no difference.
    agree = all(_close(a, b) for a, b in pairs)
    fields = differing(published, theirs, NORMALISATION)
    name = f"the recipe's processor={recipe.processor}"
    if "processor" in recipe.given:
        note = f"pixels differ from those of the checkpoint's processor: {differences_text(fields)}"
        return published, [] if agree else [f"{note}; {name} decides"]
    if image:
        values = {name: getattr(theirs, name) for name in NORMALISATION}
        theirs = published if agree else dataclasses.replace(published, **values)
    fields = {field: (b, a) for field, (a, b) in fields.items()}
    note = (
        f"pixels differ from those of {name}: {differences_text(fields)}; the checkpoint's "
        f"processor decides, --set processor={recipe.processor} takes the recipe's"
    )
    return theirs, [] if agree else [note]


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    broadcast = a.ndim == 0 or b.ndim == 0 or a.shape == b.shape
    return broadcast and np.allclose(a, b, rtol=1e-5, atol=1e-6)


def _crop(processor: VideoProcessor) -> int | None:
    """The shorter side of a processor's output, if it is the same for all frames."""
    if processor.do_center_crop:
        return min(processor.crop_size.values())
    return shortest_side(processor)


def _size_text(size: Mapping[str, int] | None) -> str:
    if size is None:
        return "none"
    if size.keys() == {"shortest_edge"}:
        return str(size["shortest_edge"])
    if size.keys() == {"height", "width"}:
        return "{height}x{width}".format(**size)
    return " ".join(f"{name}={value}" for name, value in size.items())


def _geometry_notes(
    recipe: Recipe, ours: VideoProcessor, theirs: VideoProcessor | None, resized: bool
) -> list[str]:
    """Notes on differences in resize and crop from the checkpoint's processor or the recipe.

    A different crop is reported if the model's frames differ from the checkpoint's, `resized`.
    """
    notes = []
    resize, wanted = shortest_side(ours), recipe.evaluation.resize
    if theirs is not None:
        fields = {
            "resize": [each.size if each.do_resize else None for each in (ours, theirs)],
            "crop": [each.crop_size if each.do_center_crop else None for each in (ours, theirs)],
        }
        changed = [
            f"{name} {_size_text(a)} (there {_size_text(b)})"
            for name, (a, b) in fields.items()
            if a != b and (resized or name == "resize")
        ]
        if changed:
            notes.append(
                "resize (of the shorter side) and crop differ from the checkpoint's processor: "
                f"{', '.join(changed)}"
            )
    if theirs is not None and theirs.do_resize and theirs.resample != _BILINEAR:
        notes.append(
            f"frames are resized bilinearly; the checkpoint's processor has resample "
            f"{theirs.resample} ({FILTERS[theirs.resample]}), which the saved one keeps"
        )
    if resize != wanted:
        decides = "in proportion to the model's frames"
        if theirs is not None and resize == shortest_side(theirs):
            decides = "as by the checkpoint's processor"
        notes.append(
            f"validation and the saved processor resize the shorter side to {resize}, {decides}, "
            f"not to the recipe's {wanted}; --set evaluation.resize={wanted} takes the recipe's"
        )
    return notes


def _share_notes(recipe: Recipe, side: int, theirs: VideoProcessor | None) -> list[str]:
    """Notes on views that show less of a frame than is usual and than the checkpoint's views."""
    notes = []
    usual = _USUAL_SHARE
    if theirs is not None and (shortest := shortest_side(theirs)) and (crop := _crop(theirs)):
        usual = min(usual, crop / shortest)
    resize, augment = recipe.evaluation.resize, recipe.augment
    if side / resize < usual:
        notes.append(
            f"validation and the saved processor show the middle {side / resize:.0%} of a frame's "
            f"shorter side: frames of {side} pixels of evaluation.resize {resize}; --set "
            f"evaluation.resize={side} shows all of it"
        )
    if augment.crop in ("random", "center") and augment.resize and side / augment.resize < usual:
        notes.append(
            f"training crops {side / augment.resize:.0%} of a frame's shorter side: {side} pixels "
            f"of augment.resize {augment.resize}; set augment.resize too"
        )
    return notes

# SPDX-License-Identifier: Apache-2.0
"""Checks a recipe before anything is read or built, and gives the config of its model."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vivit_jax.config import Config
from vivit_jax.config_base import READING
from vivit_jax.data.settings import MOST_READERS
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.transforms.randaugment import parse_rand_augment
from vivit_jax.errors import ConfigError, UserError, closest
from vivit_jax.presets import PRESETS, Preset
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.recipes.refusals import Refusal, Rule, refuse, rounded, value_of
from vivit_jax.typed import TypeMismatch, expected, from_json, override

# (condition, text, fields) for every numeric field of a recipe; a value of None is not checked.
_RANGES = (
    (
        lambda v: v >= 1,
        "1 or more",
        "data.stride data.repeats augment.resize optim.lr_batch train.epochs "
        "train.batch_size train.accumulate train.steps train.checkpoint_every train.evaluate_every "
        "train.keep train.max_bad_steps train.patience evaluation.clips evaluation.crops "
        "evaluation.stride evaluation.resize",
    ),
    (lambda v: 1 <= v <= MOST_READERS, f"in 1 to {MOST_READERS}", "data.threads"),
    (lambda v: 0 <= v <= MOST_READERS, f"in 0 to {MOST_READERS}", "data.workers"),
    (lambda v: v > 0, "above 0", "optim.lr optim.eps optim.clip data.cache_dir_gib"),
    (
        lambda v: v >= 0,
        "0 or more",
        "data.cache_gib data.first_frame augment.mixup augment.cutmix optim.min_lr "
        "optim.warmup_epochs optim.weight_decay",
    ),
    (lambda v: 0 <= v < 2**32, "in 0 to below 2**32", "train.seed"),
    (
        lambda v: 0 <= v <= 1,
        "in 0 to 1",
        "data.max_bad_share augment.flip augment.colour augment.erase augment.mix_switch "
        "augment.mix_prob",
    ),
    (
        lambda v: 0 <= v < 1,
        "in 0 to below 1",
        "augment.smoothing optim.b1 optim.b2 optim.momentum",
    ),
    (
        lambda v: 0 < v < 1,
        "above 0 and below 1",
        "mask.ratio mask.decoder_ratio optim.ema data.hold_out",
    ),
    (lambda v: 0 < v <= 1, "above 0 and at most 1", "optim.layer_decay"),
    (lambda v: 0 < v[0] <= v[1] <= 1, "two areas above 0, in order, to 1", "augment.crop_scale"),
    (
        lambda v: 0 < v[0] <= v[1],
        "two factors above 0, in order",
        "augment.crop_ratio augment.jitter_scale",
    ),
    (lambda v: v >= 2 and v % 2 == 0, "even, since clips mix in pairs", "augment.mix_group"),
)


def preset_named(name: str) -> Preset:
    """The preset that `model.preset` names. Raises UserError for another name."""
    if name not in PRESETS:
        raise UserError(
            f"model.preset is {name!r}, which is not a preset{closest(name, PRESETS, short=True)}"
        )
    return PRESETS[name]


def config_fields(preset: str) -> dict[str, Any]:
    """The fields that `model.config` may hold, those of the preset's configuration, with types."""
    return {field.name: field.type for field in dataclasses.fields(preset_named(preset).config)}


def model_config(recipe: Recipe) -> Config:
    """The configuration of a recipe's model: the preset's, overridden by `model.config`.

    Another `num_labels` drops the preset's class names and `class_splits`, unless they are given
    too. Raises UserError for an unknown preset, ConfigError for values that the configuration
    refuses.
    """
    config = preset_named(recipe.model.preset).config
    running = {f.name for f in dataclasses.fields(config) if f.metadata.get("execution")}
    values = dict(recipe.model.config)
    for name in READING:
        if name in values:
            field = "data.stride" if name == "frame_stride" else "data.sampler"
            raise UserError(
                f"model.config.{name} is {values[name]!r}, but a run saves what {field} is: set "
                f"{field}={values[name]} instead"
            )
    try:
        changed = override(config, {k: v for k, v in values.items() if k not in running})
        return dataclasses.replace(changed, **{k: v for k, v in values.items() if k in running})
    except ConfigError as error:
        raise ConfigError(f"model.config: {error}") from error


def check(recipe: Recipe) -> Recipe:
    """The recipe, if every field has the right type and range, and the fields agree.

    Otherwise raises UserError, which names each field, or the fields that disagree, and what to
    set. Does not look at files: `data.train` may be empty.
    """
    check_values(recipe)
    refuse(recipe, AGREEMENTS)
    return recipe


def check_values(recipe: Recipe) -> None:
    """UserError for fields of the wrong type or range, each by itself."""
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"recipe is {recipe!r:.80}; expected a Recipe, such as "
            "vivit_jax.train.recipe_named('demo-finetune')"
        )
    _check_types(recipe)
    _check_ranges(recipe)
    _check_names(recipe)
    model_config(recipe)


def check_frames(recipe: Recipe, config: Config) -> None:
    """UserError if the config's frames exceed the frames that views or crops are cut from."""
    for refusal in _of_frames(recipe, config):
        raise UserError(refusal.text)


def _of_frames(recipe: Recipe, config: Config) -> Iterator[Refusal]:
    side = min(config.frame_size)
    if recipe.evaluation.resize < side:
        text = (
            f"evaluation.resize is {recipe.evaluation.resize}, but the model's frames have a side "
            f"of {side} pixels: set evaluation.resize={side} or more too, or change "
            "model.config.image_size"
        )
        yield Refusal(text, {"evaluation.resize": side})
    augment = recipe.augment
    if augment.resize is not None and augment.crop in ("random", "center"):
        scale = min(1.0, (augment.jitter_scale or (1.0,))[0])
        smallest = int(augment.resize * scale)
        if smallest < side:
            text = (
                f"augment.resize {augment.resize} with jitter_scale {augment.jitter_scale} leaves "
                f"{smallest} pixels to crop the model's {side} from: set augment.resize higher too"
            )
            yield Refusal(text, {"augment.resize": math.ceil(side / scale)})


def wrong(path: str, value: Any, wanted: str) -> UserError:
    """The error for a value that a field cannot have."""
    return UserError(f"{path} is {value!r}, expected {wanted}")


def _check_types(recipe: Recipe) -> None:
    for name, section, fields in _sections(recipe):
        for field in fields:
            if field.name == "config":
                continue
            _check_type(f"{name}{field.name}", field.type, getattr(section, field.name))
    known, config = config_fields(recipe.model.preset), recipe.model.config
    if not isinstance(config, Mapping):
        raise wrong("model.config", config, "an object of fields")
    for key, value in config.items():
        if key not in known:
            raise UserError(
                f"model.config has no field {key!r} with the preset {recipe.model.preset}"
                f"{closest(key, known)}"
            )
        _check_type(f"model.config.{key}", known[key], value)


def _sections(recipe: Recipe) -> Iterator[tuple[str, Any, Sequence[dataclasses.Field]]]:
    """Prefix, dataclass, and fields that are not dataclasses themselves, of each part."""
    own = dataclasses.fields(recipe)
    yield "", recipe, [f for f in own if not dataclasses.is_dataclass(f.type)]
    for field in own:
        kind = field.type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            section = getattr(recipe, field.name)
            if not isinstance(section, kind):
                raise wrong(field.name, section, kind.__name__)
            yield f"{field.name}.", section, dataclasses.fields(kind)


def _check_type(path: str, wanted: Any, value: Any) -> None:
    try:
        from_json(wanted, value)
    except TypeMismatch:
        raise wrong(path, value, expected(wanted)) from None


def _check_ranges(recipe: Recipe) -> None:
    found = [
        Refusal(str(wrong(path, value, wanted)))
        for good, wanted, paths in _RANGES
        for path in paths.split()
        if (value := value_of(recipe, path)) is not None and not good(value)
    ]
    refuse(recipe, (), found)


def _check_names(recipe: Recipe) -> None:
    if recipe.augment.rand_augment is not None:
        try:
            parse_rand_augment(recipe.augment.rand_augment)
        except UserError as error:
            raise UserError(f"augment.{error}") from error
    try:
        VideoProcessor.named(recipe.processor)
    except UserError as error:
        raise UserError(f"processor: {error}") from error
    preset = preset_named(recipe.model.preset)
    head = HEADS[recipe.task]
    if preset.head != head:
        fitting = [name for name, other in PRESETS.items() if other.head == head]
        raise UserError(
            f"task is {recipe.task!r} but model.preset {recipe.model.preset} is for "
            f"{preset.head}{closest(recipe.model.preset, fitting, short=True)}"
        )


def _frames_agree(recipe: Recipe) -> Iterator[Refusal]:
    # Otherwise `start` decides the frame size, once it is read.
    if recipe.model.start is None or "image_size" in recipe.model.config:
        yield from _of_frames(recipe, model_config(recipe))


def _parts_agree(recipe: Recipe) -> Iterator[Refusal]:
    train = recipe.train
    if train.batch_size % train.accumulate:
        text = (
            f"train.batch_size {train.batch_size} does not divide into train.accumulate "
            f"{train.accumulate} equal parts: change one of them"
        )
        parts = max(n for n in range(1, train.accumulate) if train.batch_size % n == 0)
        yield Refusal(text, {"train.accumulate": parts})


def _mixing_agrees(recipe: Recipe) -> Iterator[Refusal]:
    augment, train = recipe.augment, recipe.train
    clips = train.batch_size * recipe.data.repeats
    if recipe.task != "finetune" or not augment.mixes:
        return
    group, part = augment.mix_group or clips, clips // train.accumulate
    if group % 2 or part % group:
        parts = f", {part} in each of train.accumulate {train.accumulate}," * (part < clips)
        text = (
            f"train.batch_size {train.batch_size} x data.repeats {recipe.data.repeats} = {clips} "
            f"clips{parts} are not whole groups of augment.mix_group {augment.mix_group}, which "
            "mix in pairs: set augment.mix_group too, to an even number that divides them"
            + (", or none for all of them" if part == clips and clips % 2 == 0 else "")
        )
        yield Refusal(text, mixing_of(part, group))


def mixing_of(part: int, group: int) -> dict[str, Any]:
    """Settings with which `part` clips mix in groups of at most `group`, or not at all."""
    fitting = [n for n in range(2, min(part, group) + 1, 2) if part % n == 0]
    if not fitting:
        return {"augment.mixup": 0.0, "augment.cutmix": 0.0}
    return {"augment.mix_group": fitting[-1]}


def _unlabelled_agree(recipe: Recipe) -> Iterator[Refusal]:
    for name in ("mixup", "cutmix", "smoothing") if recipe.task == "pretrain" else ():
        value = getattr(recipe.augment, name)
        if value > 0:
            text = (
                f"augment.{name} is {value}, which changes labels, and task 'pretrain' has none: "
                f"set augment.{name}=0"
            )
            yield Refusal(text, {f"augment.{name}": 0.0})


def _schedule_agrees(recipe: Recipe) -> Iterator[Refusal]:
    optim, epochs = recipe.optim, recipe.train.epochs
    if optim.schedule == "constant":
        return
    if optim.warmup_epochs >= epochs:
        text = (
            f"optim.warmup_epochs {optim.warmup_epochs:g} leaves nothing of train.epochs {epochs}: "
            "set optim.warmup_epochs too, below them, or train.steps to stop early"
        )
        yield Refusal(text, {"optim.warmup_epochs": rounded(epochs / 10)})
    if optim.min_lr > optim.lr:
        text = f"optim.min_lr {optim.min_lr:g} is above optim.lr {optim.lr:g}: set optim.min_lr too"
        yield Refusal(text, {"optim.min_lr": 0.0})


def _held_out_agrees(recipe: Recipe) -> Iterator[Refusal]:
    data = recipe.data
    if data.hold_out is not None and data.validation is not None:
        text = (
            f"data.hold_out {data.hold_out:g} holds clips of data.train out, and data.validation "
            f"{data.validation} names others: set one of them to none"
        )
        yield Refusal(text, {"data.hold_out": None})


def _patterns_agree(recipe: Recipe) -> Iterator[Refusal]:
    optim = recipe.optim
    patterns = [("optim.freeze", pattern, 1.0) for pattern in optim.freeze]
    for name in ("lr_rules", "decay_rules"):
        patterns += [(f"optim.{name}", *rule) for rule in getattr(optim, name)]
    for path, pattern, factor in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield Refusal(
                f"{path}: {pattern!r} is not a regular expression ({error}); it must match "
                "parameter paths, such as backbone/patch_embed/.*"
            )
        if factor < 0:
            yield Refusal(f"{path}: the factor of {pattern!r} is {factor}, expected 0 or more")


# What the fields of a recipe must agree on, without its data.
AGREEMENTS: tuple[Rule, ...] = (
    _frames_agree, _parts_agree, _mixing_agrees, _unlabelled_agree, _schedule_agrees,
    _held_out_agrees, _patterns_agree,
)  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Chooses the settings of a fine-tuning run, each with its reason.

From LARGE clips on they are those of the papers' recipe for the model's size. Below, what the
papers do for 10,000 to 240,000 clips does not hold: a linear scaling of the learning rate leaves
1.6e-5 for a batch of 8, at which the loss of 40 clips does not move; mixing needs clips to mix.
docs/training.md has the measurements behind the numbers.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from vivit_jax.errors import counted
from vivit_jax.recipes.checks import mixing_of, model_config
from vivit_jax.recipes.recipe import (
    ModelSettings,
    OptimSettings,
    Recipe,
    TrainSettings,
)
from vivit_jax.recipes.refusals import rounded, value_of, with_values
from vivit_jax.train.batch_size import FEW, LARGE, suited_batch
from vivit_jax.train.suggest.facts import DataFacts, Machine, StartFacts

# Measured on 40 clips of 4 classes, and on 200 of 8, by a VideoMAE of width 96 (3 seeds, accuracy
# on other clips; standard errors 0.4 to 4 points): with these 94.9 and 78.2 %. Otherwise:
EPOCHS = 800  # over the root of the clips
VALIDATIONS = 20  # in a run
PATIENCE = 0.4  # of the epochs
LR = 1e-3  # of a batch of 256; a third of it 89.6 and 75.8 %, twice 92.5 and 77.0
CROPS = (0.5, 1.0)  # shares of a frame; from 0.25 on 91.3 %, from 0.8 on 90.6
MIXED = 16  # clips in a batch that is mixed
# Blocks of models with a layer decay. In that one, of 3 blocks, it gave 92.4 and 75.7 %, and the
# patch embedding and a block frozen 95.1 and 75.7.
DEEP = 6
LAYER_DECAY = 0.75  # of VideoMAE's papers
_GIB = 2**30
_WIDTH = 768  # of the models whose learning rate the papers give
_FULL_RATE = 30.0  # frames a second of Kinetics, for which the papers give strides
_SSV2 = 174  # classes


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting with its reason."""

    path: str
    value: Any
    reason: str


class Chosen:
    """A recipe that is being filled in, and the choices so far. Fields in `given` stay."""

    def __init__(self, recipe: Recipe, given: Collection[str]):
        self.recipe, self.choices, self._given = recipe, list[Choice](), {*given}

    def choose(self, path: str, value: Any, reason: str) -> Any:
        """Set a field, unless it is given; returns its value."""
        if path in self._given:
            value, reason = value_of(self.recipe, path), "--set"
        else:
            self.recipe = with_values(self.recipe, {path: value})
        self.choices = [each for each in self.choices if each.path != path]
        self.choices.append(Choice(path, value, reason))
        return value


def first_recipe(start: StartFacts) -> Recipe:
    """The recipe that `choose` fills in, without data."""
    side = min(start.config.frame_size)
    published = start.published
    written = min(model_config(published).frame_size)
    resize = max(side, round(published.evaluation.resize * side / written))
    return Recipe(
        name=f"finetune-{start.config.model_type}",
        task="finetune",
        processor=published.processor,
        model=ModelSettings(preset=start.preset, config=dict(start.own), start=start.name),
        data=dataclasses.replace(published.data, repeats=1),
        augment=published.augment,
        optim=OptimSettings(lr=1e-4, lr_batch=None),
        train=TrainSettings(epochs=30, batch_size=8),
        evaluation=dataclasses.replace(published.evaluation, resize=resize),
    )


def choose(
    recipe: Recipe, given: Collection[str], start: StartFacts, data: DataFacts, machine: Machine
) -> Chosen:
    """Fill in a recipe; `given` are the fields that are set already. Memory is not looked at."""
    chosen, name = Chosen(recipe, given), start.published.name
    if recipe.data.hold_out is not None:
        reason = f"of each class, {counted(data.held_out, 'clip')} in all, to choose the model by"
        chosen.choose("data.hold_out", recipe.data.hold_out, reason)
    elif recipe.data.validation is not None:
        own = "the data's own split, " if recipe.data.validation == recipe.data.train else ""
        reason = f"{own}{counted(data.held_out, 'clip')} to choose the model by"
        chosen.choose("data.validation", recipe.data.validation, reason)
    if start.processor is None or "processor" in given:
        reason = f"no file beside the weights says how frames are prepared: as {name}"
        chosen.choose("processor", recipe.processor, reason)
    _sampling(chosen, start, data)
    batch = _length(chosen, start, data, machine)
    _augmentation(chosen, start, data, batch)
    _optimiser(chosen, start, data, batch)
    _blocks(chosen, start, data)
    _reading(chosen, data, machine)
    return chosen


def _sampling(chosen: Chosen, start: StartFacts, data: DataFacts) -> None:
    config = start.config
    sampler, trained = config.view_sampler, "as the checkpoint was trained"
    own = sampler != type(config).view_sampler
    reason = trained if own else f"as {start.published.name} reads clips"
    if start.kind == "classification" and config.num_labels == _SSV2 and sampler == "linspace":
        sampler = "segments"
        reason = "the checkpoint has the classes of Something-Something, read so by its recipe"
    chosen.choose("data.sampler", sampler, reason)
    chosen.choose("evaluation.sampler", value_of(chosen.recipe, "data.sampler"), "as in training")
    frames, stride = config.num_frames, config.frame_stride
    fps = data.fps or _FULL_RATE
    # The papers' is that of videos at their rate; a checkpoint that says its own says no rate.
    own = config.has_own_stride
    wanted = stride if own else max(1, round(stride * fps / _FULL_RATE))
    fits = max(1, (data.frames - 1) // max(frames - 1, 1))
    if fits < wanted:
        text = (
            f"a quarter of the clips have at most {data.frames} frames; {frames} so far apart fit"
        )
        chosen.choose("data.stride", fits, text)
    else:
        text = f"{frames} frames last {frames * wanted / fps:.1f} s at {fps:.4g} frames a second"
        reason = f"{trained}: {text}" if own else f"{text}, as where the model was trained"
        chosen.choose("data.stride", wanted, reason)
    chosen.choose("evaluation.stride", value_of(chosen.recipe, "data.stride"), "as in training")


def _length(chosen: Chosen, start: StartFacts, data: DataFacts, machine: Machine) -> int:
    published, clips = start.published, data.train
    unit = math.lcm(machine.shards, machine.processes)
    batch = suited_batch(clips, unit, published.train.batch_size)
    per_epoch = clips // max(batch, 1)
    reason = f"{counted(clips, 'clip')} to train on: {counted(per_epoch, 'step')} an epoch"
    if unit > 1:
        reason += f", divided over {counted(machine.shards, 'device')}"
    batch = chosen.choose("train.batch_size", batch, reason)
    if clips >= LARGE:
        epochs, reason = published.train.epochs, f"as {published.name}"
        if published.data.repeats > 1:
            chosen.choose("data.repeats", published.data.repeats, reason)
    else:
        epochs = min(max(round(EPOCHS / math.sqrt(clips)), 30), 100)
        steps = epochs * (clips // max(batch, 1))
        reason = f"{counted(steps, 'step')}; few clips are seen more often, 30 to 100 times"
    chosen.choose("train.epochs", epochs, reason)
    _validation(chosen, data)
    return batch


def _validation(chosen: Chosen, data: DataFacts) -> None:
    if not data.held_out:
        return
    train = chosen.recipe.train
    every = max(1, round(train.epochs / VALIDATIONS))
    reason = f"epochs from one score on the {data.held_out} held-out clips to the next"
    every = chosen.choose("train.evaluate_every", every, reason)
    per_epoch = max(data.train // train.batch_size, 1)
    chosen.choose("train.checkpoint_every", every * per_epoch, "steps: where the run is scored")
    patience = max(3, round(PATIENCE * train.epochs / every))
    reason = "scores in a row without a better one, then the run ends; the best model is kept"
    chosen.choose("train.patience", patience, reason)


def _augmentation(chosen: Chosen, start: StartFacts, data: DataFacts, batch: int) -> None:
    published, clips = start.published.augment, data.train
    if data.mirrored:
        names = ", ".join(data.mirrored[:3]) + (", ..." if len(data.mirrored) > 3 else "")
        chosen.choose("augment.flip", 0.0, f"names may tell left from right: {names}")
    else:
        chosen.choose("augment.flip", published.flip, f"as {start.published.name}")
    if clips < LARGE:
        chosen.choose("augment.resize", None, "crops are of any size instead")
        chosen.choose("augment.jitter_scale", None, "crops are of any shape instead")
        chosen.choose("augment.crop", "random_resized", "suits every resolution")
        scale = CROPS if clips < FEW else (0.25, 1.0)
        reason = "share of a frame in a crop; the papers' 0.08 and up is for many clips"
        chosen.choose("augment.crop_scale", scale, reason)
    if clips < FEW:
        for name, off in (("rand_augment", None), ("erase", 0.0), ("colour", 0.0)):
            if value_of(chosen.recipe, f"augment.{name}") != off:
                chosen.choose(f"augment.{name}", off, f"only from {FEW:,} clips on")
    elif start.config.num_channels != 3:
        for name, off in (("rand_augment", None), ("colour", 0.0)):
            reason = "changes colours, and the model does not take RGB"
            chosen.choose(f"augment.{name}", off, reason)
    _mixing(chosen, data, batch)


def _mixing(chosen: Chosen, data: DataFacts, batch: int) -> None:
    augment = chosen.recipe.augment
    if not augment.mixes:
        return
    if data.train < FEW or batch < MIXED:
        reason = f"mixing takes batches of {MIXED} and {FEW:,} clips or more"
        for name in ("mixup", "cutmix"):
            if value_of(chosen.recipe, f"augment.{name}"):
                chosen.choose(f"augment.{name}", 0.0, reason)
        return
    clips = batch * chosen.recipe.data.repeats
    for path, value in mixing_of(clips, augment.mix_group or clips).items():
        chosen.choose(path, value, "clips that share a factor; divides the batch")


def _optimiser(chosen: Chosen, start: StartFacts, data: DataFacts, batch: int) -> None:
    published, name = start.published.optim, start.published.name
    if data.train >= LARGE:
        for field in dataclasses.fields(published):
            value = getattr(published, field.name)
            if value != getattr(chosen.recipe.optim, field.name):
                chosen.choose(f"optim.{field.name}", value, f"as {name}")
        return
    width = max(1.0, _WIDTH / start.config.hidden_size)
    lr = rounded(LR * math.sqrt(batch / 256) * width)
    reason = f"{LR:g} for a batch of 256, with the root of the batch"
    reason += f" and for a width of {start.config.hidden_size}" if width > 1 else ""
    lr = chosen.choose("optim.lr", lr, f"{reason}; not scaled further")
    chosen.choose("optim.min_lr", rounded(lr / 100), "a hundredth of optim.lr, at the end")
    warmup = rounded(min(5.0, chosen.recipe.train.epochs / 10))
    chosen.choose("optim.warmup_epochs", warmup, "a tenth of the epochs, 5 at most")
    chosen.choose("optim.weight_decay", 0.05, "as the papers of VideoMAE")
    chosen.choose("optim.clip", 1.0, "small batches have outliers")


def _blocks(chosen: Chosen, start: StartFacts, data: DataFacts) -> None:
    """What depends on the depth: shallow models are trained whole and at one rate."""
    config, published = start.config, start.published
    blocks = config.num_hidden_layers + config.temporal_layers
    if data.train < LARGE:
        if blocks < DEEP:
            reason = f"{blocks} blocks are too few to train the lower ones more slowly"
            chosen.choose("optim.layer_decay", None, reason)
        else:
            reason = f"the lower of {blocks} blocks learn more slowly, and keep what they know"
            decay = published.optim.layer_decay or LAYER_DECAY
            chosen.choose("optim.layer_decay", decay, reason)
    for name in ("drop_path_rate", "head_dropout") if blocks >= DEEP else ():
        rate = published.model.config.get(name, 0.0)
        if rate:
            chosen.choose(f"model.config.{name}", rate, f"as {published.name}")


def _reading(chosen: Chosen, data: DataFacts, machine: Machine) -> None:
    if machine.platform == "cpu":
        reason = "reader threads: the model computes on the same cores"
        chosen.choose("data.threads", 2, reason)
    else:
        reason = "products in half precision, as the papers trained; weights stay float32"
        chosen.choose("model.config.dtype", "bfloat16", reason)
        workers = min(8, max(machine.cores - 2, 0))
        chosen.choose(
            "data.workers", workers, f"reader processes on {counted(machine.cores, 'core')}"
        )
    if data.unreadable:
        share = data.unreadable / data.looked_at
        limit = rounded(min(1.0, 2 * share + 0.1))
        reason = (
            f"{data.unreadable} of {counted(data.looked_at, 'clip')} cannot be read and are left "
            "out"
        )
        chosen.choose("data.max_bad_share", limit, reason)
    room = machine.host and machine.host / 4
    if room and not chosen.recipe.data.workers and data.decoded < room:
        size = rounded(1.1 * data.decoded / _GIB + 0.01)
        reason = f"all {counted(data.train, 'clip')}, decoded once and kept in memory"
        chosen.choose("data.cache_gib", size, reason)

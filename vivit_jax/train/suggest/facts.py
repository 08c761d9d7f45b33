# SPDX-License-Identifier: Apache-2.0
"""What settings depend on: the checkpoint a run starts from, its clips, and the machine."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from checkpoints_convert.layouts.image_vit import open_image_model
from checkpoints_convert.layouts.registry import layout_of
from checkpoints_convert.source import find_checkpoint
from checkpoints_convert.start.from_checkpoint import open_start
from checkpoints_convert.start.from_image import video_config
from vivit_jax.config import Config
from vivit_jax.data.datasets.check import (
    Progress,
    class_name,
    in_threads,
    inspect,
    mirrored_names,
)
from vivit_jax.data.datasets.dataset import Dataset, labels_wanted
from vivit_jax.data.transforms.processor_files import processor_file
from vivit_jax.data.video.sequence import usable_cores
from vivit_jax.errors import UserError, counted, quoted
from vivit_jax.presets import PRESETS
from vivit_jax.recipes import RECIPES
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.planning.memory import device_memory, free_memory
from vivit_jax.train.sharding import batch_shards
from vivit_jax.train.start.initial_model import of_the_function

Kind = Literal["image", "pretraining", "classification", "none"]
_FRAMES = {"scenic": 32}  # of a file that does not say it, by layout; 16 elsewhere
_LOOKED_AT = 500  # clips of a larger data set, at random
_HEAD = "classification"


@dataclasses.dataclass(frozen=True)
class StartFacts:
    """The checkpoint.

    Attributes:
        name: as it was given.
        kind: an image model, or the head that it holds.
        config: of the video model to train, before it has the data's classes; the sizes of its
            clips are those that are set, if any are.
        preset: the published model that it is most like.
        own: the fields in which it differs from the preset.
        published: the recipe of its papers for the size that is nearest.
        processor: the file beside the weights that says how frames are prepared, None without one.
    """

    name: str
    kind: Kind
    config: Config
    preset: str
    own: Mapping[str, Any]
    published: Recipe
    processor: str | None = None


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """The clips.

    Attributes:
        train: how many to train on, with those that cannot be read.
        held_out: how many are held out.
        classes: how many classes have a clip.
        smallest: clips to train on of the smallest class.
        looked_at: how many were opened.
        unreadable: how many of these cannot be read.
        frames: of a short clip; a quarter are shorter.
        fps: the median frame rate, None if clips state none.
        decoded: bytes of all clips to train on, decoded.
        mirrored: classes whose names may tell left from right.
        single: classes with one clip in all.
    """

    train: int
    held_out: int
    classes: int
    smallest: int
    looked_at: int
    unreadable: int
    frames: int
    fps: float | None
    decoded: int
    mirrored: tuple[str, ...]
    single: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices.

    Attributes:
        platform: as jax names it.
        shards: parts that the mesh splits a batch into.
        processes: that share a batch.
        memory: bytes of a device that a step may take; None if unknown.
        host: free bytes of the host; None if unknown.
        cores: of the host.
    """

    platform: str
    shards: int
    processes: int
    memory: int | None
    host: int | None
    cores: int


def start_facts(start: str) -> StartFacts:
    """Opens a checkpoint, headers only. Raises as the loaders do, UserError for other families."""
    checkpoint = find_checkpoint(start)
    layout = layout_of(checkpoint)
    kind: Any = "image"
    if layout.image:
        config: Any = video_config(open_image_model(checkpoint))
    else:
        source = open_start(checkpoint, _FRAMES.get(layout.name, 16))
        config, kind = source.config, source.head
    names = [name for name in of_the_function(config, _HEAD) if name != "use_mean_pooling"]
    fitting = {
        name: {n: getattr(config, n) for n in names if getattr(config, n) != getattr(p.config, n)}
        for name, p in PRESETS.items()
        if p.head == _HEAD and p.config.model_type == config.model_type and _one_head(p.config)
    }
    if not fitting:
        raise UserError(
            f"model.start {start} holds a {config.title}, of which no preset is a classifier; name "
            "a recipe of your own: --recipe recipe.json"
        )
    preset = min(fitting, key=lambda name: len(fitting[name]))
    path = checkpoint.path
    file = processor_file(path if path.is_dir() else path.parent)
    beside = None if file is None else file.name
    return StartFacts(start, kind, config, preset, fitting[preset], _published(config), beside)


def _one_head(config: Any) -> bool:
    return config.class_splits is None


def _published(config: Any) -> Recipe:
    """The recipe of a family's papers for the size that is nearest, on Kinetics-400 if there is."""

    def distance(recipe: Recipe):
        other: Any = model_config(recipe)
        sizes = ((config.hidden_size, other.hidden_size),)
        sizes += ((config.num_hidden_layers + 1, other.num_hidden_layers + 1),)
        far = sum(abs(math.log(a / b)) for a, b in sizes)
        elsewhere = "kinetics400" not in recipe.name
        return config.attention_type != other.attention_type, far, elsewhere, len(recipe.name)

    recipes = [function() for name, function in RECIPES.items() if not name.startswith("demo-")]
    fitting = [
        recipe
        for recipe in recipes
        if recipe.task == "finetune" and model_config(recipe).model_type == config.model_type
    ]
    if not fitting:
        raise UserError(f"there is no published recipe of a {config.title}; name one: --recipe")
    return min(fitting, key=distance)


def data_facts(
    train: Dataset,
    validation: Dataset | None,
    *,
    threads: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> DataFacts:
    """Opens the clips to train on, at most 500 of them, and counts.

    Raises UserError for clips without labels or of one class, and if none can be read.
    """
    counts = Counter(example.label for example in train.examples)
    if not train.labels_per_example:
        way_out = "; sort its clips into a folder for each class, or write a list"
        way_out = labels_wanted(train) or way_out
        raise UserError(f"{train.source} has no labels, which fine-tuning needs{way_out}")
    if len(counts) < 2:
        only = quoted(class_name(train, *counts))
        raise UserError(
            f"{train.source}: all clips are of one class, {only}: there is nothing to tell apart; "
            "add a folder with clips of another class"
        )
    examples = train.examples
    if len(examples) > _LOOKED_AT:
        chosen = np.random.default_rng(seed).choice(len(examples), _LOOKED_AT, replace=False)
        examples = tuple(examples[i] for i in sorted(chosen))
    facts = [*in_threads(inspect, examples, threads, progress)]
    readable = [each for each in facts if each.error is None]
    if not readable:
        raise UserError(
            f"none of the {counted(len(facts), 'clip')} of {train.source} that were opened can be "
            f"read: {facts[0].error}"
        )
    rates = [each.fps for each in readable if each.fps]
    size = sum(each.frames * each.height * each.width * each.channels for each in readable)
    return DataFacts(
        train=len(train),
        held_out=0 if validation is None else len(validation),
        classes=len(counts),
        smallest=min(counts.values()),
        looked_at=len(facts),
        unreadable=len(facts) - len(readable),
        frames=int(np.quantile([each.frames for each in readable], 0.25)),
        fps=float(np.median(rates)) if rates else None,
        decoded=round(size / len(readable) * len(train)),
        mirrored=mirrored_names(train.classes or ()),
        single=_single(train, validation),
    )


def _single(train: Dataset, validation: Dataset | None) -> tuple[str, ...]:
    """The classes with one clip on both sides together."""
    sides = [train] if validation is None else [train, validation]
    counts = Counter(class_name(side, e.label) for side in sides for e in side.examples)
    return tuple(name for name, count in counts.items() if count == 1)


def this_machine(mesh_sizes: Mapping[str, int]) -> Machine:
    """The machine of this process."""
    platform, host = jax.default_backend(), free_memory()
    memory = device_memory()
    if platform == "cpu":
        # Its devices share the host's memory.
        found = [size for size in (memory, host) if size is not None]
        memory = min(found) // jax.local_device_count() if found else None
    return Machine(
        platform=platform,
        shards=batch_shards(mesh_sizes),
        processes=jax.process_count(),
        memory=memory,
        host=host,
        cores=usable_cores(),
    )

# SPDX-License-Identifier: Apache-2.0
"""What a run does before its first step: its clips, model, batches and state. Writes nothing."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vivit_jax.data.datasets.dataset import Dataset, from_objects, read_dataset
from vivit_jax.data.datasets.hold_out import hold_out
from vivit_jax.data.pipeline import Batches, ClipShape, ProcessShard
from vivit_jax.errors import UserError, counted
from vivit_jax.files import block_cache
from vivit_jax.files.addresses import Place
from vivit_jax.files.reading import is_directory
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.evaluation import model_labels
from vivit_jax.train.own import NOTHING, Own
from vivit_jax.train.own_model import own_start, resumed_model
from vivit_jax.train.setup import TrainSetup, make_setup
from vivit_jax.train.sharding import bytes_on_a_device, mesh_text
from vivit_jax.train.start.initial_model import Start, check_same, described_model, starting_model
from vivit_jax.train.start.preprocessing import as_trained, described_preprocessing
from vivit_jax.train.state import TrainState, new_state


def listed(
    recipe: Recipe, dataset: Any = None, validation: Any = None
) -> tuple[Dataset, Dataset | None]:
    """The clips to train on and to validate with: those that are given, or the recipe's.

    What is given may be any object that `from_objects` takes. Without clips to validate with,
    `data.hold_out` holds out some of those to train on.
    """
    settings = recipe.data
    if dataset is None and not settings.train:
        raise UserError("data.train is empty; say where the clips are: --set data.train=list.txt")

    block_cache.use(settings.cache_dir, settings.cache_dir_gib)  # lists are read through it too

    def read(source: str, split: str) -> Dataset:
        return read_dataset(source, split=split, **reading(recipe, source))

    def given(source: Any, name: str) -> Dataset:
        if isinstance(source, Dataset):
            return source
        if isinstance(source, str | Path):
            raise UserError(
                f"{name} is {str(source)!r}; expected a data set: "
                f"vivit_jax.data.datasets.dataset.read_dataset({str(source)!r}), or set the "
                f"recipe's data.{'train' if name == 'dataset' else name}"
            )
        return from_objects(source)

    if dataset is None:
        dataset = read(settings.train, settings.train_split)
    else:
        dataset = given(dataset, "dataset")
    if validation is not None:
        validation = given(validation, "validation")
    elif settings.validation is not None:
        validation = read(settings.validation, settings.validation_split)
    elif settings.hold_out is not None:
        dataset, validation = hold_out(dataset, settings.hold_out, recipe.train.seed)
    return dataset, validation


def reading(recipe: Recipe, source: str) -> dict[str, Any]:
    """How a recipe reads a list or directory: the arguments of `read_dataset` but for the split."""
    settings, finetune = recipe.data, recipe.task == "finetune"
    return {
        "root": settings.root,
        "labels": len(model_config(recipe).split_sizes) if finetune else 0,
        "frame_name": settings.frame_name,
        "first_frame": settings.first_frame,
        # Folders name their own classes.
        "class_names": None if is_directory(source) else settings.class_names,
    }


def prepare(
    recipe: Recipe,
    mesh: Mesh,
    model_file: Path | None,
    data: tuple[Dataset, Dataset | None],
    own: Own = NOTHING,
) -> tuple[TrainSetup, Batches, Start | None]:
    """The setup, the batches, and what a new run starts from (None for a resumed one).

    `model_file` describes the model of a resumed run, `data` are the clips of `listed`.
    """
    finetune = recipe.task == "finetune"
    dataset, validation = data
    if model_file is None:
        classes = dataset.classes if finetune else None
        if own.model is None:
            start = starting_model(recipe, classes, class_numbers(dataset, validation))
        else:
            start = own_start(recipe, own, classes)
        model, frames = start.model, start.preprocessing
    else:
        start = None
        check_same(model_file, own.named)
        known = own.model is None
        model = described_model(model_file) if known else resumed_model(own, model_file)
        frames = described_preprocessing(model_file, recipe, model.config)
    read = as_trained(model.config, recipe.data.sampler, recipe.data.stride)
    model = model.clone(config=read)
    start = None if start is None else start._replace(model=model)
    config, recipe, processor = model.config, frames.recipe, frames.processor
    if finetune:
        dataset = model_labels(dataset, config)
        validation = None if validation is None else model_labels(validation, config)
    batches = Batches(
        dataset,
        recipe.data,
        own.transform(recipe.augment, config.frame_size),
        shape=ClipShape(config.num_frames, config.frame_size, config.num_channels),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        shard=ProcessShard(jax.process_index(), jax.process_count()),
        labelled=finetune,
    )
    per_epoch = batches.sampler.steps_per_epoch
    setup = make_setup(recipe, mesh, model, processor, per_epoch, validation, own)
    return setup, batches, start


def class_numbers(dataset: Dataset, validation: Dataset | None) -> int | None:
    """The number of classes of clips with one numeric label: the largest plus one.

    None for named classes, for several labels, and where all labels are equal.
    """
    both = [dataset] if validation is None else [dataset, validation]
    if any(each.classes is not None or each.labels_per_example != 1 for each in both):
        return None
    found = np.unique(np.concatenate([each.labels.ravel() for each in both]))
    return 1 + int(found.max()) if len(found) > 1 else None


def first_state(setup: TrainSetup, params: Any) -> TrainState:
    """The state before the first step, on the mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.shapes)
    averaged = setup.recipe.optim.ema is not None
    place = jax.jit(
        lambda params: new_state(params, setup.optimizer, averaged=averaged),
        out_shardings=shardings,
    )
    return place(jax.device_put(params, shardings.params))


def summary(setup: TrainSetup, batches: Batches, path: Place, taken: int) -> str:
    """One line about a run in `path` that is about to take the steps after `taken`."""
    if taken >= setup.last:
        return (
            f"{path}: the run has reached its last step, {taken} of {setup.steps}; nothing is "
            "left to do"
        )
    params, kept = (
        bytes_on_a_device(tree) / 2**20 for tree in (setup.shapes.params, setup.shapes.optimizer)
    )
    clips = counted(len(batches.sampler.dataset), "clip")
    if setup.recipe.task == "finetune":  # as many classes as folders name, whatever recipes say
        clips += f" of {counted(setup.model.config.num_labels, 'class')}"
    return (
        f"{type(setup.model).__name__}, {clips}, "
        f"{counted(setup.per_epoch, 'step')} an epoch, steps {taken + 1} to {setup.last} of "
        f"{setup.steps}; mesh {mesh_text(setup.mesh.shape)}; on each device {params:.1f} MiB "
        f"of parameters and {kept:.1f} MiB of optimiser state"
    )

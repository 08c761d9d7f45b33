# SPDX-License-Identifier: Apache-2.0
"""What `vivit-jax finetune` says of the settings that it chooses without a recipe."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.data.datasets.hold_out import MOST_COMPARED, shared_clips
from vivit_jax.data.transforms.processor_files import processor_file
from vivit_jax.errors import counted, printable, quoted
from vivit_jax.progress import format_table, live_line, readable
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.refusals import value_text
from vivit_jax.recipes.settings import from_dict, to_dict
from vivit_jax.train.sharding import gathered
from vivit_jax.train.storage.run_directory import HELD_OUT_LIST, TRAIN_LIST
from vivit_jax.train.suggest.suggested import Suggestion, suggested

Clips = tuple[Dataset | None, Dataset | None]  # to train on, and held out
_NAMED = 5  # classes, in a warning
_KINDS = {
    "image": "an image model",
    "pretraining": "a masked autoencoder",
    "classification": "a classifier",
    "none": "a model without a head",
}


def suggested_recipe(
    data: str, start: str, mesh_sizes: Mapping[str, int], settings: Sequence[str], say: Any
) -> tuple[Recipe, Clips]:
    """The recipe of `suggested` and its clips; says why its settings are what they are."""
    with live_line("clips") as progress:
        found = suggested(data, start, mesh_sizes, settings, progress)
    say("\n".join([*_heads(found), "", *_table(found), ""]))
    # Processes may differ in free memory.
    values = to_dict(found.recipe) | {"given": list(found.recipe.given)}
    return from_dict(gathered(values)[0]), found.clips


def comparison(out: Path, recipe: Recipe) -> list[str]:
    """How a probe of the start does on the same clips, as a command: it is cheap, and may do.

    Nothing of a start without a processor file, which a probe refuses.
    """
    start = Path(str(recipe.model.start))
    if start.is_dir() and processor_file(start) is None:
        return []
    probed = {
        "--model": recipe.model.start,
        "--data": out / TRAIN_LIST,
        "--validation": out / HELD_OUT_LIST,
        "--stride": recipe.data.stride,
        "--out": out.with_name(f"{out.name}-probe"),
    }
    flags = " ".join(f"{flag} {shlex.quote(str(value))}" for flag, value in probed.items())
    return [
        "compare with the same start, not trained, on the same clips:",
        f"  vivit-jax probe {flags}",
    ]


def _heads(found: Suggestion) -> list[str]:
    clips, config = found.data, found.start.config
    whole = clips.train + clips.held_out
    parts = [
        f"{found.recipe.data.train}: {counted(whole, 'clip')} of {counted(clips.classes, 'class')}"
    ]
    if clips.held_out:
        parts.append(f"{clips.train} to train on, {clips.held_out} held out")
    if clips.unreadable:
        parts.append(f"{clips.unreadable} of {clips.looked_at} opened cannot be read")
    height, width = config.frame_size
    model = (
        f"{found.start.name}: {_KINDS[found.start.kind]}; a {config.title} of "
        f"{counted(config.num_hidden_layers, 'block')} of width {config.hidden_size}, "
        f"{counted(config.num_frames, 'frame')} of {height}x{width}"
    )
    if found.start.processor is not None and "processor" not in found.recipe.given:
        model += f", prepared as its {found.start.processor} says"
    devices = counted(found.machine.shards, "device")
    memory = found.machine.memory
    size = "" if memory is None else f", {readable(memory)} for a step on each"
    machine = f"{found.machine.platform}: {devices} for a batch{size}"
    train, held_out = found.clips
    warnings = _single_line(clips.single) + _empty_line(train) + _shared_line(train, held_out)
    return [", ".join(parts), *warnings, model, machine]


def _single_line(single: Sequence[str]) -> list[str]:
    """A warning of classes with one clip."""
    if not single:
        return []
    return [f"one clip only of {_named(single)}: no clip is left to hold out; add clips"]


def _empty_line(train: Dataset) -> list[str]:
    """A warning of classes that the model has, and no clip to learn them from."""
    found = {*train.labels.ravel().tolist()}
    empty = [name for label, name in enumerate(train.classes or ()) if label not in found]
    if not empty:
        return []
    return [f"no clip to train on of {_named(empty)}: never predicted; add clips, or remove it"]


def _named(classes: Sequence[str]) -> str:
    more = len(classes) - _NAMED
    return ", ".join(map(quoted, classes[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _shared_line(train: Dataset, held_out: Dataset | None) -> list[str]:
    """A warning of held-out clips that are trained on."""
    shared = [] if held_out is None else shared_clips(train, held_out)
    if shared is None:
        return [
            f"not looked for among more than {MOST_COMPARED:,} clips: held-out clips that are also "
            "trained on"
        ]
    if not shared:
        return []
    are = "is" if len(shared) == 1 else "are"
    return [
        f"{counted(len(shared), 'held-out clip')} {are} also trained on, such as "
        f"{printable(shared[0], one_line=True)}: the score on them flatters; hold out others"
    ]


def _table(found: Suggestion) -> list[str]:
    rows = [("setting", "value", "reason")]
    rows += [(each.path, value_text(each.value), each.reason) for each in found.choices]
    return format_table(rows, align="left")

# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax evaluate`: the accuracy of a classifier, with all settings that affect it."""

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Literal

import jax

from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import ONE_PROCESS, Dtype, ProcessOptions, SourceOptions
from vivit_jax.cli.train import join
from vivit_jax.console import FLAT, ConfigOption, joined
from vivit_jax.errors import UserError
from vivit_jax.files.atomic import check_output, write_json
from vivit_jax.recipes import recipe_named
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train import evaluate as evaluation
from vivit_jax.train.preprocessing import central_view
from vivit_jax.train.sharding import make_mesh, param_shardings, parse_mesh

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(SourceOptions):
    """The labelled videos.

    Attributes:
        data: A list file with a path and a label in each line or in columns, or a directory with a
            folder for each class. Names of classes are matched with the model's.
    """

    data: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """The views that are averaged; None is the recipe's or the model's own.

    Attributes:
        recipe: Take the views of this recipe of `vivit-jax recipes`.
        clips: Clips along time.
        crops: Crops along the longer side.
        sampler: How frames are chosen: linspace or hold (VideoMAE), loop (ViViT), segments (TSN).
        stride: Frames between sampled frames.
        resize: Shortest side before the crop, in pixels. Default: the model's processor's.
        average: What is averaged over views, softmax (VideoMAE) or logits (scenic).
    """

    recipe: str | None = None
    clips: int | None = None
    crops: int | None = None
    sampler: Literal["hold", "linspace", "loop", "segments"] | None = None
    stride: int | None = None
    resize: int | None = None
    average: Literal["softmax", "logits"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """How the computation is spread; no answer depends on it beyond rounding.

    Attributes:
        dtype: What the model computes in.
        views_at_once: Views that go through the model together. Default: 8 for each device.
        threads: Threads that read videos.
        mesh: Sizes of the mesh of devices, such as data=8. Default: all along data.
    """

    dtype: Dtype = "float32"
    views_at_once: int | None = None
    threads: int = 2
    mesh: str | None = None


def evaluate(
    *,
    model: str,
    config: ConfigOption = (),
    data: Annotated[DataOptions, FLAT],
    views: Annotated[ViewOptions, FLAT] = ViewOptions(),
    work: Annotated[WorkOptions, FLAT] = WorkOptions(),
    out: Path | None = None,
    overwrite: bool = False,
    processes: Annotated[ProcessOptions, FLAT] = ONE_PROCESS,
) -> int:
    """Score a classifier on labelled videos, by several views of each.

    Views are clips along time by crops along the longer side. --recipe takes the views of a recipe,
    which other flags change; without it, one central view is taken as usual for the model's family.
    Frames are resized as the model's processor says, or by --resize. Videos that cannot be read are
    listed and left out of the accuracy, and the exit status is 1.

    Args:
        model: Directory, weight file or hub id, with its preprocessor_config.json.
        out: JSON file for the result, the answer for each video, and all settings that affect them.
        overwrite: Replace the file of --out.
    """
    if out is not None:
        check_output(out, (".json",), overwrite)
    join(processes)

    check_views(views)
    for flag, value in (("--views-at-once", work.views_at_once), ("--threads", work.threads)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    mesh = make_mesh(parse_mesh(work.mesh, jax.device_count()))
    changes = joined(config)
    source = open_model(model, changes, dtype=work.dtype)
    if source.head != "classification":
        raise UserError(
            f"--model {model} holds no classifier; fine-tune it first (vivit-jax finetune --start)"
        )
    dataset = data.listed(data.data, len(source.config.split_sizes))
    dataset = evaluation.model_labels(dataset, source.config)
    processor = processor_of(source)
    net, params = from_pretrained(source, "classification", dtype=work.dtype)
    chosen = chosen_views(views, net.config, processor)
    placed = jax.device_put(params, param_shardings(net, mesh))
    result = evaluation.evaluate(
        net,
        placed,
        dataset,
        chosen,
        processor,
        mesh=mesh,
        views_at_once=work.views_at_once,
        threads=work.threads,
    )
    unreadable = [
        (example.path, answer.error)
        for example, answer in zip(dataset.examples, result.answers, strict=True)
        if answer.error
    ]
    if jax.process_index() == 0:
        # First of all, so that nothing that goes wrong with the printing can lose it.
        if out is not None:
            record = _record(net, params, dataset, chosen, processor, result, model)
            write_json(out, record | {"config": list(changes)})
        for name, value in result.metrics.items():
            print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
        for path, error in unreadable:
            print(f"left out {error if error.startswith(path) else f'{path}: {error}'}")
        if out is not None:
            print(f"written to {out}")
    return int(bool(unreadable))


def check_views(options: ViewOptions) -> None:
    """UserError for a number below 1."""
    for name in ("clips", "crops", "stride", "resize"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")


def chosen_views(options: ViewOptions, config, processor) -> EvalSettings:
    """The views of the flags; warns where a resize that was to be expected is overridden."""
    chosen, overridden = central_view(config, processor), None
    if options.recipe is not None:
        published = recipe_named(options.recipe).evaluation
        if published.resize != chosen.resize:
            overridden = f"{published.resize} of the recipe"
        chosen = dataclasses.replace(published, resize=chosen.resize)
    source = "the model's processor says"
    if options.resize is not None:
        overridden, source = None, "--resize says"
        if options.resize != chosen.resize:
            overridden = f"{chosen.resize} of the model's processor"
    given = {n: v for n, v in vars(options).items() if n != "recipe" and v is not None}
    views = dataclasses.replace(chosen, **given)
    if overridden is not None:
        logger.warning(
            "the shorter side is resized to %d, as %s, not to %s", views.resize, source, overridden
        )
    return views


def _record(net, params, dataset, views, processor, result, model: str) -> dict:

    config = net.config
    videos = []
    for example, answer in zip(dataset.examples, result.answers, strict=True):
        video = {"path": example.path, "label": example.label}
        if answer.error:
            videos.append(video | {"error": answer.error})
            continue
        video["answer"] = evaluation.best_classes(config, answer.scores)
        videos.append(video | {"frames": answer.indices.tolist()})
    record = {"model": model, "data": dataset.source, "metrics": result.metrics}
    record["conditions"] = evaluation.conditions(net, params, views, processor)
    if config.class_splits is None:
        record["per_class"] = evaluation.per_class(dataset, result, config.labels)
    return record | {"videos": videos}

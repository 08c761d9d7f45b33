# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax evaluate`: accuracy of a classifier, and everything that moves the number."""

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import jax

from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from vivit_jax.cli.model import open_model
from vivit_jax.cli.train import join
from vivit_jax.console import ConfigOption, joined
from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.errors import UserError
from vivit_jax.files.atomic import check_output, write_json
from vivit_jax.recipes import recipe_named
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train import evaluate as evaluation
from vivit_jax.train.preprocessing import resize_for
from vivit_jax.train.sharding import make_mesh, param_shardings, parse_mesh

logger = logging.getLogger(__name__)


def evaluate(
    *,
    model: str,
    data: str,
    config: ConfigOption = (),
    root: str | None = None,
    frame_name: str = "img_{:05}.jpg",
    first_frame: int = 1,
    recipe: str | None = None,
    clips: int | None = None,
    crops: int | None = None,
    sampler: Literal["hold", "linspace", "loop", "segments"] | None = None,
    stride: int | None = None,
    resize: int | None = None,
    average: Literal["softmax", "logits"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    views_at_once: int | None = None,
    threads: int = 2,
    mesh: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    coordinator: str | None = None,
    processes: int = 1,
    process: int = 0,
) -> int:
    """Score a classifier on labelled videos, several views of each averaged into one answer.

    Views are clips along time by crops along the longer side. Their number and kind are a recipe's,
    changed by the flags; without --recipe one central view is taken, as the model's family reads
    it. Frames are resized as the model's processor says, unless --resize does. Videos that cannot
    be read are named, are no part of the accuracy, and make the exit status 1.

    Args:
        model: Directory, weight file or hub id, with its preprocessor_config.json.
        data: A list file with a path and a label in each line, or a directory with a folder for
            each class.
        root: Directory of the relative paths of a list. Default: the list's own.
        frame_name: Of the images in folders whose list says how many there are, as Python's
            str.format takes their number.
        first_frame: Number of a folder's first image, where the list does not say it.
        recipe: Take the views of this recipe of `vivit-jax recipes`.
        clips: Clips along time.
        crops: Crops along the longer side.
        sampler: Which frames: linspace or hold (VideoMAE), loop (ViViT), segments (TSN).
        stride: Frames from one to the next.
        resize: Shortest side before the crop, in pixels. Default: the model's processor's.
        average: What is averaged over views, softmax (VideoMAE) or logits (scenic).
        dtype: Of the computation.
        views_at_once: Views that go through the model together. Default: 8 for each device.
        threads: That read videos.
        mesh: Sizes of the mesh of devices, such as data=8. Default: all along data.
        out: Write the result with every video's answer, and all that moves the number, as JSON.
        overwrite: Replace the file of --out.
        coordinator: Address of process 0 of several, host:port.
        processes: How many processes there are.
        process: Number of this process, from 0.
    """
    if out is not None:
        check_output(out, (".json",), overwrite)
    join(coordinator, processes, process)

    for flag, value in (
        *(("--clips", clips), ("--crops", crops), ("--stride", stride), ("--resize", resize)),
        *(("--views-at-once", views_at_once), ("--threads", threads)),
    ):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    if first_frame < 0:
        raise UserError(f"--first-frame must be at least 0, got {first_frame}")
    devices = make_mesh(parse_mesh(mesh, jax.device_count()))
    changes = joined(config)
    source = open_model(model, changes, dtype=dtype)
    if source.layout.head != "classification":
        raise UserError(
            f"--model {model} holds no classifier; fine-tune it first (vivit-jax finetune --start)"
        )
    dataset = read_dataset(
        data,
        root,
        labels=len(source.config.split_sizes),
        frame_name=frame_name,
        first_frame=first_frame,
    )
    dataset = evaluation.model_labels(dataset, source.config)
    processor = processor_of(source)
    net, params = from_pretrained(
        source.checkpoint.path, "classification", config=changes, dtype=dtype
    )
    given = dict(
        clips=clips, crops=crops, sampler=sampler, stride=stride, resize=resize, average=average
    )
    given = {name: value for name, value in given.items() if value is not None}
    chosen, other = _views(net.config, processor), None
    if recipe is not None:
        published = recipe_named(recipe).evaluation
        other = f"{published.resize} of the recipe" if published.resize != chosen.resize else None
        chosen = dataclasses.replace(published, resize=chosen.resize)
    if resize is not None:
        other = f"{chosen.resize} of the model's processor" if resize != chosen.resize else None
    views = dataclasses.replace(chosen, **given)
    if other is not None:
        whose = "the model's processor says" if resize is None else "--resize says"
        logger.warning(
            "the shorter side is resized to %d, as %s, not to %s", views.resize, whose, other
        )

    placed = jax.device_put(params, param_shardings(net, devices))
    result = evaluation.evaluate(
        net,
        placed,
        dataset,
        views,
        processor,
        mesh=devices,
        views_at_once=views_at_once,
        threads=threads,
    )
    unreadable = [
        (example.path, answer.error)
        for example, answer in zip(dataset.examples, result.answers, strict=True)
        if answer.error
    ]
    if jax.process_index() == 0:
        # First of all, so that nothing that goes wrong with the printing can lose it.
        if out is not None:
            record = _record(net, params, dataset, views, processor, result, model)
            write_json(out, record | {"config": list(changes)})
        for name, value in result.metrics.items():
            print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
        for path, error in unreadable:
            print(f"left out {error if error.startswith(path) else f'{path}: {error}'}")
        if out is not None:
            print(f"written to {out}")
    return int(bool(unreadable))


def _views(config, processor):
    """One central view, as the model's family takes it, resized as its processor says."""
    return EvalSettings(
        sampler=config.view_sampler,
        stride=config.frame_stride,
        resize=max(resize_for(processor, min(config.frame_size)), *config.frame_size),
        average=config.average,
    )


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

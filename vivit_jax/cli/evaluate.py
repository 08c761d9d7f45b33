# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax evaluate`: the accuracy of a classifier, with all settings that affect it."""

import dataclasses
import functools
import itertools
import logging
import math
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax

from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import ONE_PROCESS, Dtype, ProcessOptions, SourceOptions
from vivit_jax.console import FLAT, ConfigOption, PlaceOption, joined
from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.data.read_clip import strided_sampler
from vivit_jax.errors import UserError, printable
from vivit_jax.files.atomic import check_output, whole_file, write_json
from vivit_jax.recipes import recipe_named
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train import evaluation
from vivit_jax.train.evaluation import Evaluation, clip_names, outcomes_of
from vivit_jax.train.metrics import TOP_K
from vivit_jax.train.outcomes import BINS, Outcomes
from vivit_jax.train.pages.outcome_page import confusion_csv, outcome_sections
from vivit_jax.train.pages.page import page, percent, table
from vivit_jax.train.pages.validation import shown_clips, summary
from vivit_jax.train.protocol import protocol_text
from vivit_jax.train.sharding import make_mesh, param_shardings, parse_mesh
from vivit_jax.train.start.preprocessing import central_view

logger = logging.getLogger(__name__)

_CONFUSIONS = 3  # printed


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
        stride: Frames between sampled frames. Default: the model's, as it was trained.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Files to write.

    Attributes:
        out: JSON file for the result, the answer for each video, and all settings that affect them.
        report: HTML file, which needs no other, with pictures: classes, confusions with frames of
            some videos, how right the confidences are, and videos whose views disagree.
        confusion: CSV file for the confusion matrix: a row for each true class, a column for each
            answer.
        overwrite: Replace these files.
    """

    out: PlaceOption | None = None
    report: PlaceOption | None = None
    confusion: PlaceOption | None = None
    overwrite: bool = False


def evaluate(
    *,
    model: str,
    config: ConfigOption = (),
    data: Annotated[DataOptions, FLAT],
    views: Annotated[ViewOptions, FLAT] = ViewOptions(),
    work: Annotated[WorkOptions, FLAT] = WorkOptions(),
    output: Annotated[OutputOptions, FLAT] = OutputOptions(),
    processes: Annotated[ProcessOptions, FLAT] = ONE_PROCESS,
) -> int:
    """Score a classifier on labelled videos, by several views of each.

    Views are clips along time by crops along the longer side. --recipe takes the views of a recipe,
    which other flags change; without it, one central view is taken as usual for the model's family.
    Frames are resized as the model's processor says, or by --resize. Videos that cannot be read are
    listed and left out of the accuracy, and the exit status is 1.

    Args:
        model: Directory, weight file or hub id, with its preprocessor_config.json.
    """
    _check_outputs(output)
    with processes.connected():
        return _evaluated(model, joined(config), data, views, work, output)


def _evaluated(
    model: str,
    changes: tuple[str, ...],
    data: DataOptions,
    views: ViewOptions,
    work: WorkOptions,
    output: OutputOptions,
) -> int:
    """The exit status, once the result is printed and written."""
    check_views(views)
    for flag, value in (("--views-at-once", work.views_at_once), ("--threads", work.threads)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    mesh = make_mesh(parse_mesh(work.mesh, jax.device_count()))
    source = open_model(model, changes, dtype=work.dtype)
    if source.head != "classification":
        raise UserError(
            f"--model {model} holds no classifier; fine-tune it first (vivit-jax finetune --start)"
        )
    dataset = data.listed(data.data, len(source.config.split_sizes))
    names, dataset = dataset.classes, evaluation.model_labels(dataset, source.config)
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
        found = _Found(net.config, dataset, chosen, result, names)
        # First of all, so that nothing that goes wrong with the printing can lose it.
        if output.out is not None:
            record = _record(net, params, found, processor, model)
            write_json(output.out, record | {"config": list(changes)})
        _write_pictures(output, found, model)
        print("\n".join(printable(line, one_line=True) for line in _lines(found)))
        for path, error in unreadable:
            print(f"left out {error if error.startswith(path) else f'{path}: {error}'}")
        for path in (output.out, output.report, output.confusion):
            if path is not None:
                print(f"written to {path}")
    return int(bool(unreadable))


@dataclasses.dataclass(frozen=True)
class _Found:
    """A model's answers on a data set, and how they were got."""

    config: Any
    dataset: Dataset
    views: EvalSettings
    result: Evaluation
    names: tuple[str, ...] | None  # of the data's classes

    @functools.cached_property
    def heads(self) -> list[Outcomes]:
        return outcomes_of(self.config, self.dataset, self.result, self.names)


def _check_outputs(output: OutputOptions) -> None:
    for flag, path, suffixes in (
        ("--out", output.out, (".json",)),
        ("--report", output.report, (".html",)),
        ("--confusion", output.confusion, (".csv",)),
    ):
        if path is not None:
            check_output(path, suffixes, output.overwrite, flag=flag)


def _write_pictures(output: OutputOptions, found: _Found, model: str) -> None:
    if output.confusion is not None:
        with whole_file(output.confusion) as partial:
            text = "\n".join(confusion_csv(head) for head in found.heads)
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    if output.report is None:
        return
    shown, protocol = (
        shown_clips(found.dataset, found.result),
        protocol_text(found.config, found.views),
    )
    title = f"{os.path.basename(os.path.abspath(model))} on "
    title += os.path.basename(os.path.abspath(found.dataset.source))
    sections = [
        section
        for head in found.heads
        for section in outcome_sections(head, shown, protocol, TOP_K)
    ]
    pairs = zip(
        clip_names(found.dataset), found.dataset.examples, found.result.answers, strict=True
    )
    left_out = [
        [name, (answer.error or "").replace(example.path, name)]
        for name, example, answer in pairs
        if answer.error
    ]
    sections.append(("Clips that could not be read", table(left_out, ["clip", "reason"])))
    with whole_file(output.report) as partial:
        partial.write_text(page(title, sections), encoding="utf-8")


def _lines(found: _Found) -> Iterator[str]:
    """What is printed: the protocol, and a line for each number."""
    yield f"{'protocol':24} {protocol_text(found.config, found.views)}"
    metrics = found.result.metrics
    for name, value in metrics.items():
        yield f"{name:24} {value:.2%}" if "accuracy" in name else f"{name:24} {value:g}"
    for head in found.heads:
        prefix = f"{head.head}_" if head.head else ""
        low, high = head.interval
        error, _ = head.calibration()
        yield f"{prefix + 'standard_error':24} {head.standard_error:.2%}"
        yield f"{prefix + 'interval_95':24} {low:.2%} to {high:.2%} (Wilson)"
        yield f"{prefix + 'calibration_error':24} {percent(error, 2)} (ECE, {BINS} bins)"
        if head.views.shape[1] > 1:
            yield f"{prefix + 'views_disagree':24} {len(head.disagreeing)}"
        for each in head.confusions(_CONFUSIONS):
            label, answer = head.classes[each.label], head.classes[each.answer]
            yield f"{prefix + 'confused':24} {each.clips} of {each.of} {label} taken for {answer}"


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
    if options.stride is not None and options.recipe is None:
        given.setdefault("sampler", strided_sampler(config))
    views = dataclasses.replace(chosen, **given)
    height, width = config.frame_size
    if views.resize < min(height, width):
        raise UserError(
            f"--resize is {views.resize}, and the model takes {height} x {width} pixels of a "
            f"frame; expected {min(height, width)} or more"
        )
    if overridden is not None:
        logger.warning(
            "the shorter side is resized to %d, as %s, not to %s", views.resize, source, overridden
        )
    return views


def _record(net, params, found: _Found, processor, model: str) -> dict[str, Any]:
    config, dataset, result = found.config, found.dataset, found.result
    heads, places = found.heads, itertools.count()
    videos = []
    for example, answer in zip(dataset.examples, result.answers, strict=True):
        video = {"path": example.path, "label": example.label}
        if answer.scores is None or answer.indices is None:
            videos.append(video | {"error": answer.error})
            continue
        place = next(places)
        video["answer"] = evaluation.best_classes(config, answer.scores)
        # As far as rounding on other devices leaves it alone.
        sure = [_number(round(head.confidences[place], 4)) for head in heads]
        views = [head.views[place].tolist() for head in heads]
        whole = config.class_splits is None
        video |= {
            "confidence": sure[0] if whole else sure,
            "views": views[0] if whole else views,
        }
        videos.append(video | {"frames": answer.indices.tolist()})
    record = {"model": model, "data": dataset.source, "metrics": result.metrics}
    record["summary"] = summary(config, found.views, heads)
    record["conditions"] = evaluation.conditions(net, params, found.views, processor)
    details = [_details(head) for head in heads]
    if config.class_splits is None:
        record |= details[0]
    else:
        record["heads"] = {h.head: each for h, each in zip(heads, details, strict=True)}
    return record | {"videos": videos}


def _details(head: Outcomes) -> dict[str, Any]:
    """The classes, the confusions and the calibration of a head, as JSON values."""
    names = head.classes
    _, bins = head.calibration()
    return {
        "per_class": {
            names[each.label]: {
                "videos": each.clips,
                "accuracy": each.accuracy,
                "interval_95": list(each.interval),
            }
            for each in head.per_class()
            if each.clips
        },
        "confusions": [
            {"label": names[e.label], "answer": names[e.answer], "videos": e.clips, "of": e.of}
            for e in head.confusions()
        ],
        "never_answered": [names[i] for i in head.never_answered()],
        "calibration": [
            {name: _number(value) for name, value in each._asdict().items()} for each in bins
        ],
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None

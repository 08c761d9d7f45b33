# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier on videos, several views of each averaged into one answer."""

import dataclasses
import functools
import itertools
import logging
import os
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from vivit_jax import param_tree
from vivit_jax.data.datasets.class_names import describe_unknown
from vivit_jax.data.datasets.dataset import Dataset, labels_wanted
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError, counted
from vivit_jax.layers.attention import choose_implementation
from vivit_jax.layers.explicit_axes import without_types
from vivit_jax.layers.platform import platform as platform_name
from vivit_jax.models.losses import reconstruction_targets
from vivit_jax.outputs import RESULTS_ONLY
from vivit_jax.progress import live_line
from vivit_jax.recipes.recipe import EvalSettings, MaskSettings
from vivit_jax.train.eval_views import Views
from vivit_jax.train.metrics import classification_metrics
from vivit_jax.train.normalise import Arithmetic, hashable_arithmetic, scaled_and_shifted
from vivit_jax.train.outcomes import Outcomes, outcomes
from vivit_jax.train.sharding import (
    batch_sharding,
    batch_shards,
    gathered,
    make_mesh,
    parse_mesh,
    replicated,
)
from vivit_jax.train.step import OnMesh, draw_mask
from vivit_jax.version import __version__

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A video's scores, averaged over its views, and their frames; None if it is unreadable."""

    scores: np.ndarray | None  # [classes]: logits, or logarithms of probabilities
    indices: np.ndarray | None  # [clips, t]
    error: str | None = None
    views: np.ndarray | None = None  # int32 [views, heads]: the best class of each view


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics over the readable videos, and every video's answer, in order."""

    metrics: dict[str, float]
    answers: tuple[Answer, ...]


def evaluate(
    model: nn.Module,
    params: Any,
    dataset: Dataset,
    settings: EvalSettings,
    processor: VideoProcessor,
    *,
    mesh: Mesh | None = None,
    views_at_once: int | None = None,
    threads: int = 2,
) -> Evaluation:
    """Score a labelled data set. Several processes share the videos; all get the result.

    A video has `settings.clips` places in time by `settings.crops` crops. Their softmax or their
    logits are averaged before the best class is taken. `views_at_once` go through the model
    together (default: 8 for each device of the `mesh`, by default all devices along data). A video
    that cannot be read does not count, and its answer says why. Raises UserError as `model_labels`
    does, and for averaged softmax of several heads, which gives no joint answer.
    """
    config: Any = model.config
    mesh = make_mesh(parse_mesh(None, jax.device_count())) if mesh is None else mesh
    dataset = model_labels(dataset, config)
    if config.class_splits is not None and settings.average == "softmax":
        raise UserError(
            "evaluation.average 'softmax' is for one head; for several heads average logits: set "
            "evaluation.average=logits (--average logits)"
        )
    views = _local_views(dataset, config, settings, mesh, views_at_once, threads)
    forward = _forward(model, hashable_arithmetic(processor), settings.average, mesh)
    scores = _local_results(views, lambda clips: forward(params, clips), mesh)
    scores = scores.astype(np.float64).reshape(views.videos, views.each, -1)
    best, scores = _best_of_heads(config, scores), scores.mean(1)
    if settings.average == "softmax":
        with np.errstate(divide="ignore"):
            scores = np.log(scores)
    answers = [
        Answer(None, None, error) if error else Answer(scores[i], indices, None, best[i])
        for i, (indices, error) in enumerate(views.found)
    ]
    if views.count > 1:
        answers = _gathered(answers, views, config)
    readable = {i: each.scores for i, each in enumerate(answers) if each.scores is not None}
    if not readable:
        raise UserError(
            f"none of the {counted(len(dataset), 'video')} of {dataset.source} could be read: "
            f"{answers[0].error}"
        )
    labels = np.array([dataset.examples[i].label for i in readable], np.int32)
    together = np.stack([*readable.values()]).astype(np.float32)
    metrics = _metrics(together, labels, config.class_splits, config.split_names)
    values = {name: float(value) for name, value in metrics.items()}
    values |= {"videos": len(readable), "unreadable": len(dataset) - len(readable)}
    return Evaluation(values, tuple(answers))


def evaluate_reconstruction(
    model: nn.Module,
    params: Any,
    dataset: Dataset,
    settings: EvalSettings,
    masks: MaskSettings,
    processor: VideoProcessor,
    *,
    mesh: Mesh,
    threads: int = 2,
) -> Evaluation:
    """The loss of masked pre-training on the central view of each video.

    Metrics are {"loss": mean over the readable videos, "videos": their number, "unreadable": the
    number of the others}; answers have no scores. Video i gets the same mask in every evaluation,
    on any mesh. Raises UserError if no video can be read.
    """
    config: Any = model.config
    settings = dataclasses.replace(settings, clips=1, crops=1)
    views = _local_views(dataset, config, settings, mesh, None, threads)
    forward = _errors(model, hashable_arithmetic(processor), masks, mesh)
    steps = itertools.count()

    def losses_of(clips):
        here = views.batch_size * next(steps) + np.arange(views.batch_size, dtype=np.int32)
        videos = views.index + views.count * here
        numbers = jax.make_array_from_process_local_data(batch_sharding(mesh), videos)
        return forward(params, clips, numbers)

    losses = _local_results(views, losses_of, mesh)
    readable = np.array([error is None for _, error in views.found], bool)
    totals = np.array([losses[: len(readable)][readable].sum(), readable.sum()], np.float64)
    errors = [error for _, error in views.found]
    if views.count > 1:
        totals = process_allgather(totals.astype(np.float32)).sum(0)
        errors = _gathered_errors(errors, views)
    if not totals[1]:
        raise UserError(
            f"none of the {counted(len(dataset), 'video')} of {dataset.source} could be read: "
            f"{errors[0]}"
        )
    values = {
        "loss": float(totals[0] / totals[1]),
        "videos": int(totals[1]),
        "unreadable": len(dataset) - int(totals[1]),
    }
    return Evaluation(values, tuple(Answer(None, None, error) for error in errors))


def unreadable_clips(dataset: Dataset, evaluation: Evaluation) -> dict[str, str]:
    """path -> why, for the videos of an evaluation that could not be read."""
    pairs = zip(dataset.examples, evaluation.answers, strict=True)
    return {example.path: answer.error for example, answer in pairs if answer.error is not None}


def model_labels(dataset: Dataset, config) -> Dataset:
    """The data set with labels in the numbering of the model's classes.

    If the data and the model name their classes, a clip gets the number of the model's class with
    the name of its own. Raises UserError for a name that the model lacks, and for labels that are
    missing, differ in number from the model's heads, or are outside its classes. Idempotent.
    """
    sizes = config.split_sizes
    if dataset.labels_per_example != len(sizes):
        found, way_out = dataset.labels_per_example, ""
        if not found:
            way_out = labels_wanted(dataset) or ": `vivit-jax predict DIR` needs no labels"
        raise UserError(
            f"{dataset.source} has {counted(found, 'label') if found else 'no labels'} for each "
            f"clip, the model has {counted(len(sizes), 'head')}; an evaluation compares one label "
            f"with each{way_out}"
        )
    if dataset.classes is not None and dataset.classes != config.labels:
        dataset = _named_as(dataset, dataset.classes, config)
    for found, size in zip(dataset.labels.T, sizes, strict=True):
        if found.min() < 0 or found.max() >= size:
            raise UserError(
                f"{dataset.source} has labels {found.min()} to {found.max()}, the model has "
                f"classes 0 to {size - 1}"
            )
    return dataset


def _unnamed(config) -> bool:
    """Whether the classes have no names but those that every model is given."""
    return config.labels == tuple(f"LABEL_{i}" for i in range(config.num_labels))


def _named_as(dataset: Dataset, names: tuple[str, ...], config) -> Dataset:
    """A data set of named classes in the numbering of the model's classes."""
    if _unnamed(config):
        if len(names) != config.num_labels:
            raise UserError(
                f"{dataset.source} names {counted(len(names), 'class')}, the model has "
                f"{config.num_labels} without names, so that nothing says which is which; make a "
                "folder for each, which may be empty, or pass a list of paths and numbers"
            )
        logger.warning(
            "the model does not name its classes: those of %s are taken for them in their order, "
            "%s for 0 and so on",
            dataset.source,
            names[0],
        )
        return dataclasses.replace(dataset, classes=config.labels)
    numbers = {name: i for i, name in enumerate(config.labels)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise UserError(
            f"{dataset.source}: {len(unknown)} of {counted(len(names), 'name')} not among the "
            f"model's classes: {describe_unknown(unknown, config.labels)}; name classes as the "
            f"model does ({', '.join(config.labels[:3])}, ...), or pass a list of paths and "
            "numbers"
        )
    numbered = np.array([numbers[name] for name in names], np.int32)
    return dataset.labelled(numbered[dataset.labels], classes=config.labels)


def best_classes(config, scores: Float[np.ndarray, " classes"]) -> int | list[int]:
    """The class with the highest score, one for each head of several."""
    best = _best_of_heads(config, scores).tolist()
    return best[0] if config.class_splits is None else best


def _best_of_heads(
    config, scores: Float[np.ndarray, "*b classes"]
) -> Int32[np.ndarray, "*b heads"]:
    """The class with the highest score of each head."""
    heads = np.split(scores, np.cumsum(config.split_sizes)[:-1], axis=-1)
    return np.stack([head.argmax(-1).astype(np.int32) for head in heads], axis=-1)


def outcomes_of(
    config, dataset: Dataset, evaluation: Evaluation, names: tuple[str, ...] | None = None
) -> list[Outcomes]:
    """What became of the readable videos, for each head of the model.

    `dataset` has the labels of `model_labels`, `names` are those of the data's classes, which stand
    for those of a model without names.
    """
    labels = names if names and _unnamed(config) else config.labels
    pairs = zip(dataset.examples, clip_names(dataset), evaluation.answers, strict=True)
    readable = [(example, name, a) for example, name, a in pairs if a.scores is not None]
    truth = np.array([example.label for example, _, _ in readable], np.int64)
    truth = truth.reshape(len(readable), -1)
    ends = np.cumsum(config.split_sizes)
    scores = np.stack([a.scores for _, _, a in readable if a.scores is not None])
    scores = np.split(scores, ends[:-1], axis=-1)
    views = [a.views for _, _, a in readable if a.views is not None]
    whole = np.stack(views) if len(views) == len(readable) else None  # [n, views, heads]
    heads = config.split_names or tuple(str(i + 1) for i in range(len(ends)))
    found = []
    for head, (own, end, size) in enumerate(zip(scores, ends, config.split_sizes, strict=True)):
        found.append(
            outcomes(
                own,
                truth[:, head],
                classes=labels[end - size : end],
                clips=[name for _, name, _ in readable],
                views=None if whole is None else whole[:, :, head],
                head="" if config.class_splits is None else heads[head],
            )
        )
    return found


def clip_names(dataset: Dataset) -> list[str]:
    """The path of each clip below the data set's root; of one elsewhere its name alone."""
    root = os.path.join(dataset.root, "") if dataset.root else ""
    return [
        example.path.removeprefix(root)
        if root and example.path.startswith(root) or not os.path.isabs(example.path)
        else os.path.basename(example.path)
        for example in dataset.examples
    ]


def conditions(model: nn.Module, params: Any, settings: EvalSettings, processor) -> dict[str, Any]:
    """Everything else that the metrics depend on, as JSON values."""
    import av
    import PIL

    config: Any = model.config
    return {
        "views": dataclasses.asdict(settings),
        "frames": config.num_frames,
        "size": list(config.frame_size),
        "processor": processor.to_dict(),
        "resize": "bilinear with half-pixel centres, no antialiasing, rounded to bytes",
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "attention": config.attention,
        "attention_chosen": _attention(config),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        "params_sha256": param_tree.params_hash(params),
        "decoder": {"av": av.__version__, **{k: list(v) for k, v in av.library_versions.items()}},
        "pillow": PIL.__version__,
        "jax": jax.__version__,
        "vivit_jax": __version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
    }


def _attention(config) -> str:
    """The attention backend for the model's longest sequence on this platform."""
    if config.attention != "auto":
        return config.attention
    t, h, w = config.grid
    joint = config.attention_type == "joint"
    length = (t if joint else 1) * h * w + (config.pooling == "cls")
    return choose_implementation(platform_name(), config.dtype, config.head_width, length)


_metrics = jax.jit(classification_metrics, static_argnums=(2, 3))


# Equal models share the compiled function, from one evaluation of a run to the next.
@functools.lru_cache(maxsize=8)
def _forward(model: nn.Module, values: Arithmetic, average: str, mesh: Mesh):
    """(params, uint8 [b, t, h, w, c]) -> [b, classes] in float32: probabilities or logits."""
    normalise = scaled_and_shifted(*values)

    def forward(params, clips):
        params = without_types(params)
        out: Any = model.apply({"params": params}, normalise(clips), **RESULTS_ONLY)
        logits = out.logits.astype(jnp.float32)
        return jax.nn.softmax(logits) if average == "softmax" else logits

    return OnMesh(jax.jit(forward, out_shardings=replicated(mesh)), mesh)


@functools.lru_cache(maxsize=8)
def _errors(model: nn.Module, values: Arithmetic, masks: MaskSettings, mesh: Mesh):
    """(params, uint8 [b, t, h, w, c], numbers of the videos [b]) -> mean error of each [b]."""
    config: Any = model.config
    normalise = scaled_and_shifted(*values)

    def mask_of(number):
        key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), number)
        mask = draw_mask(masks, key, 1, config.grid)
        return jax.tree.map(lambda indices: indices[0], mask)

    def errors(params, clips, numbers):
        params = without_types(params)
        mask = jax.vmap(mask_of)(numbers)
        pixels = normalise(clips)
        out: Any = model.apply({"params": params}, pixels, mask, **RESULTS_ONLY)
        logits = out.logits.astype(jnp.float32)
        targets = reconstruction_targets(pixels, mask, config)
        tokens = jnp.mean((logits - targets) ** 2, axis=-1)
        counted = jnp.ones_like(tokens) if mask.counted is None else mask.counted
        return jnp.sum(tokens * counted, axis=1) / jnp.sum(counted, axis=1)

    return OnMesh(jax.jit(errors, out_shardings=replicated(mesh)), mesh)


def _local_views(dataset, config, settings, mesh: Mesh, at_once: int | None, threads: int) -> Views:
    count, shards = jax.process_count(), batch_shards(mesh.shape)
    if at_once is not None and at_once < 1:
        raise UserError(f"views_at_once is {at_once}, expected at least 1 (--views-at-once)")
    batch_size = -(-(at_once or 8 * shards) // shards) * shards // count
    return Views(dataset, config, settings, batch_size, jax.process_index(), count, threads)


def _local_results(views: Views, forward: Callable, mesh: Mesh) -> np.ndarray:
    """The results of `forward` for this process's views, [videos * views of each, ...]."""
    first, outputs = views.index * views.batch_size, []
    with live_line("videos") as progress:
        for number, batch in enumerate(views, 1):
            clips = jax.make_array_from_process_local_data(batch_sharding(mesh), batch)
            outputs.append(np.asarray(forward(clips))[first : first + views.batch_size])
            if views.index == 0:
                done = number * views.batch_size // views.each
                progress(min(done, views.videos), views.videos)
    return np.concatenate(outputs)[: views.videos * views.each]


def _gathered(answers: list[Answer], views: Views, config) -> list[Answer]:
    """The answers of all processes, in the data set's order."""
    most, heads = views.videos, len(config.split_sizes)
    scores = np.zeros((most, config.num_labels), np.float32)
    indices = np.zeros((most, views.settings.clips, config.num_frames), np.int32)
    best = np.zeros((most, views.settings.clips * views.settings.crops, heads), np.int32)
    for i, answer in enumerate(answers):
        if answer.scores is not None and answer.indices is not None:
            assert answer.views is not None, "evaluate gives all three"
            scores[i], indices[i], best[i] = answer.scores, answer.indices, answer.views
    scores, indices, best = map(process_allgather, (scores, indices, best))
    whole = []
    for i, error in enumerate(_gathered_errors([answer.error for answer in answers], views)):
        at = i % views.count, i // views.count
        whole.append(
            Answer(scores[at], indices[at], None, best[at])
            if error is None
            else Answer(None, None, error)
        )
    return whole


def _gathered_errors(errors: list[str | None], views: Views) -> list[str | None]:
    """Why videos could not be read, of all processes, in the data set's order."""
    every = gathered(errors)
    return [every[i % views.count][i // views.count] for i in range(len(views.dataset))]

# SPDX-License-Identifier: Apache-2.0
"""Probing: how well a frozen model's features tell the classes of labelled clips apart.

Features are computed once. A linear or an attentive head is trained on them with several strengths
of regularisation, cross-validation chooses one, and the backbone with that head is saved as an
ordinary model, whose scores are the probe's.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from checkpoints_convert.card import binomial_error
from checkpoints_convert.pretrained import Labels, plan_load, save_pretrained
from checkpoints_convert.processor import processor_of
from checkpoints_convert.source import Source, open_source
from vivit_jax import param_tree
from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.errors import UserError, counted
from vivit_jax.files.atomic import check_directory, write_json
from vivit_jax.files.staging import names_in
from vivit_jax.inference.probe_attentive import AttentiveProbe
from vivit_jax.inference.probe_card import probe_facts
from vivit_jax.inference.probe_data import Sides, Validation, class_names, sides_of
from vivit_jax.inference.probe_features import ClipFeatures, Frozen, clip_features
from vivit_jax.inference.probe_linear import (
    LinearProbe,
    accuracy_and_loss,
    neighbour_scores,
    stratified_folds,
)
from vivit_jax.inference.probe_record import PROBE, Probe, ProbeSettings, Score, Trial
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train.evaluation import model_labels
from vivit_jax.train.protocol import protocol_text
from vivit_jax.train.start.preprocessing import as_trained, central_view

logger = logging.getLogger(__name__)

RESULT, MODEL, FEATURES = "probe.json", "model", "features"


def probe(
    model: str | Path | Source,
    data: str | Path | Dataset | Sides,
    out: str | Path,
    *,
    validation: Validation = None,
    views: EvalSettings | None = None,
    settings: ProbeSettings = PROBE,
    overwrite: bool = False,
    say: Callable[[str], None] = logger.info,
) -> Probe:
    """Probe a model on labelled clips, and write the backbone with the head to `out`/model.

    An interrupted call goes on where it stopped: the features of each clip are in `out`/features,
    and are used again for as long as model, clips and preprocessing are the same.

    Args:
        model: a directory, weight file, hub id or opened `Source`, with any head.
        data: the training clips, see `read_dataset`; a data set; or both sides of `sides_of`.
        out: a directory: new, or that of an interrupted probe.
        validation: held-out clips, or the share of each class of `data` to hold out, 0 for none.
            Default: the data's own split, if they have one, else 0.2.
        views: the views of a clip that are averaged. Default: one central view, as in `evaluate`.
            The model that is written takes its sampler and stride from them.
        settings: the head, cross-validation and the rest.
        overwrite: replace the model and the probe.json of a finished probe.
        say: called with lines on what is done.

    Raises UserError for clips without labels or of one class, and for a directory that holds
    something else; otherwise what `open_source` and `read_dataset` raise.
    """
    out = Path(out)
    check_settings(settings)
    check_out(out, overwrite)
    source = open_source(model, dtype=settings.dtype)
    processor = processor_of(source)
    sides = data if isinstance(data, Sides) else sides_of(data, validation, seed=settings.seed)
    names = class_names(sides.train)
    net, params, report = _frozen_model(source, names, settings)
    if views is None:
        views = central_view(net.config, processor)
    if sides.held_out is not None:
        sides = dataclasses.replace(sides, held_out=model_labels(sides.held_out, net.config))
    frozen = Frozen(net, params, processor, views, tokens=settings.head == "attentive")
    say(f"model     {source}: {net.config.title}, {source.architecture}")
    say(f"data      {_sides_line(sides, names)}")
    say(f"features  {_features_line(net.config, settings.head)}")
    say(f"protocol  {protocol_text(net.config, views)}")

    begun = time.monotonic()
    found = _Found.of(frozen, sides, out / FEATURES, settings.threads)
    featured = time.monotonic()
    result, head = _probed(found, net.config, views, settings)
    taken = {"features": featured - begun, "head": time.monotonic() - featured}
    notes = (*found.notes, *result.notes)

    whole = param_tree.unflatten(param_tree.flatten(params) | head)
    card = probe_facts(result, source, sides, net.config, views)
    saved = net.clone(config=as_trained(net.config, views.sampler, views.stride))
    save_pretrained(out / MODEL, saved, whole, processor, overwrite=True, card=card)
    result = dataclasses.replace(
        result, model=out / MODEL, start=str(source), seconds=taken, notes=notes
    )
    write_json(out / RESULT, result.to_dict() | {"taken_from_start": report})
    return result


@dataclasses.dataclass(frozen=True)
class _Found:
    """The features and labels of both sides."""

    train: ClipFeatures
    labels: Int[np.ndarray, " n"]
    held: ClipFeatures | None
    held_labels: Int[np.ndarray, " m"]
    names: tuple[str, ...]
    unreadable: Mapping[str, str]
    stride: int

    @classmethod
    def of(cls, frozen: Frozen, sides: Sides, folder: Path, threads: int) -> "_Found":
        """Computes or reads them. UserError if the readable training clips are of one class."""
        config = frozen.model.config
        train = clip_features(frozen, sides.train, folder, threads=threads, name="training clips")
        labels = _labels(sides.train, train)
        unreadable = dict(train.unreadable)
        if len(np.unique(labels)) < 2:
            raise UserError(
                f"{sides.train.source}: the {len(train)} readable clips are of one class, and "
                f"there is nothing to tell apart; {len(unreadable)} cannot be read"
            )
        held, held_labels = None, np.zeros(0, np.int64)
        if sides.held_out is not None:
            dataset = sides.held_out
            held = clip_features(frozen, dataset, folder, threads=threads, name="held-out clips")
            held_labels = _labels(dataset, held)
            unreadable |= held.unreadable
        stride = frozen.views.stride
        return cls(train, labels, held, held_labels, config.labels, unreadable, stride)

    @property
    def repeated(self) -> tuple[str, ...]:
        """Paths of clips on either side that are too short for a view."""
        return (*self.train.repeated, *(self.held.repeated if self.held else ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the clips alone say."""
        notes = []
        counts = np.bincount(self.labels, minlength=len(self.names))
        empty = [name for name, count in zip(self.names, counts, strict=True) if not count]
        if empty:
            notes.append(f"no clip to train on of {', '.join(empty)}: never predicted")
        both = [] if self.held is None else set(self.held.groups) & set(self.train.groups)
        if both:
            notes.append(f"{counted(len(both), 'held-out clip')} also among the training clips")
        short = self.repeated
        if short:
            notes.append(
                f"{counted(len(short), 'clip')} too short for a view, so that frames repeat"
                f"{'; a smaller --stride may fit' * (self.stride > 1)}: {', '.join(short[:3])}"
                f"{', ...' * (len(short) > 3)}"
            )
        return tuple(notes)


def _labels(dataset: Dataset, features: ClipFeatures) -> Int[np.ndarray, " n"]:
    return np.array([dataset.examples[i].label for i in features.clips], np.int64)


def _probed(
    found: _Found, config: Any, views: EvalSettings, settings: ProbeSettings
) -> tuple[Probe, dict[str, np.ndarray]]:
    """The result, without the places of models, and the head by path."""
    labels, train, held = found.labels, found.train, found.held
    if settings.head == "attentive":
        head: Any = AttentiveProbe(config, train, labels, views.average, settings.seed)
    else:
        head = LinearProbe(train, labels, config.num_labels, views.average)
    folds, count = stratified_folds(labels, train.groups, settings.folds, settings.seed)
    trials = _trials(head, labels, folds, settings.decays) if count else ()
    decay, notes = _chosen(trials, settings.decays)
    notes += _fold_notes(folds, count, found, settings.folds)
    fitted = head.fit(decay)
    # Of a rare class at most its few clips can vote, but it does not decide for all others.
    usual = int(np.median(np.bincount(labels)[np.unique(labels)]))
    k = min(settings.neighbours, usual)
    known = head.scores(fitted, train)
    result = Probe(
        model=Path(),
        start="",
        head=settings.head,
        weight_decay=decay,
        trials=trials,
        folds=count,
        k=k,
        train=_score(known, labels, _voted(found, train, config.num_labels, k)),
        held_out=None,
        chance=_most_frequent(labels),
        per_class={},
        classes=found.names,
        protocol=_protocol(config, views, settings.head),
        notes=tuple(notes),
        unreadable=found.unreadable,
        repeated=found.repeated,
        seconds={},
    )
    if held is None:
        return result, fitted
    truth, scores = found.held_labels, head.scores(fitted, held)
    result = dataclasses.replace(
        result,
        held_out=_score(scores, truth, _voted(found, held, config.num_labels, k)),
        chance=_most_frequent(truth),
        per_class=_per_class(scores.argmax(1) == truth, truth, found.names),
    )
    return result, fitted


def _trials(
    head: Any, labels: Int[np.ndarray, " n"], folds: Int[np.ndarray, " n"], decays: Sequence[float]
) -> tuple[Trial, ...]:
    """Cross-validation: each clip in a fold is asked once of each strength."""
    asked = folds >= 0
    scores = head.out_of_fold(folds, decays)[:, asked]
    each = [accuracy_and_loss(row, labels[asked]) for row in scores]
    return tuple(Trial(decay, *values) for decay, values in zip(decays, each, strict=True))


def _chosen(trials: Sequence[Trial], decays: Sequence[float]) -> tuple[float, list[str]]:
    """The weight decay of the most accurate trial, and what is to be said of it."""
    if not trials:
        decay = decays[len(decays) // 2]
        return decay, [f"no class has two clips to cross-validate with: weight decay {decay:g}"]
    # Few clips often give equal accuracies.
    best = min(trials, key=lambda trial: (-trial.accuracy, trial.loss))
    decay = best.weight_decay
    at_end = len(decays) > 1 and decay in (min(decays), max(decays)) and best.accuracy < 1
    return decay, [f"weight decay {decay:g} is at an end of those that were tried"] * at_end


def _per_class(
    right: Bool[np.ndarray, " m"], labels: Int[np.ndarray, " m"], names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    return {
        names[c]: {"clips": int((labels == c).sum()), "accuracy": float(right[labels == c].mean())}
        for c in np.unique(labels)
    }


def _most_frequent(labels: Int[np.ndarray, " n"]) -> float:
    """The share of the most frequent class."""
    return float(np.bincount(labels).max() / len(labels))


def _protocol(config: Any, views: EvalSettings, head: str) -> dict[str, Any]:
    return dataclasses.asdict(views) | {
        "frames": config.num_frames,
        "size": list(config.frame_size),
        "features": _features_line(config, head),
        "dtype": config.dtype,
    }


def _score(
    scores: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, " n"],
    votes: Float[np.ndarray, "n classes"],
) -> Score:
    accuracy, loss = accuracy_and_loss(scores, labels)
    neighbours = float((votes.argmax(1) == labels).mean())
    return Score(len(labels), accuracy, binomial_error(accuracy, len(labels)), loss, neighbours)


def _voted(found: _Found, asked: ClipFeatures, classes: int, k: int) -> Float[np.ndarray, "n k"]:
    """The neighbours' votes, by the mean features of a clip's views; copies do not vote."""
    groups = np.array(found.train.groups)
    own = np.array(asked.groups)[:, None] == groups[None]
    own &= asked is found.train
    pooled = (x.pooled.astype(np.float64).mean(1) for x in (found.train, asked))
    known, others = pooled
    return neighbour_scores(known, found.labels, others, classes, k, own)


def _fold_notes(folds: Int[np.ndarray, " n"], count: int, found: _Found, wanted: int) -> list[str]:
    """Notes on where cross-validation is less than was asked for."""
    notes, groups = [], np.array(found.train.groups)
    different = {c: len(set(groups[found.labels == c])) for c in np.unique(found.labels)}
    if 0 < count < wanted:
        clips = counted(count, "clip")
        notes.append(f"{count} folds, not {wanted}: no class has more than {clips} to train on")
    alone = [found.names[c] for c, number in different.items() if number == 1]
    if alone:
        why = "in no fold, always trained on; add clips"
        notes.append(f"one clip only to train on of {', '.join(alone)}: {why}")
    return notes


def _frozen_model(
    source: Source, names: tuple[str, ...], settings: ProbeSettings
) -> tuple[Any, dict[str, Any], list[str]]:
    """The model with a classifier of these classes, its parameters, and what was left out."""
    config: Any = source.config
    changes: dict[str, Any] = {"class_splits": None, "split_names": None, "problem_type": None}
    attends = hasattr(type(config), "attentive_heads") and any(
        field.name == "attentive_heads" for field in dataclasses.fields(config)
    )
    if settings.head == "attentive" and not attends:
        raise UserError(
            f"{source} is a {config.title}, which has no attentive head; use --head linear"
        )
    if attends:
        heads = settings.attentive_heads or config.num_attention_heads
        changes["attentive_heads"] = heads if settings.head == "attentive" else None
    # As in fine-tuning: the first token of a masked autoencoder stands for nothing.
    pooled = getattr(config, "use_mean_pooling", True)
    if settings.head == "linear" and source.head != "classification" and not pooled:
        changes["use_mean_pooling"] = True
    plan = plan_load(
        source,
        "classification",
        changes=changes,
        labels=Labels(id2label=names),
        dtype=settings.dtype,
    )
    params = param_tree.unflatten(plan.read("float32", settings.seed))
    return plan.model, params, str(plan.report).splitlines()


def check_settings(settings: ProbeSettings) -> None:
    """UserError for settings that no probe can have."""
    for name, least in (("folds", 2), ("neighbours", 1), ("threads", 1), ("seed", 0)):
        value = getattr(settings, name)
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be an int of at least {least} (--{name}), got {value!r}")
    for decay in settings.decays:
        if not 0 < decay < math.inf:
            raise UserError(f"weight decays must be above 0 (--weight-decays), got {decay:g}")
    if settings.attentive_heads is not None and settings.head != "attentive":
        raise UserError(
            f"attentive_heads {settings.attentive_heads} is for the attentive head "
            "(--head attentive)"
        )


def check_out(out: Path, overwrite: bool) -> None:
    """UserError unless a probe can be written to a directory, or go on there."""
    check_directory(out, [RESULT])
    if (out / RESULT).exists():
        if not overwrite:
            raise UserError(
                f"--out {out} holds a finished probe; --overwrite probes again, with the features "
                "that still fit, or choose another directory"
            )
        return
    there = set(names_in(out)) if out.is_dir() else set()
    others = sorted(there - {FEATURES, MODEL} if FEATURES in there else there)
    if others:
        raise UserError(
            f"--out {out} is not empty ({', '.join(others[:3])}); choose a new directory"
        )


def _sides_line(sides: Sides, names: tuple[str, ...]) -> str:
    parts = [counted(len(sides.train), "training clip")]
    if sides.held_out is not None:
        parts.append(f"{len(sides.held_out)} held out ({sides.how})")
    elif sides.how:
        parts.append(sides.how)
    return f"{sides.train.source}: {', '.join(parts)}, {counted(len(names), 'class')}"


def _features_line(config: Any, head: str) -> str:
    """What the head reads, in words."""
    if head == "attentive":
        return f"all tokens of the last layer, {config.hidden_size} values each"
    if config.pooling == "cls":
        read = "the class token of the last layer"
    elif getattr(config, "use_mean_pooling", False):
        read = "the norm of the mean of the last layer's tokens"
    else:
        read = f"{config.pooling or 'the first'} of the last layer's tokens"
    return f"{read}, {config.hidden_size} values"

# SPDX-License-Identifier: Apache-2.0
"""Loads models from any layout and saves them as HuggingFace directories."""

import dataclasses
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from checkpoints_convert.card import CardFacts, write_card
from checkpoints_convert.card_code import SavedModel
from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.files.save import check_destination, replaced_directory, write_weights
from checkpoints_convert.layouts.hf import write_config
from checkpoints_convert.layouts.layout import StoredModel
from checkpoints_convert.layouts.registry import published
from checkpoints_convert.problems import collapse
from checkpoints_convert.rules import (
    Row,
    Rule,
    expand,
    export_params,
    match_import,
    read_params,
    stored_dtype,
)
from checkpoints_convert.source import Source, open_source
from vivit_jax import param_tree
from vivit_jax.config import ARCHITECTURES, Config, check_head
from vivit_jax.errors import ConfigError, UserError
from vivit_jax.models.build import abstract_params, build_model, check_float64, initialise
from vivit_jax.models.registry import head_of

logger = logging.getLogger(__name__)
_NAMED = 4  # names in a line of a brief report


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What loading a checkpoint into a model changes; `str()` has all names.

    The message that is logged is `brief`, which counts names where they are many.

    `dropped` and `ignored` are tensor names of the checkpoint; `fresh` are per-layer parameter
    paths of the model that the checkpoint does not have. `notes` say what else matters, such
    as what was assumed for a file without a config.
    """

    source: str
    model: str
    dropped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.dropped or self.ignored or self.fresh or self.notes)

    def __str__(self) -> str:
        return self._text(collapse)

    @property
    def brief(self) -> str:
        """The same with counts in place of long lists of names, and where the names are."""
        text = self._text(_few_or_counted)
        if _many(self.dropped) or _many(self.ignored):
            source = shlex.quote(self.source)
            text += f"\n  the checkpoint's tensors by name: vivit-convert inspect {source}"
        return text

    def _text(self, listed: Callable[[Sequence[str]], Sequence[str]]) -> str:
        lines = [f"{self.source} loaded into {self.model}:"]
        for title, names in (
            ("freshly initialised, not in the checkpoint", self.fresh),
            ("in the checkpoint, not in this model", self.dropped),
            ("in the checkpoint, without effect", self.ignored),
        ):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(listed(names))}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def _many(names: Sequence[str]) -> bool:
    return len(collapse(names)) > _NAMED


def _few_or_counted(names: Sequence[str]) -> list[str]:
    """A few names, or how many there are under each first part of a name."""
    if not _many(names):
        return collapse(names)
    parts = Counter(re.split("[./]", name)[0] for name in names)
    return [part if count == 1 else f"{part} {count}" for part, count in parts.items()]


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of a model's classifier, as `from_pretrained` takes them; None: unchanged."""

    num_labels: int | None = None
    id2label: Mapping[int, str] | Sequence[str] | None = None
    class_splits: Sequence[int] | None = None
    split_names: Sequence[str] | None = None


class InitialisedModel(NamedTuple):
    """A model, its parameters, and a report of what was taken from the checkpoint."""

    model: nn.Module
    params: dict[str, Any]
    report: LoadReport


def from_pretrained(
    source: str | Path | Checkpoint | Source,
    head: str | None = None,
    *,
    config: Mapping[str, Any] | Iterable[str] | None = None,
    dtype: str = "float32",
    param_dtype: str | None = "float32",
    attention: str = "auto",
    scan_layers: bool = True,
    remat: str = "dots",
    num_labels: int | None = None,
    id2label: Mapping[int, str] | Sequence[str] | None = None,
    class_splits: Sequence[int] | None = None,
    split_names: Sequence[str] | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model and its parameters from a directory, a weight file, a hub id or a `Source`.

    `head` is "classification", "pretraining" or "none", by default what the checkpoint holds.
    Another head, another number of labels or other `class_splits` leave parts of the checkpoint out
    and initialise others from `seed`; a warning lists them, see `load_report`. `num_labels` or
    `id2label` without `class_splits` gives one classifier. Parameters are cast to `param_dtype`
    (None: as stored) while they are read.

    `config` sets fields by the names of config.json, as a mapping or as "key=value" texts: fields
    that the authors' and scenic's files leave open (num_attention_heads, num_frames, image_size),
    or that training changes (drop_path_rate).

    Raises CheckpointError, listing everything at once, if a tensor is missing, unexpected or has a
    wrong shape, ConfigError for a config.json or an option that is not supported.
    """
    plan = plan_load(
        source,
        head,
        settings=config,
        labels=Labels(num_labels, id2label, class_splits, split_names),
        revision=revision,
        dtype=dtype,
        param_dtype=param_dtype,
        attention=attention,
        scan_layers=scan_layers,
        remat=remat,
    )
    model, params, _ = plan.load(param_dtype, seed)
    return model, params


def load_report(
    source: str | Path | Checkpoint | Source,
    head: str | None = None,
    *,
    config: Mapping[str, Any] | Iterable[str] | None = None,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | Sequence[str] | None = None,
    class_splits: Sequence[int] | None = None,
    split_names: Sequence[str] | None = None,
    revision: str | None = None,
) -> LoadReport:
    """What `from_pretrained` with these arguments leaves out and initialises.

    Checks names and shapes, and raises, as `from_pretrained` does, but reads no weights.
    """
    return plan_load(
        source,
        head,
        settings=config,
        labels=Labels(num_labels, id2label, class_splits, split_names),
        revision=revision,
    ).report


def save_pretrained(
    directory: str | Path,
    model: nn.Module,
    params: Mapping[str, Any],
    processor: Any = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    card: CardFacts | None = None,
) -> None:
    """Write a directory that transformers opens as it is.

    It holds config.json, model.safetensors (or shards of at most `max_shard_size`, bytes or "5GB")
    in the dtype of `params`, the processor's preprocessor_config.json, and a model card, README.md,
    with what the model itself and `card` say. The directory appears complete or not at all; a
    non-empty one is an error unless `overwrite`, which replaces the model files in it, but no card
    that was edited. Raises CheckpointError that lists every parameter that does not fit the model.
    """
    if not isinstance(params, Mapping):
        raise UserError(
            f"params must be the model's nested dict of arrays, got {type(params).__name__}"
        )
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise UserError(f"processor must be a VideoProcessor, got {type(processor).__name__}")
    check_destination(directory, overwrite)
    _check_statistics(model, processor)
    if type(model).__name__ not in ARCHITECTURES:
        raise UserError(
            f"cannot save a {type(model).__name__}; expected one of {', '.join(ARCHITECTURES)}"
        )
    family, head = ARCHITECTURES[type(model).__name__]
    config = model.config
    stored = published(family, head, pooler=getattr(model, "add_pooling_layer", False))
    flat = param_tree.flatten(meta.unbox(params))
    _check_addressable(flat)
    what = f"params for {type(model).__name__}"
    tensors = export_params(flat, stored.rules(config), _shapes(model), what)
    with replaced_directory(directory, overwrite) as staged:
        write_weights(staged, tensors, max_shard_size)
        write_config(staged, config, head, stored_dtype(tensors), pooler=stored.pooler)
        if processor is not None:
            processor.save_pretrained(staged)
        saved = SavedModel(
            config=config,
            head=head,
            parameters=sum(leaf.size for leaf in flat.values()),
            dtype=stored_dtype(tensors),
            processor=processor,
            pooler=stored.pooler,
        )
        write_card(staged, Path(directory), saved, card or CardFacts())


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return param_tree.shapes_of(param_tree.flatten(abstract_params(model)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A load, planned and checked before any data is read."""

    model: nn.Module
    tensors: dict[str, Any]
    rows: list[Row]
    expected: dict[str, tuple[int, ...]]
    fresh_leaves: set[str]
    report: LoadReport

    def load(self, param_dtype: str | None, seed: int) -> InitialisedModel:
        """The model with its parameters; logs the report unless it is empty."""
        if self.report:
            logger.warning("%s", self.report.brief)
        params = param_tree.unflatten(self.read(param_dtype, seed))
        return InitialisedModel(self.model, params, self.report)

    def read(self, param_dtype: str | None, seed: int) -> dict[str, Any]:
        """Parameters by path: the checkpoint's, and the fresh ones drawn from `seed`."""
        flat: dict[str, Any] = read_params(self.tensors, self.rows, self.expected, param_dtype)
        for path in flat:
            # On CPU jax adopts the aligned array; elsewhere it is freed once it is transferred.
            flat[path] = jax.device_put(flat[path], may_alias=True)
        if self.fresh_leaves:
            flat |= initialise(self.model, self.fresh_leaves, seed)
        return dict(sorted(flat.items()))


def plan_load(
    source: str | Path | Checkpoint | Source,
    head: str | None,
    *,
    settings: Mapping[str, Any] | Iterable[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    labels: Labels | None = None,
    revision: str | None = None,
    **execution: Any,
) -> Plan:
    """Plan loading a checkpoint into a model with another head, other `labels` or `changes`.

    `settings` are fields of the checkpoint's own config, `changes` fields of the model that it is
    loaded into.
    """
    as_stored = execution.get("param_dtype", "float32") is None
    if as_stored:
        execution["param_dtype"] = "float32"
    opened = open_source(source, revision=revision, settings=settings or {}, **execution)
    held, tensors = opened.stored, opened.tensors
    head = head or held.head
    check_head(held.family, head)
    config = _relabel(opened.config, head, labels or Labels())
    if head != "classification" and config.attentive_heads is not None:
        config = dataclasses.replace(config, attentive_heads=None)  # of the classifier
    config = dataclasses.replace(config, **(changes or {}))
    if as_stored:
        config = dataclasses.replace(config, param_dtype=stored_dtype(tensors))
    check_float64(config)
    wanted = held.with_head(head)
    model = build_model(config, head, add_pooling_layer=wanted.pooler)

    kept, fresh, dropped = _split(held, wanted, opened.config, config)
    dropped_names = {row.src for row in expand(dropped)} & tensors.keys()
    tensors = {name: tensors[name] for name in tensors if name not in dropped_names}
    expected = _shapes(model)
    slots = param_tree.slots(expected)
    fresh_paths = [path for row in expand(fresh) for path in row.dst]
    fresh_leaves = {slots[path].leaf for path in fresh_paths}
    expected = {path: shape for path, shape in expected.items() if path not in fresh_leaves}
    rows = match_import(tensors, kept, expected, opened.title)
    ignored = [row for row in rows if not row.dst]
    report = LoadReport(
        source=str(opened.checkpoint),
        model=type(model).__name__,
        dropped=tuple(sorted(dropped_names)),
        ignored=tuple(row.src for row in ignored),
        fresh=tuple(fresh_paths),
        notes=(
            *opened.notes,
            *_notes(model, held, opened.config, bool(fresh_leaves)),
            *sorted({row.rule.reason for row in ignored}),
        ),
    )
    return Plan(model, tensors, rows, expected, fresh_leaves, report)


def _notes(model: nn.Module, held: StoredModel, stored: Config, fresh: bool) -> list[str]:
    """Notes on changes that the lists of a report do not show."""
    notes = []
    labels = model.config.num_labels
    if held.head == "classification" and labels != stored.num_labels:
        notes.append(f"num_labels is {labels}, the checkpoint's classifier has {stored.num_labels}")
    splits = model.config.class_splits
    if held.head == "classification" and splits != stored.class_splits:
        notes.append(f"class_splits is {splits}, the checkpoint's is {stored.class_splits}")
    if getattr(type(model), "add_pooling_layer", False) and not model.add_pooling_layer:
        notes.append("the checkpoint holds no pooling layer: add_pooling_layer=False")
    mean_pooled = getattr(model.config, "use_mean_pooling", True)
    if head_of(model) == "classification" and fresh and not mean_pooled:
        notes.append(
            "use_mean_pooling is false: the classifier reads the first token, as in transformers; "
            "init_from_pretraining makes the authors' classifier, on the mean of all tokens"
        )
    return notes


def _split(
    held: StoredModel, wanted: StoredModel, stored: Config, config: Config
) -> tuple[list[Rule], list[Rule], list[Rule]]:
    """The rules to read, those whose parameters are initialised, and those to leave out."""
    present = {rule.src for rule in held.rules(stored)}
    new_labels = (config.num_labels, config.class_splits) != (
        stored.num_labels,
        stored.class_splits,
    )
    kept, fresh = [], []
    for rule in wanted.rules(config):
        replaced = new_labels and isinstance(rule.dst, str) and rule.dst.startswith("head/")
        (fresh if replaced or rule.src not in present else kept).append(rule)
    read = {rule.src for rule in kept}
    return kept, fresh, [rule for rule in held.rules(stored) if rule.src not in read]


def _relabel(config: Config, head: str, labels: Labels) -> Config:
    num_labels, id2label = labels.num_labels, labels.id2label
    class_splits, split_names = labels.class_splits, labels.split_names
    if num_labels is None and id2label is None and class_splits is None:
        if split_names is not None:
            raise ConfigError(f"split_names {split_names!r} needs class_splits, got None")
        return config
    if head != "classification":
        raise ConfigError(
            "num_labels, id2label and class_splits need head='classification', got "
            f"head={head!r}; pass head='classification' to put a fresh classifier on this "
            "checkpoint"
        )
    if class_splits is not None:
        class_splits = tuple(class_splits)
        num_labels = sum(class_splits) if num_labels is None else num_labels
    if num_labels is None:
        assert id2label is not None, "num_labels, id2label or class_splits is given"
        num_labels = len(id2label)
    elif id2label is None and num_labels == config.num_labels:
        id2label = config.id2label
    if class_splits is None and num_labels == config.num_labels:
        class_splits, split_names = config.class_splits, config.split_names
    return dataclasses.replace(
        config,
        num_labels=num_labels,
        id2label=id2label,
        class_splits=class_splits,
        split_names=None if split_names is None else tuple(split_names),
    )


def _check_statistics(model: nn.Module, processor: Any) -> None:
    """ConfigError if the model un-normalises pixels with other statistics than the processor's."""
    for name in ("image_mean", "image_std"):
        ours = getattr(model.config, name, None)
        theirs = getattr(processor, name, ours)
        if ours is not None and not np.all(np.asarray(ours) == np.asarray(theirs)):
            raise ConfigError(
                f"{name} is {ours} in the model's config and {theirs} in the processor; give both "
                "the same, or the config None"
            )


def _check_addressable(flat: Mapping[str, Any]) -> None:
    for path, leaf in flat.items():
        if not getattr(leaf, "is_fully_addressable", True):
            raise UserError(
                f"{path} is sharded over several processes; gather it first with "
                "jax.experimental.multihost_utils.process_allgather"
            )

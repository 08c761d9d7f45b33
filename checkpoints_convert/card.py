# SPDX-License-Identifier: Apache-2.0
"""Model cards: the README.md of a saved model, with the metadata that the hub reads.

A card says of a model what its config and its processor say, and of its making what `CardFacts`
holds. Its last line tells a card that was written here from one that somebody wrote or edited,
which no later save replaces.
"""

import dataclasses
import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from checkpoints_convert.card_code import SavedModel, our_code, their_code
from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.layouts.hf import runs_in_transformers, transformers_notes
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.transforms.processor_keys import FILTERS
from vivit_jax.errors import counted, printable, quoted
from vivit_jax.hub import CARD, hub_id, resolve_card
from vivit_jax.version import __version__

logger = logging.getLogger(__name__)
_FENCE = "`" * 3
_HERE = "Run in this directory, or with its path in place of the dot.\n\n"
_OPENS_HERE = re.compile(r'from_pretrained\("\."\)')
_MARK = re.compile(r"\n<!-- vivit_jax card ([0-9a-f]{16}): .*-->\n?\Z")
_METADATA = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_LARGEST = 2**20  # characters of metadata that are read
_LICENCE = ("license", "license_name", "license_link")
_CLASSES_SHOWN, _CLASSES_BEGUN = 100, 20
_ADDED = 2  # right and wrong answers that a standard error counts besides the real ones
_TASKS = {
    "classification": "video classification",
    "pretraining": "masked pre-training",
    "none": "features of videos",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that was measured on `videos` videos of the data set `data`.

    `protocol` says how: the views of a video and how they were combined. Accuracies are shares of
    1. `standard_error` is that of the value; None where it is not known.
    """

    name: str
    value: float
    data: str
    videos: int
    protocol: str
    standard_error: float | None = None

    @property
    def title(self) -> str:
        """The name as a table shows it."""
        name, top, k = self.name.partition("_top_")
        title = name.replace("_", " ")
        return f"Top-{k} {title}" if top else title[:1].upper() + title[1:]

    @property
    def is_share(self) -> bool:
        """Whether the value is shown as per cent."""
        return "accuracy" in self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Clips that a model was trained on or measured on; `name` is that of a file or folder."""

    split: str
    name: str
    clips: int
    classes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The model that another one was made of.

    `hub_id` is its repository, or that of the model that it was made of in turn; None where neither
    is known. `licence` holds the keys "license", "license_name" and "license_link" of its own card.
    """

    name: str
    hub_id: str | None = None
    licence: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says beyond the model's own files; every part may be missing.

    `name` is a title, `how` are sentences on how the model was made.
    """

    name: str | None = None
    base: Base | None = None
    how: Sequence[str] = ()
    data: Sequence[DataSummary] = ()
    metrics: Sequence[Metric] = ()


def binomial_error(share: float, count: int) -> float:
    """The standard error of a share of `count` independent answers, such as an accuracy.

    Two right and two wrong answers are added (Agresti and Coull 1998): the plain formula says 0
    where all answers are right, or none, as if that were certain.
    """
    total = count + 2 * _ADDED
    adjusted = (share * count + _ADDED) / total
    return math.sqrt(adjusted * (1 - adjusted) / total)


def write_card(staged: Path, directory: Path, model: SavedModel, facts: CardFacts) -> Path | None:
    """Write the card of a model that is being saved to `directory` into `staged`.

    None where `directory` has a card that was not written here, or was edited: it is kept, and a
    warning says so.
    """
    held = directory / CARD
    if held.exists() and not is_own(_read(held)):
        logger.warning(
            "%s was written or edited by hand and is kept as it is; what it says of this model may "
            "no longer be true: remove it and save again for a new one",
            held,
        )
        return None
    path = staged / CARD
    path.write_text(card_text(model, facts), encoding="utf-8")
    return path


def card_text(model: SavedModel, facts: CardFacts | None = None) -> str:
    """The card: metadata, text and a mark that tells whether it was edited since."""
    facts = facts or CardFacts()
    metadata = yaml.safe_dump(
        _metadata(model, facts), sort_keys=False, allow_unicode=True, width=2**31
    )
    parts = [
        f"---\n{metadata}---\n",
        f"# {_plain(_title(model, facts))}\n",
        _summary(model, facts),
        _section("How it was made", [_plain(line) for line in facts.how]),
        _section("Data", _data_lines(facts.data)),
        _section("Classes", _class_lines(model)),
        _section("Results", _metric_lines(facts.metrics)),
        _section("Preprocessing", _preprocessing_lines(model)),
        _code(model),
        _section("Licence", [_licence_text(facts.base)]),
    ]
    return _marked("\n".join(part for part in parts if part))


def is_own(text: str) -> bool:
    """Whether a card was written here and not edited since."""
    text = text.replace("\r\n", "\n")
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def for_repository(text: str, repository: str, revision: str | None = None) -> str:
    """The card as it is published: its code opens the model by its id. An edited one as it is."""
    if not is_own(text):
        return text
    at = "" if revision in (None, "main") else f', revision="{revision}"'
    body = text.replace("\r\n", "\n")
    body = body[: body.rindex("\n<!-- ")].replace(_HERE, "")
    return _marked(_OPENS_HERE.sub(f'from_pretrained("{repository}"{at})', body))


def has_metadata(text: str) -> bool:
    """Whether a card begins with a block of metadata, right or wrong."""
    return _METADATA.match(text.replace("\r\n", "\n").removeprefix("\ufeff")) is not None


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a card, {} where it has none that can be read."""
    found = _METADATA.match(text.replace("\r\n", "\n").removeprefix("\ufeff"))
    if found is None or len(found[1]) > _LARGEST:
        return {}
    try:
        values = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def base_of(checkpoint: Checkpoint) -> Base:
    """The model of an opened checkpoint as the base of another, with what its own card says."""
    path = checkpoint.path
    given = checkpoint.given or str(path.parent)
    remote = None if Path(given).exists() else hub_id(given)
    if remote is None:
        card = path.parent / CARD
        name = Path(given).resolve().name
    else:
        card = resolve_card(remote, path)
        name = remote.repository
    values = front_matter(_read(card)) if card is not None and card.is_file() else {}
    licence = {key: values[key] for key in _LICENCE if isinstance(values.get(key), str)}
    if "license" not in licence:
        licence = {}
    if remote is not None:
        return Base(name=name, hub_id=remote.repository, licence=licence)
    above = values.get("base_model")
    known = isinstance(above, str) and hub_id(above) is not None
    return Base(name=name, hub_id=above if known else None, licence=licence)


def _read(path: Path) -> str:
    """The text of a card; what is not UTF-8 is not ours and has no metadata."""
    return path.read_bytes()[: 4 * _LARGEST].decode("utf-8", "replace")


def _marked(body: str) -> str:
    return (
        f"{body}\n<!-- vivit_jax card {_digest(body)}: the next save of this model replaces this "
        "file unless it was edited -->\n"
    )


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _opens_in_transformers(model: SavedModel) -> bool:
    if model.own_class is not None:
        return False
    # transformers' documentation lists selu, which it does not have.
    known = getattr(model.config, "hidden_act", None) != "selu"
    return known and runs_in_transformers(model.config, model.head)


def _metadata(model: SavedModel, facts: CardFacts) -> dict[str, Any]:
    classifies = model.head == "classification"
    values: dict[str, Any] = {
        "library_name": "transformers" if _opens_in_transformers(model) else "vivit_jax",
        "pipeline_tag": "video-classification" if classifies else "feature-extraction",
        "tags": [model.config.model_type, "vivit_jax", "jax", "flax", "video"],
    }
    if facts.base is not None:
        values |= facts.base.licence
        values |= {} if facts.base.hub_id is None else {"base_model": facts.base.hub_id}
    accuracies = [metric for metric in facts.metrics if metric.is_share]
    if accuracies:
        values["metrics"] = ["accuracy"]
        names = dict.fromkeys(metric.data for metric in accuracies)
        results = [_result(name, [m for m in accuracies if m.data == name]) for name in names]
        values["model-index"] = [{"name": _clean(_title(model, facts)), "results": results}]
    return values


def _result(data: str, metrics: Sequence[Metric]) -> dict[str, Any]:
    return {
        "task": {"type": "video-classification", "name": "Video classification"},
        "dataset": {"type": "videofolder", "name": _clean(data)},
        "metrics": [
            {
                "type": "accuracy",
                "value": round(metric.value, 6),
                "name": metric.title,
                "args": _details(metric),
            }
            for metric in metrics
        ],
    }


def _details(metric: Metric) -> dict[str, Any]:
    values: dict[str, Any] = {"protocol": _clean(metric.protocol), "videos": metric.videos}
    if metric.standard_error is not None:
        values["standard_error"] = round(metric.standard_error, 6)
    return values


def _title(model: SavedModel, facts: CardFacts) -> str:
    if facts.name is not None:
        return facts.name
    labels = model.config.num_labels
    classes = f", {counted(labels, 'class')}" if model.head == "classification" else ""
    return f"{model.own_class or model.config.title}: {_TASKS[model.head]}{classes}"


def _summary(model: SavedModel, facts: CardFacts) -> str:
    config = model.config
    height, width = config.frame_size
    opens = _opens_in_transformers(model)
    classes = f", {counted(config.num_labels, 'class')}" if model.head == "classification" else ""
    rows = {
        "Task": f"{_TASKS[model.head]}{classes}",
        "Model": f"`{model.architecture}`, {model.parameters:,} parameters, {model.dtype}",
        "Library": f"vivit_jax {__version__} (JAX, Flax)"
        + (f" with the code of {model.own_class}" if model.own_class else "")
        + ("; transformers opens it too (PyTorch)" if opens else "; not for transformers"),
        "Input": f"{counted(config.num_frames, 'frame')} of {height} x {width} pixels, "
        f"{counted(config.num_channels, 'channel')}",
    }
    if facts.base is not None:
        rows["Base model"] = _base_text(facts.base)
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _base_text(base: Base) -> str:
    if base.hub_id is None:
        return _plain(base.name)
    link = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})"
    return link if base.name == base.hub_id else f"{_plain(base.name)}, made of {link}"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines, ""]) if lines else ""


def _data_lines(data: Sequence[DataSummary]) -> list[str]:
    if not data:
        return []
    rows = [
        f"| {_plain(part.split)} | {_plain(part.name)} | {part.clips:,} | "
        f"{'' if part.classes is None else part.classes} |"
        for part in data
    ]
    return ["| split | name | clips | classes |", "|---|---|---|---|", *rows]


def _class_lines(model: SavedModel) -> list[str]:
    config = model.config
    if model.head != "classification" or not config.num_labels:
        return []
    if config.class_splits is not None:
        heads = zip(config.split_names or (), config.class_splits, strict=True)
        listed = ", ".join(f"{_plain(name)} ({counted(size, 'class')})" for name, size in heads)
        return [f"Several classifiers: {listed}; their names are in `config.json`."]
    labels = config.labels
    if labels == tuple(f"LABEL_{i}" for i in range(len(labels))):
        return [f"{len(labels)} classes without names, `LABEL_0` to `LABEL_{len(labels) - 1}`."]
    if len(labels) <= _CLASSES_SHOWN:
        return [f"{len(labels)} in this order: {_listed(labels)}."]
    begun = _listed(labels[:_CLASSES_BEGUN])
    more = len(labels) - _CLASSES_BEGUN
    return [f"{len(labels)}: {begun}, and {more} more under `id2label` in `config.json`."]


def _listed(labels: Sequence[str]) -> str:
    """Names in a row, between marks that no name has, or each in quotes if there is none."""
    between = next((m for m in (",", ";", " /") if not any(m in label for label in labels)), None)
    if between is None:
        return ", ".join(f"\u201c{_plain(label)}\u201d" for label in labels)
    return f"{between} ".join(map(_plain, labels))


def _metric_lines(metrics: Sequence[Metric]) -> list[str]:
    if not metrics:
        return []
    rows = []
    for metric in metrics:
        error = metric.standard_error
        if metric.is_share:
            value = f"{metric.value:.1%}"
            plus = "not known" if error is None else f"{error:.1%}"
        else:
            value, plus = f"{metric.value:.4g}", "not known" if error is None else f"{error:.2g}"
        rows.append(
            f"| {_plain(metric.title)} | {value} | {plus} | {_plain(metric.data)}, "
            f"{counted(metric.videos, 'video')} | {_plain(metric.protocol)} |"
        )
    head = "| metric | value | standard error | data | protocol |"
    return [head, "|---|---|---|---|---|", *rows]


def _preprocessing_lines(model: SavedModel) -> list[str]:
    config = model.config
    stride = config.frame_stride
    apart = f"every {_ordinal(stride)}" if stride > 1 else "one after the other"
    frames = f"{counted(config.num_frames, 'frame')}, {apart}, from the middle of the video"
    if config.view_sampler == "segments":
        frames = (
            f"{counted(config.num_frames, 'frame')}, one from each of as many equal parts of the "
            "video"
        )
    if model.processor is None:
        return [
            f"{frames}. How they become pixels is not known here: no processor of these models was "
            "saved with the weights."
        ]
    return [f"{frames}. Each frame: {_steps(model.processor)} (`preprocessor_config.json`)."]


def _steps(processor: VideoProcessor) -> str:
    steps = []
    if processor.do_resize:
        sides = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in processor.size.items())
        steps.append(f"resized to {sides} ({FILTERS[processor.resample]})")
    if processor.do_center_crop:
        crop = processor.crop_size
        steps.append(f"centre crop of {crop['height']} x {crop['width']}")
    if processor.do_rescale:
        offset = " minus 1" if processor.offset else ""
        factor = 1 / processor.rescale_factor if processor.rescale_factor else 0
        steps.append(f"bytes divided by {factor:.6g}{offset}")
    if processor.do_normalize:
        mean, std = (_numbers(each) for each in (processor.image_mean, processor.image_std))
        steps.append(f"minus the mean {mean}, divided by the deviation {std}")
    return "; ".join(steps) or "as it is"


def _numbers(values: float | Sequence[float]) -> str:
    """A number for each channel."""
    each = [values] if isinstance(values, int | float) else values
    return ", ".join(f"{value:.6g}" for value in each)


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    ending = "th" if number % 100 in (11, 12, 13) else endings.get(number % 10, "th")
    return f"{number}{ending}"


def _code(model: SavedModel) -> str:
    if model.own_class is not None:
        return "\n".join(["## Use", "", _HERE.rstrip("\n"), "", _own_use(model)])
    config, head = model.config, model.head
    notes = transformers_notes(config, head, model.pooler)
    parts = ["## Use", "", _HERE.rstrip("\n"), "", "### vivit_jax", "", _fenced(our_code(model))]
    parts += ["### transformers", ""]
    if _opens_in_transformers(model):
        parts += [_fenced(their_code(model))]
    parts += [f"{_plain(note[:1].upper() + note[1:])}.\n" for note in notes]
    return "\n".join(parts)


def _own_use(model: SavedModel) -> str:
    name = model.own_class
    return (
        f"`{name}` is a class of its makers, which is not part of vivit_jax: no `from_pretrained` "
        f"opens the model, and its code is needed to run it.\n\n{_fenced(our_code(model))}\n"
        f"With that code, and a config of the values in `config.json`, "
        f"`vivit_jax.VideoClassifier({name}(config), params, processor)` classifies videos.\n"
    )


def _fenced(code: str) -> str:
    return f"{_FENCE}python\n{code}{_FENCE}\n"


def _licence_text(base: Base | None) -> str:
    if base is None:
        return (
            "None is set: whoever publishes the model chooses one, as `license:` in the metadata "
            "at the top of this file. Weights that derive from published ones keep their licence."
        )
    if base.licence:
        licence = base.licence.get("license_name", base.licence["license"])
        return f"{_plain(licence)}, that of the base model {_base_text(base)}."
    return (
        f"The base model, {_base_text(base)}, keeps its own licence, which also holds for weights "
        "made of it; it was not at hand when this file was written. Look it up, and set `license:` "
        "in the metadata at the top."
    )


def _clean(text: str) -> str:
    """One line of valid Unicode."""
    return quoted(printable(text, one_line=True).encode(errors="backslashreplace").decode())


def _plain(text: str) -> str:
    """A text as Markdown that shows it as it is, also in a table."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", _clean(text))

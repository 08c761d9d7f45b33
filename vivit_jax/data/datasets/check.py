# SPDX-License-Identifier: Apache-2.0
"""What a data set holds, what is wrong with it, and how it may be split."""

import collections
import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np

from vivit_jax.data.datasets.columns import Label
from vivit_jax.data.datasets.dataset import (
    Dataset,
    Example,
    ObjectExample,
    count_frames,
    read_frames,
    read_views,
)
from vivit_jax.data.datasets.folders import ARRAYS, by_number, ending, is_folder, is_image
from vivit_jax.data.one_clip import one_clip
from vivit_jax.data.settings import FEW_CLIPS, MOST_CLASSES, DataSettings
from vivit_jax.data.video.decode import probe_video
from vivit_jax.errors import VideoError, counted, there_are
from vivit_jax.files.inputs import check_file
from vivit_jax.files.reading import names_in, opened, size_of

_MIRRORED = re.compile(r"(?:left|right)(?:wards?)?|(?:anti|counter)?clockwise|c?cw")
_VERTICAL = re.compile(r"(?:up|down)(?:wards?)?")
_LETTERS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # also of moveLeft
_IMBALANCE = 10  # times as many clips as the smallest class
_RATES = 1.5  # times the lowest frame rate
_COPIES = 3  # of a clip that a text names
_ORDERS = 200  # that are drawn to estimate a chance

Level = Literal["stop", "warning", "note"]
LEVELS: tuple[Level, ...] = ("stop", "warning", "note")
Progress = Callable[[int, int], None]  # of how many done, of how many
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Span:
    """A training clip: `frames` frames, `stride` apart."""

    frames: int = 16
    stride: int = 4

    @property
    def total(self) -> int:
        """Frames of the video from its first to its last."""
        return (self.frames - 1) * self.stride + 1


@dataclasses.dataclass(frozen=True)
class ClipFacts:
    """What was found of one example; only `error` is set if it cannot be read."""

    example: Example
    error: str | None = None
    frames: int = 0
    width: int = 0
    height: int = 0
    channels: int = 3
    fps: float | None = None  # None: it states none, as images and arrays
    codec: str = ""
    bytes: int = 0

    @property
    def seconds(self) -> float | None:
        """How long it lasts."""
        return self.frames / self.fps if self.fps else None


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that the owner of a data set should know.

    Attributes:
        level: "stop" where training would stop, "warning" where its result suffers, else "note".
        text: what was found.
        help: the way out.
        items: the clips or classes concerned.
    """

    level: Level
    text: str
    help: str
    items: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClassFacts:
    """The clips of one class; `unreadable` and `short` ones are among `clips`."""

    name: str
    clips: int
    unreadable: int
    short: int
    train: int
    validation: int


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is known of a data set.

    Attributes:
        dataset: the data set.
        clips: the facts of each example, in the same order.
        copies: groups of examples, by index, whose files have the same content.
        classes: of labels in order; empty for unlabelled clips.
        findings: the most serious first.
        train: indices of the readable clips that the suggested split trains on.
        validation: indices of those that it holds out.
    """

    dataset: Dataset
    clips: tuple[ClipFacts, ...]
    copies: tuple[tuple[int, ...], ...]
    classes: tuple[ClassFacts, ...]
    findings: tuple[Finding, ...]
    train: tuple[int, ...]
    validation: tuple[int, ...]

    @property
    def trains(self) -> bool:
        """Whether nothing found would stop training."""
        return all(finding.level != "stop" for finding in self.findings)


def check_dataset(
    dataset: Dataset,
    *,
    span: Span = Span(),
    labelled: bool = True,
    validation: float = 0.2,
    holds_out: bool = True,
    decode: bool = False,
    threads: int = 2,
    progress: tuple[Progress | None, Progress | None] = (None, None),
) -> Report:
    """Inspects every clip of a data set, in parallel threads.

    Args:
        dataset: the data set.
        span: the training clip that examples should have frames for.
        labelled: whether the training needs labels.
        validation: share of each class that the suggested split holds out.
        holds_out: whether training has to hold clips out, as of data without splits of their own.
        decode: whether to read the frames of one training clip of each example too.
        threads: how many.
        progress: called as clips are inspected, and as files of equal size are compared.
    """
    inspected, compared = progress
    examples = dataset.examples
    facts = tuple(
        in_threads(lambda e: inspect(e, span if decode else None), examples, threads, inspected)
    )
    copies = find_copies(facts, threads, compared)
    train, held_out = split(facts, copies, validation)
    classes = _classes(dataset, facts, span, set(train), set(held_out))
    of_labels = _of_labels(dataset, facts, labelled, bool(held_out) or not holds_out)
    findings = _findings(dataset, facts, copies, classes, span, of_labels)
    return Report(dataset, facts, copies, classes, findings, train, held_out)


def in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    threads: int,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """The function's results in order; those not yet begun are dropped if the caller stops."""
    pool = ThreadPoolExecutor(threads, "check")
    try:
        for done, result in enumerate(pool.map(function, items), 1):
            if progress is not None:
                progress(done, len(items))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def inspect(example: Example, decode: Span | None = None) -> ClipFacts:
    """The facts of one example; reads frames only where these need it, or a clip of `decode`."""
    try:
        with one_clip(example.path):
            facts = _facts(example)
            if decode is not None:
                how = {"num_frames": decode.frames, "stride": decode.stride}
                read_views(example, **how, sampler="loop", clips=1)
            return facts
    except VideoError as error:
        return ClipFacts(example, str(error))


def _facts(example: Example) -> ClipFacts:
    content = _content(example)
    if not isinstance(content, str):
        return _item_facts(example, content)
    path = content
    example = example if path == example.path else Example(path, example.label)
    if ending(path) in ARRAYS or is_folder(path) or example.frame_name is not None:
        frames = count_frames(example)
        _, height, width, channels = read_frames(example, [0, frames - 1]).shape
        codec = ending(path)[1:] if ending(path) in ARRAYS else "images"
        return ClipFacts(
            example, None, frames, width, height, channels, None, codec, clip_bytes(path)
        )
    info = probe_video(path)
    frames = info.num_frames - example.start if example.total is None else example.total
    if frames < 1 or example.start + frames > info.num_frames:
        raise VideoError(
            f"{path}: {there_are(info.num_frames, 'frame')}; the list asks for {max(frames, 1)} "
            f"from frame {example.start} on"
        )
    fps, codec = info.fps if math.isfinite(info.fps) else None, info.codec
    return ClipFacts(
        example, None, frames, info.width, info.height, 3, fps, codec, clip_bytes(path)
    )


def _content(example: Example) -> Any:
    """The path of a clip's file; of an item of an object that has none, what it holds."""
    if not isinstance(example, ObjectExample):
        return example.path
    assert example.clips is not None, "from_objects gives it"
    return example.clips.clip(example.index)


def _item_facts(example: Example, content: Any) -> ClipFacts:
    frames = count_frames(example)
    _, height, width, channels = read_frames(example, [0, frames - 1]).shape
    encoded = isinstance(content, list)
    size = sum(map(len, content)) if encoded else content.nbytes
    codec = "images" if encoded else "frames"
    return ClipFacts(example, None, frames, width, height, channels, None, codec, size)


def _files(path: str) -> list[str]:
    """The file of a clip, or its images in order."""
    if not is_folder(path):
        return [path]
    return [os.path.join(path, n) for n in sorted(filter(is_image, names_in(path)), key=by_number)]


def clip_bytes(path: str) -> int:
    """The size of a clip's file, or of all its images. Raises OSError."""
    return sum(map(size_of, _files(path)))


def find_copies(
    facts: Sequence[ClipFacts], threads: int = 2, progress: Progress | None = None
) -> tuple[tuple[int, ...], ...]:
    """Groups of readable examples, by index, whose different paths hold the same bytes.

    Only files of equal size are read.
    """
    first: dict[str, int] = {}  # the same path may be listed with several ranges of frames
    for index, each in enumerate(facts):
        if each.error is None:
            first.setdefault(each.example.path, index)
    by_size = _grouped(first.items(), lambda item: facts[item[1]].bytes)
    same_size = [item for group in by_size for item in group]
    digests = in_threads(
        lambda item: _digest_of(facts[item[1]].example), same_size, threads, progress
    )
    found = zip(same_size, list(digests), strict=True)
    groups = _grouped(found, lambda pair: pair[1])
    return tuple(tuple(index for (_, index), _ in group) for group in groups)


def _grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """The items with an equal key, if there are at least two."""
    groups = collections.defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return [group for group in groups.values() if len(group) > 1]


def _digest_of(example: Example) -> str:
    """A hash of a clip's bytes; its path if they cannot be read, which its reader reports."""
    try:
        return content_digest(example)
    except (OSError, VideoError):
        return example.path


def content_digest(example: Example) -> str:
    """A hash of the bytes of a clip's file, of its images in order, or of an object's item.

    Raises OSError; VideoError for what is not opened, as a FIFO, at which reading would wait.
    """
    content = _content(example)
    if isinstance(content, np.ndarray):
        return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()
    whole = hashlib.sha256()
    if isinstance(content, list):  # of encoded images
        for image in content:
            whole.update(hashlib.sha256(image).digest())
        return whole.hexdigest()
    for name in _files(content):
        check_file(name, VideoError)
        with opened(name) as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def split(
    facts: Sequence[ClipFacts], copies: Sequence[Sequence[int]], share: float, seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the readable clips to train on, and of about `share` of each class to hold out.

    A class of two clips or more has one on each side at least. Clips of one file, and copies, are
    never on both sides: they are trained on, unless a class has no others.
    """
    several = {i for group in copies for i in group}
    paths = collections.Counter(each.example.path for each in facts)
    by_label: dict[Label, list[int]] = collections.defaultdict(list)
    for index, each in enumerate(facts):
        if each.error is None:
            by_label[each.example.label].append(index)
    rng, held_out = np.random.default_rng(seed), set()
    for clips in by_label.values():
        free = [i for i in clips if i not in several and paths[facts[i].example.path] == 1]
        wanted = min(max(1, round(share * len(clips))), len(clips) - 1, len(free))
        held_out.update(int(i) for i in rng.permutation(free)[:wanted])
    if len(held_out) < len(by_label):
        for groups in _groups_of_copies(facts, copies, held_out):
            clips = sum(map(len, groups))
            held_out.update(_some_groups(groups, max(1, round(share * clips)), rng))
    everything = sorted(i for clips in by_label.values() for i in clips)
    return tuple(i for i in everything if i not in held_out), tuple(sorted(held_out))


def _groups_of_copies(
    facts: Sequence[ClipFacts], copies: Sequence[Sequence[int]], held_out: set[int]
) -> list[list[list[int]]]:
    """For each class without a held-out clip the groups of its clips that are of one file or equal.

    A group with clips of another class counts as one of none.
    """
    first = {facts[i].example.path: facts[group[0]].example.path for group in copies for i in group}
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for index, each in enumerate(facts):
        if each.error is None:
            groups[first.get(each.example.path, each.example.path)].append(index)
    done = {facts[i].example.label for i in held_out}
    found: dict[Label, list[list[int]]] = collections.defaultdict(list)
    for group in groups.values():
        labels = {facts[i].example.label for i in group}
        if len(labels) == 1 and not labels & done:
            found[labels.pop()].append(group)
    return [*found.values()]


def _some_groups(
    groups: Sequence[Sequence[int]], wanted: int, rng: np.random.Generator
) -> list[int]:
    """Clips of whole groups, about as many as are wanted; one group at least is left."""
    taken: list[int] = []
    for place in rng.permutation(len(groups))[1:]:
        if not taken or len(taken) + len(groups[place]) <= wanted:
            taken += groups[place]
    return taken


def class_name(dataset: Dataset, label: Label) -> str:
    """A class as texts name it."""
    if dataset.classes is not None and isinstance(label, int):
        return dataset.classes[label]
    return ",".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _classes(
    dataset: Dataset,
    facts: Sequence[ClipFacts],
    span: Span,
    train: set[int],
    held_out: set[int],
) -> tuple[ClassFacts, ...]:
    """Counts of each class, also of those without a clip, unless there are too many numbers."""
    found: dict[Label, list[int]] = collections.defaultdict(list)
    for index, each in enumerate(facts):
        found[each.example.label].append(index)
    labels: list[Any] = sorted(label for label in found if label is not None)
    if labels and dataset.labels_per_example == 1:
        names = dataset.classes
        most = labels[-1] + 1 if names is None else len(names)
        labels = list(range(most)) if most <= MOST_CLASSES else labels
    rows = []
    for label in labels:
        clips = found.get(label, [])
        bad = sum(facts[i].error is not None for i in clips)
        short = sum(facts[i].error is None and facts[i].frames < span.total for i in clips)
        sides = len(train.intersection(clips)), len(held_out.intersection(clips))
        rows.append(ClassFacts(class_name(dataset, label), len(clips), bad, short, *sides))
    return tuple(rows)


def _findings(
    dataset: Dataset,
    facts: Sequence[ClipFacts],
    copies: Sequence[Sequence[int]],
    classes: Sequence[ClassFacts],
    span: Span,
    of_labels: Iterable[Finding],
) -> tuple[Finding, ...]:
    found = [*_unreadable(facts), *of_labels]
    found += [*_of_copies(dataset, facts, copies), *_of_names(classes), *_of_counts(classes)]
    found += _of_frames([each for each in facts if each.error is None], span)
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def _unreadable(facts: Sequence[ClipFacts]) -> Iterator[Finding]:
    errors = tuple(each.error for each in facts if each.error is not None)
    if not errors:
        return
    text = f"{len(errors)} of {counted(len(facts), 'clip')} cannot be read; training "
    limit, chance = DataSettings().max_bad_share, stop_chance(len(errors), len(facts))
    way_out = "repair or remove them"
    if not chance:
        yield Finding("warning", f"{text}leaves them out", way_out, errors)
        return
    seeds = "" if chance == 1 else f", for {chance:.0%} of seeds"
    text += f"stops at more than {limit:.0%} of those read so far{seeds}"
    way_out += ", or raise data.max_bad_share, as finetune without a recipe does"
    yield Finding("stop" if chance >= 0.5 else "warning", text, way_out, errors)


def stop_chance(bad: int, clips: int) -> float:
    """The share of random orders in which so many unreadable clips stop training."""
    limit, rng, stops = DataSettings().max_bad_share, np.random.default_rng(0), 0
    if bad > limit * clips:
        return 1.0
    number = np.arange(1, bad + 1)
    for _ in range(_ORDERS):
        read = 1 + np.sort(rng.choice(clips, bad, replace=False, shuffle=False))
        stops += bool(np.any(number > limit * np.maximum(read, FEW_CLIPS)))
    return stops / _ORDERS


def _of_labels(
    dataset: Dataset, facts: Sequence[ClipFacts], labelled: bool, validates: bool
) -> Iterator[Finding]:
    if labelled and not dataset.labels_per_example:
        text = "the clips have no labels, which fine-tuning needs"
        way_out = "sort them into a folder for each class, or write a list; for pre-training, check"
        yield Finding("stop", text, f"{way_out} with --labels 0")
    labels = {each.example.label for each in facts}
    largest = max((label for label in labels if isinstance(label, int)), default=0)
    if dataset.classes is None and largest >= MOST_CLASSES and len(labels) > 1:
        text = f"labels go up to {largest}, which would make as many classes"
        yield Finding("stop", text, f"number the classes from 0; training takes {MOST_CLASSES:,}")
    if labelled and len(labels) == 1 and None not in labels:
        text = "all clips are of one class: there is nothing to tell apart"
        yield Finding("stop", text, "add a folder with clips of another class")
    elif not validates and labelled and dataset.labels_per_example == 1 and _read_any(facts):
        text = "no clip can be held out to choose the model by: each class keeps one to train on"
        yield Finding("stop", text, "add clips, or name held-out ones, or none: --validation")


def _read_any(facts: Sequence[ClipFacts]) -> bool:
    return any(each.error is None for each in facts)


def _of_copies(
    dataset: Dataset, facts: Sequence[ClipFacts], copies: Sequence[Sequence[int]]
) -> Iterator[Finding]:
    alike, contrary = [], []
    for group in copies:
        labels = [facts[i].example.label for i in group]
        paths = [facts[i].example.path for i in group]
        if len(set(labels)) == 1:
            alike.append(_equal(paths))
            continue
        named = zip(paths, labels, strict=True)
        contrary.append(_equal([f"{p} ({class_name(dataset, label)})" for p, label in named]))
    if contrary:
        text = f"{counted(len(contrary), 'clip')} in copies with different labels"
        yield Finding("warning", text, "keep the right one", tuple(contrary))
    if alike:
        text = f"{counted(len(alike), 'clip')} in several copies"
        way_out = "keep one of each; copies on both sides of a split make accuracy look better"
        yield Finding("warning", text, way_out, tuple(alike))


def _equal(names: Sequence[str]) -> str:
    more = len(names) - _COPIES
    return " = ".join(names[:_COPIES]) + (f" and {more} more" if more > 0 else "")


def _of_names(classes: Sequence[ClassFacts]) -> Iterator[Finding]:
    names = [each.name for each in classes]
    mirrored, vertical = _named_after(_MIRRORED, names), _named_after(_VERTICAL, names)
    if mirrored:
        text = f"{counted(len(mirrored), 'class name')} may tell left from right"
        way_out = "if so, train with augment.flip=0: a mirrored clip would keep its label"
        yield Finding("warning", text, way_out, mirrored)
    if vertical:
        text = f"{counted(len(vertical), 'class name')} may tell up from down"
        way_out = "augment.flip mirrors left to right only and is safe; flip nothing upside down"
        yield Finding("note", text, way_out, vertical)


def mirrored_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The classes whose names may tell left from right."""
    return _named_after(_MIRRORED, classes)


def _named_after(words: re.Pattern, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes with one of the words in their name."""
    parts = {name: [word.lower() for word in _LETTERS.findall(name)] for name in classes}
    return tuple(name for name, found in parts.items() if any(map(words.fullmatch, found)))


def _of_counts(classes: Sequence[ClassFacts]) -> Iterator[Finding]:
    readable = {each.name: each.clips - each.unreadable for each in classes}
    empty = tuple(name for name, count in readable.items() if count == 0)
    single = tuple(name for name, count in readable.items() if count == 1)
    if empty:
        text = f"{counted(len(empty), 'class')} without a readable clip"
        yield Finding("warning", text, "add clips, or remove the folder or number", empty)
    if single:
        text = f"{counted(len(single), 'class')} with one readable clip"
        way_out = "add clips: one clip cannot be both trained on and held out"
        yield Finding("warning", text, way_out, single)
    some = {name: count for name, count in readable.items() if count}
    if len(some) > 1 and max(some.values()) >= _IMBALANCE * min(some.values()):
        most, least = max(some, key=some.__getitem__), min(some, key=some.__getitem__)
        text = f"unbalanced: {counted(some[most], 'clip')} of {most}, {some[least]} of {least}"
        way_out = "add clips of small classes; accuracy alone favours the large ones"
        yield Finding("warning", text, way_out)


def _of_frames(readable: Sequence[ClipFacts], span: Span) -> Iterator[Finding]:
    short = sorted((e for e in readable if e.frames < span.total), key=lambda e: e.frames)
    if short:
        least = short[0].frames
        text = (
            f"{len(short)} of {counted(len(readable), 'clip')} too short for "
            f"{counted(span.frames, 'frame')} {span.stride} apart, which take {span.total}; "
            "training repeats frames"
        )
        if least >= span.frames > 1:
            stride = (least - 1) // (span.frames - 1)
            way_out = f"leave them out, or data.stride={stride}, which fits all"
        else:
            fewer = sum(each.frames < span.frames for each in short)
            way_out = f"leave them out: {fewer} of them have fewer than {span.frames} frames in all"
        items = tuple(f"{e.example.path}: {counted(e.frames, 'frame')}" for e in short)
        yield Finding("warning", text, way_out, items)
    other = [each for each in readable if each.channels != 3]
    if other:
        items = tuple(f"{e.example.path}: {counted(e.channels, 'channel')}" for e in other)
        text = f"{counted(len(other), 'array')} without the 3 channels of a published model"
        way_out = "only a model of as many channels (model.config.num_channels) reads them"
        yield Finding("warning", text, way_out, items)
    rates = [each.fps for each in readable if each.fps]
    if rates and max(rates) > _RATES * min(rates):
        low, high = min(rates), max(rates)
        times = f"{span.total / high:.1f} to {span.total / low:.1f} s"
        text = f"frame rates from {low:.4g} to {high:.4g}: a training clip covers {times}"
        yield Finding("note", text, "convert the clips to one rate if speed tells classes apart")

# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax check-data`: what a data set holds, and what is wrong with it, before training."""

import collections
import contextlib
import dataclasses
import json as json_module
import logging
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from vivit_jax.cli.panels import Panels
from vivit_jax.console import FLAT
from vivit_jax.data.datasets.check import (
    LEVELS,
    ClassFacts,
    ClipFacts,
    Finding,
    Report,
    Span,
    check_dataset,
    class_name,
    in_threads,
)
from vivit_jax.data.datasets.dataset import Dataset, read_dataset, read_frames
from vivit_jax.data.one_clip import one_clip
from vivit_jax.errors import UserError, VideoError, printable
from vivit_jax.files.atomic import check_output, whole_file, write_json
from vivit_jax.progress import LiveLine, Pace, format_table, readable

_ITEMS, _ROWS, _KINDS = 3, 20, 4  # that the text shows: of a finding, of classes, of sizes
_NAME = 40  # letters of a class in the table
_TILE = 108, 144  # height, width of a frame on the sheet
_COLUMNS, _SHEET_ROWS, _LETTERS = 6, 30, 24
_BLANK, _MISSING = 255, 200  # grey levels: no more clips, a frame that cannot be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How the data set is read, as in training.

    Attributes:
        root: Directory of the relative paths of a list. Default: the list's own.
        labels: Labels in each line of a list. 0 checks clips for pre-training, which needs none.
        frame_name: Names of images in folders of frames, as a Python format of their number.
        first_frame: Number of a folder's first image, if the list does not give it.
    """

    root: str | None = None
    labels: int = 1
    frame_name: str = "img_{:05}.jpg"
    first_frame: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is checked.

    Attributes:
        frames: Frames of a training clip. Shorter videos are reported.
        stride: Frames of the video from one frame of a training clip to the next.
        validation: Share of each class to hold out in the suggested split.
        decode: Also decode one training clip of each video, which finds damage inside files.
        threads: Threads that read clips.
    """

    frames: int = 16
    stride: int = 4
    validation: float = 0.2
    decode: bool = False
    threads: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Files to write.

    Attributes:
        draw: Picture (.png) of the middle frames of some clips of each class.
        json: File for everything found, with all clips concerned; - prints it instead of the text.
        write_split: Two list files (.csv or .txt), for training and validation, with the suggested
            split. Paths in them are absolute, and classes are numbered as in the text.
        overwrite: Replace these files.
    """

    draw: Path | None = None
    json: Path | None = None
    write_split: tuple[Path, Path] | None = None
    overwrite: bool = False


def check_data(
    data: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    source: Annotated[SourceOptions, FLAT] = SourceOptions(),
    check: Annotated[CheckOptions, FLAT] = CheckOptions(),
    output: Annotated[OutputOptions, FLAT] = OutputOptions(),
) -> int:
    """Check a data set before training: clips, classes, sizes, lengths, damage, copies.

    Opens every clip, and decodes only what that needs. The most serious findings come first, each
    with what helps. The exit status is 1 if training would stop, and 0 if it would run, whatever
    else was found.

    Args:
        data: A list file with a path and a label in each line, a directory with a folder for each
            class, or a directory of clips.
    """
    _check_options(data, source, check, output)
    to_stdout = str(output.json) == "-"
    with _collected_warnings() as warnings:
        try:
            dataset = read_dataset(data, **dataclasses.asdict(source))
        except UserError as error:
            return _not_read(error, output.json, to_stdout)
        report = _checked(dataset, check, labelled=source.labels > 0)
        if output.draw is not None:
            _draw(report, output.draw, check.threads)
    if warnings:
        noun = "warning" if len(warnings) == 1 else "warnings"
        found = Finding("warning", f"{len(warnings)} {noun} while reading", "", tuple(warnings))
        findings = (*report.findings, found)
        findings = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
        report = dataclasses.replace(report, findings=tuple(findings))

    if to_stdout:
        print(json_module.dumps(as_dict(report, check), indent=2))
    else:
        print(as_text(report, check))
        if output.json is not None:
            write_json(output.json, as_dict(report, check))
    if output.write_split is not None:
        write_split(report, output.write_split, source)
    return 0 if report.trains else 1


def _check_options(
    data: Path, source: SourceOptions, check: CheckOptions, output: OutputOptions
) -> None:
    for name in ("frames", "stride", "threads"):
        if getattr(check, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(check, name)}")
    for flag, value in (("labels", source.labels), ("first-frame", source.first_frame)):
        if value < 0:
            raise UserError(f"--{flag} must be at least 0, got {value}")
    if not 0 < check.validation < 1:
        raise UserError(f"--validation must be between 0 and 1, got {check.validation:g}")
    if not os.path.exists(data):
        raise UserError(f"{data}: no such file or directory; name a list file or a directory")
    if output.draw is not None:
        check_output(output.draw, (".png",), output.overwrite, flag="--draw")
    if output.json is not None and str(output.json) != "-":
        check_output(output.json, (".json",), output.overwrite, flag="--json")
    for path in output.write_split or ():
        check_output(path, (".csv", ".txt"), output.overwrite, flag="--write-split")
        if os.path.exists(path) and os.path.samefile(path, data):
            raise UserError(f"--write-split {path} is the data set itself; choose another name")
    if output.write_split and len({path.absolute() for path in output.write_split}) == 1:
        raise UserError(f"--write-split names {output.write_split[0]} twice; name two files")


def _not_read(error: UserError, json: Path | None, to_stdout: bool) -> int:
    """Report a data set that cannot be listed, at which training would stop too."""
    values = {"trains": False, "findings": [_finding(Finding("stop", str(error), ""))]}
    if to_stdout:
        print(json_module.dumps(values, indent=2))
    else:
        print(f"{_line('stop', str(error))}\n\ntraining would stop")
        if json is not None:
            write_json(json, values)
    return 1


def _checked(dataset: Dataset, check: CheckOptions, labelled: bool) -> Report:
    with (
        _live("clips") as inspected,
        _live("comparing files") as compared,
    ):
        return check_dataset(
            dataset,
            span=Span(check.frames, check.stride),
            labelled=labelled,
            validation=check.validation,
            decode=check.decode,
            threads=check.threads,
            progress=(inspected, compared),
        )


@contextlib.contextmanager
def _live(name: str) -> Iterator[Callable[[int, int], None]]:
    """A live line, from the first call on, with the time left."""
    line, pace = None, Pace()

    def update(done: int, total: int) -> None:
        nonlocal line
        line = line or LiveLine(name, total, ends=False)
        pace.update(done)
        line.update(done, pace.left(total - done) or "")
        if done == total:
            line.close()

    try:
        yield update
    finally:
        if line is not None:
            line.close()


class _Collector(logging.Handler):
    def __init__(self, found: list[str]):
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(record.getMessage())


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """The warnings of readers, which would otherwise break up the live line."""
    logger, found = logging.getLogger("vivit_jax.data"), []
    handler, own = _Collector(found), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.propagate = own
        logger.removeHandler(handler)


def as_text(report: Report, check: CheckOptions) -> str:
    """The report as text, most serious first."""
    parts = [_headline(report)]
    parts += ["\n".join(_lines(finding)) for finding in report.findings]
    clips = [each for each in report.clips if each.error is None]
    if clips:
        kinds = (("sizes", _sizes(clips)), ("codecs", _codecs(clips)))
        lines = [f"{name}: {_most_common(counts)}" for name, counts in kinds]
        parts.append("\n".join([*format_table(_ranges_table(clips)), *lines]))
    if report.classes:
        parts.append("\n".join(format_table(_class_table(report.classes))))
    parts.append(_split_line(report, check))
    verdict = "training would run" if report.trains else "training would stop"
    counts = collections.Counter(finding.level for finding in report.findings)
    said = [f"{counts[e]} {e}{'s' * (counts[e] > 1)}" for e in ("warning", "note") if counts[e]]
    parts.append(", ".join([verdict, *said]))
    return "\n\n".join(parts)


def _headline(report: Report) -> str:
    clips = report.clips
    parts = [f"{len(clips)} clip{'s' * (len(clips) != 1)}"]
    if report.classes:
        count = len(report.classes)
        parts.append(f"{count} class{'es' * (count != 1)}")
    parts.append(f"{sum(each.frames for each in clips):,} frames")
    seconds = sum(each.seconds or 0 for each in clips)
    if seconds:
        parts.append(f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s")
    of_paths = {each.example.path: each.bytes for each in clips}
    parts.append(readable(sum(of_paths.values())))
    return f"{_line_of(report.dataset.source)}: {', '.join(parts)}"


def _lines(finding: Finding) -> list[str]:
    lines, indent = [_line(finding.level, finding.text)], " " * 9
    lines += [indent + _line_of(item) for item in finding.items[:_ITEMS]]
    more = len(finding.items) - _ITEMS
    if more > 0:
        lines.append(f"{indent}and {more} more; --json lists all")
    return [*lines, *([f"{indent}-> {finding.help}"] if finding.help else [])]


def _line(level: str, text: str) -> str:
    return f"{level.upper() if level == 'stop' else level:7}  {_line_of(text)}"


def _line_of(text: str) -> str:
    return printable(text, one_line=True)


def _sizes(clips: Sequence[ClipFacts]) -> collections.Counter[str]:
    return collections.Counter(f"{each.width}x{each.height}" for each in clips)


def _codecs(clips: Sequence[ClipFacts]) -> collections.Counter[str]:
    return collections.Counter(each.codec for each in clips)


def _most_common(counts: collections.Counter[str]) -> str:
    shown = [f"{name} ({count})" for name, count in counts.most_common(_KINDS)]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _ranges(clips: Sequence[ClipFacts]) -> dict[str, tuple[float, float, float]]:
    """Least, median and most of each property, of the clips that have it."""
    columns = {
        "frames": [each.frames for each in clips],
        "seconds": [each.seconds for each in clips if each.seconds],
        "frames/s": [each.fps for each in clips if each.fps],
        "width": [each.width for each in clips],
        "height": [each.height for each in clips],
    }
    return {n: (min(v), statistics.median(v), max(v)) for n, v in columns.items() if v}


def _ranges_table(clips: Sequence[ClipFacts]) -> list[list[str]]:
    rows = [["", "least", "median", "most"]]
    for name, values in _ranges(clips).items():
        shown = [f"{v:.2f}" if name in ("seconds", "frames/s") else f"{v:g}" for v in values]
        rows.append([name, *shown])
    return rows


def _class_table(classes: Sequence[ClassFacts]) -> list[list[str]]:
    """A row for each class; of many those with the fewest and the most clips."""
    rows = [["class", "clips", "unreadable", "short", "train", "validation"]]
    shown, half = [(each, str(number)) for number, each in enumerate(classes)], _ROWS // 2
    if len(classes) > _ROWS:
        shown.sort(key=lambda pair: pair[0].clips)
        shown = [*shown[:half], None, *shown[-half:]]
    for pair in shown:
        if pair is None:
            rows.append([f"... {len(classes) - 2 * half} more", *[""] * 5])
            continue
        each, number = pair
        name = number if each.name == number else f"{number} {_cut(each.name, _NAME)}"
        counts = each.clips, each.unreadable, each.short, each.train, each.validation
        rows.append([name, *(str(count) for count in counts)])
    return rows


def _split_line(report: Report, check: CheckOptions) -> str:
    if not report.validation:
        return "split: no clip can be held out: each class needs two readable, different clips"
    return (
        f"split: {len(report.train)} clips to train on, {len(report.validation)} to hold out "
        f"({check.validation:.0%} of each class); --write-split train.csv val.csv writes it"
    )


def as_dict(report: Report, check: CheckOptions) -> dict[str, Any]:
    """The report as JSON values."""
    clips = [each for each in report.clips if each.error is None]
    paths = [each.example.path for each in report.clips]
    short = [e for e in clips if e.frames < Span(check.frames, check.stride).total]
    return {
        "source": report.dataset.source,
        "trains": report.trains,
        "findings": [_finding(finding) for finding in report.findings],
        "clips": len(report.clips),
        "ranges": {n: dict(zip(("least", "median", "most"), v, strict=True))
                   for n, v in _ranges(clips).items()},
        "sizes": dict(_sizes(clips).most_common()),
        "codecs": dict(_codecs(clips).most_common()),
        "classes": [dataclasses.asdict(each) for each in report.classes],
        "unreadable": {e.example.path: e.error for e in report.clips if e.error is not None},
        "short": {each.example.path: each.frames for each in short},
        "copies": [[paths[i] for i in group] for group in report.copies],
        "split": {
            "train": [paths[i] for i in report.train],
            "validation": [paths[i] for i in report.validation],
        },
    }  # fmt: skip


def _finding(finding: Finding) -> dict[str, Any]:
    return dataclasses.asdict(finding) | {"items": list(finding.items)}


def write_split(report: Report, paths: tuple[Path, Path], source: SourceOptions) -> None:
    """Write the suggested split as two lists, and read them back.

    UserError if there is nothing to hold out, or a path that a list cannot hold.
    """
    if not report.validation:
        raise UserError("--write-split: no clip can be held out, so that nothing was written")
    if source.labels and not report.dataset.labels_per_example:
        raise UserError("--write-split: the clips have no labels; for pre-training pass --labels 0")
    sides = (report.train, report.validation)
    how: dict[str, Any] = dataclasses.asdict(source) | {"root": None}
    with contextlib.ExitStack() as files:
        for path, side in zip(paths, sides, strict=True):
            examples = [report.clips[i].example for i in side]
            examples = [dataclasses.replace(e, path=os.path.abspath(e.path)) for e in examples]
            partial = files.enter_context(whole_file(path))
            text = "".join(_list_line(example) for example in examples)
            partial.write_text(text, encoding="utf-8", errors="surrogateescape")
            with contextlib.suppress(UserError):
                if read_dataset(partial, **how).examples == tuple(examples):
                    continue
            raise UserError(
                f"--write-split {path}: a path with a tab or a line break cannot stand in a list; "
                "rename the file"
            )


def _list_line(example) -> str:
    """`"path" [start total] [label]`."""
    path = example.path.replace('"', '""')
    fields = [] if example.total is None else [example.start, example.total]
    label = example.label
    if label is not None:
        fields.append(",".join(map(str, label)) if isinstance(label, tuple) else label)
    return " ".join([f'"{path}"', *map(str, fields)]) + "\n"


def _draw(report: Report, path: Path, threads: int) -> None:
    if all(each.error is not None for each in report.clips):
        print("--draw: no clip can be read, so that nothing is drawn", file=sys.stderr)
        return
    picture = contact_sheet(report, threads)
    with whole_file(path) as partial:
        picture.save_png(partial)


def contact_sheet(report: Report, threads: int = 2) -> Panels:
    """A row of frames for each class, or rows of unlabelled clips, from the middle of some clips.

    A grey tile is a frame that cannot be read. At least one clip has to be readable.
    """
    rows, drawn, total = _sheet_rows(report)
    clips = [each for _, row in rows for each in row]
    with _live("drawing clips") as progress:
        tiles = iter(list(in_threads(_tile, clips, threads, progress)))
    blank = np.full((*_TILE, 3), _BLANK, np.uint8)
    frames, columns = [], max(len(row) for _, row in rows)
    for _, row in rows:
        found = [next(tiles) for _ in row]
        frames.append(np.stack(found + [blank] * (columns - len(row))))
    notes = ["The middle frame of some clips of each row."]
    if drawn < total:
        notes.append(f"{drawn} of {total} classes are drawn, evenly spaced.")
    bad = sum(each.error is not None for each in report.clips)
    warning = f"{bad} of {len(report.clips)} clips cannot be read." if bad else None
    title = printable(os.path.basename(os.path.abspath(report.dataset.source)), one_line=True)
    labels = [label for label, _ in rows]
    return Panels(title, notes, warning, labels, frames, [""] * columns, group=len(rows))


def _sheet_rows(report: Report) -> tuple[list[tuple[str, list[ClipFacts]]], int, int]:
    """Rows of readable clips with their labels; how many classes they show, of how many."""
    clips = [each for each in report.clips if each.error is None]
    if not report.classes:
        shown = _evenly(clips, _COLUMNS * _SHEET_ROWS)
        parts = [shown[i : i + _COLUMNS] for i in range(0, len(shown), _COLUMNS)]
        return [(f"row {i}", part) for i, part in enumerate(parts, 1)], 0, 0
    by_label = collections.defaultdict(list)
    for each in clips:
        by_label[each.example.label].append(each)
    rows: list[tuple[str, list[ClipFacts]]] = []
    for label in _evenly(sorted(by_label), _SHEET_ROWS):
        name = class_name(report.dataset, label)
        of_class = by_label[label]
        count = f"{len(of_class)} clip{'s' * (len(of_class) != 1)}"
        rows.append((f"{_short(name)}\n{count}", _evenly(of_class, _COLUMNS)))
    return rows, len(rows), len(by_label)


def _short(name: str) -> str:
    """A class name in at most two lines of the sheet."""
    lines = textwrap.wrap(printable(name, one_line=True), _LETTERS, max_lines=2, placeholder="...")
    return "\n".join(lines)


def _cut(name: str, most: int) -> str:
    name = printable(name, one_line=True)
    return name if len(name) <= most else f"{name[: most - 3]}..."


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    places = np.linspace(0, len(items) - 1, min(len(items), most)).round()
    return [items[int(place)] for place in places]


def _tile(clip: ClipFacts) -> np.ndarray:
    """The clip's middle frame, as large as a tile allows, on white."""
    from PIL import Image

    height, width = _TILE
    page = np.full((height, width, 3), _BLANK, np.uint8)
    try:
        with one_clip(clip.example.path):
            frame = read_frames(clip.example, [clip.frames // 2])[0]
    except VideoError as error:
        logging.getLogger("vivit_jax.data").warning("%s", error)
        page[:] = _MISSING
        return page
    if frame.shape[-1] != 3:
        frame = frame[..., :1].repeat(3, -1)
    scale = min(height / frame.shape[0], width / frame.shape[1])
    h, w = (max(1, round(scale * size)) for size in frame.shape[:2])
    image = Image.fromarray(np.ascontiguousarray(frame)).resize((w, h))
    top, left = (height - h) // 2, (width - w) // 2
    page[top : top + h, left : left + w] = np.asarray(image)
    return page

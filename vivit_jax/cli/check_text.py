# SPDX-License-Identifier: Apache-2.0
"""What `vivit-jax check-data` found, as text and as JSON."""

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from vivit_jax.data.datasets.check import ClassFacts, ClipFacts, Finding, Report, Span
from vivit_jax.errors import counted, printable
from vivit_jax.progress import format_table, readable

_ITEMS, _ROWS, _KINDS = 3, 20, 4  # that the text shows: of a finding, of classes, of sizes
_NAME = 40  # letters of a class in the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is checked.

    Attributes:
        frames: Frames of a training clip. Shorter videos are reported.
        stride: Frames of the video from one frame of a training clip to the next.
        validation: Share of each class to hold out in the suggested split.
        decode: Also decode one training clip of each video, which finds damage inside files.
        checksums: Also read all of a pack and compare each clip with its checksum.
        threads: Threads that read clips.
    """

    frames: int = 16
    stride: int = 4
    validation: float = 0.2
    decode: bool = False
    checksums: bool = False
    threads: int = 2


CHECK = CheckOptions()  # the defaults


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
    said = [counted(counts[e], e) for e in ("warning", "note") if counts[e]]
    parts.append(", ".join([verdict, *said]))
    return "\n\n".join(parts)


def _headline(report: Report) -> str:
    clips = report.clips
    parts = [counted(len(clips), "clip")]
    if report.classes:
        parts.append(counted(len(report.classes), "class"))
    parts.append(counted(sum(each.frames for each in clips), "frame"))
    seconds = sum(each.seconds or 0 for each in clips)
    if seconds:
        parts.append(f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s")
    of_paths = {each.example.path: each.bytes for each in clips}
    parts.append(readable(sum(of_paths.values())))
    return f"{_line_of(report.dataset.source)}: {', '.join(parts)}"


def _lines(finding: Finding) -> list[str]:
    lines, indent = [finding_line(finding.level, finding.text)], " " * 9
    lines += [indent + _line_of(item) for item in finding.items[:_ITEMS]]
    more = len(finding.items) - _ITEMS
    if more > 0:
        lines.append(f"{indent}and {more} more; --json lists all")
    return [*lines, *([f"{indent}-> {finding.help}"] if finding.help else [])]


def finding_line(level: str, text: str) -> str:
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
        f"split: {counted(len(report.train), 'clip')} to train on, {len(report.validation)} to "
        f"hold out ({check.validation:.0%} of each class); --write-split train.csv val.csv writes "
        "it"
    )


def as_dict(report: Report, check: CheckOptions) -> dict[str, Any]:
    """The report as JSON values."""
    clips = [each for each in report.clips if each.error is None]
    paths = [each.example.path for each in report.clips]
    short = [e for e in clips if e.frames < Span(check.frames, check.stride).total]
    return {
        "source": report.dataset.source,
        "trains": report.trains,
        "findings": [finding_dict(finding) for finding in report.findings],
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


def finding_dict(finding: Finding) -> dict[str, Any]:
    return dataclasses.asdict(finding) | {"items": list(finding.items)}


def _cut(name: str, most: int) -> str:
    name = printable(name, one_line=True)
    return name if len(name) <= most else f"{name[: most - 3]}..."

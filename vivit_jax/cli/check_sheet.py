# SPDX-License-Identifier: Apache-2.0
"""The contact sheet of `vivit-jax check-data`: a frame of some clips of each class."""

import collections
import logging
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from vivit_jax.cli.panels import Panels
from vivit_jax.data.datasets.check import ClipFacts, Report, class_name, in_threads
from vivit_jax.data.datasets.dataset import read_frames
from vivit_jax.data.one_clip import one_clip
from vivit_jax.errors import VideoError, counted, printable
from vivit_jax.progress import live_line

_TILE = 108, 144  # height, width of a frame on the sheet
_COLUMNS, _SHEET_ROWS, _LETTERS = 6, 30, 24
_BLANK, _MISSING = 255, 200  # grey levels: no more clips, a frame that cannot be read


def contact_sheet(report: Report, threads: int = 2) -> Panels:
    """A row of frames for each class, or rows of unlabelled clips, from the middle of some clips.

    A grey tile is a frame that cannot be read. At least one clip has to be readable.
    """
    rows, drawn, total = _sheet_rows(report)
    clips = [each for _, row in rows for each in row]
    with live_line("drawing clips") as progress:
        tiles = iter(list(in_threads(_tile, clips, threads, progress)))
    blank = np.full((*_TILE, 3), _BLANK, np.uint8)
    frames, columns = [], max(len(row) for _, row in rows)
    for _, row in rows:
        found = [next(tiles) for _ in row]
        frames.append(np.stack(found + [blank] * (columns - len(row))))
    notes = ["The middle frame of some clips of each row."]
    if drawn < total:
        notes.append(f"{drawn} of {counted(total, 'class')} are drawn, evenly spaced.")
    bad = sum(each.error is not None for each in report.clips)
    warning = f"{bad} of {counted(len(report.clips), 'clip')} cannot be read." if bad else None
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
        count = counted(len(of_class), "clip")
        rows.append((f"{_short(name)}\n{count}", _evenly(of_class, _COLUMNS)))
    return rows, len(rows), len(by_label)


def _short(name: str) -> str:
    """A class name in at most two lines of the sheet."""
    lines = textwrap.wrap(printable(name, one_line=True), _LETTERS, max_lines=2, placeholder="...")
    return "\n".join(lines)


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

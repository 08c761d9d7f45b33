# SPDX-License-Identifier: Apache-2.0
"""A picture of clips with what a classifier says about them, drawn with Pillow alone."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PAPER, INK, FAINT = "#ffffff", "#1f2328", "#6e7781"
RIGHT, WRONG = "#1a7f37", "#cf222e"
MARGIN, GUTTER, ROW_GAP = 28, 6, 10
TILE = 96  # pixels that a frame is wide, about, where it is scaled up
COLUMN_GAP = 18


def draw_predictions(
    path: Path,
    clips: np.ndarray,
    labels: Sequence[str],
    predictions: Sequence[str],
    scores: Sequence[float],
    *,
    title: str,
    subtitle: str,
    fps: float,
) -> None:
    """Write a PNG with a row per clip: its label, its frames, the prediction and its probability.

    clips uint8 [n, t, h, w, 3]; `labels`, `predictions` and `scores` one per clip.
    """
    from PIL import Image, ImageDraw, ImageFont

    heading, plain, small = (ImageFont.load_default(size) for size in (24, 16, 13))
    scale = max(1, round(TILE / clips.shape[2]))
    _, num_frames, height, width, _ = clips.shape
    height, width = scale * height, scale * width

    left = MARGIN + text_width(plain, *labels, "shown") + COLUMN_GAP
    right = left + num_frames * (width + GUTTER) - GUTTER + COLUMN_GAP
    top = MARGIN + 96
    headings = MARGIN + max(text_width(heading, title), text_width(plain, subtitle))
    answers = max(text_width(plain, *predictions), text_width(small, "wrong, probability 0.00"))
    page_width = max(right + answers, headings) + MARGIN
    page_height = top + len(clips) * (height + ROW_GAP) - ROW_GAP + MARGIN
    page = Image.new("RGB", (page_width, page_height), PAPER)
    draw = ImageDraw.Draw(page)

    draw.text((MARGIN, MARGIN), title, INK, heading, "lt")
    draw.text((MARGIN, MARGIN + 34), subtitle, FAINT, plain, "lt")
    for x, text in ((MARGIN, "shown"), (right, "predicted")):
        draw.text((x, top - 10), text, FAINT, small, "ls")
    for i in range(num_frames):
        x = left + i * (width + GUTTER) + width // 2
        draw.text((x, top - 10), f"{i / fps:.3g} s", FAINT, small, "ms")

    for row, clip in enumerate(clips):
        y = top + row * (height + ROW_GAP)
        middle = y + height // 2
        draw.text((MARGIN, middle), labels[row], INK, plain, "lm")
        for i, frame in enumerate(clip):
            tile = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (left + i * (width + GUTTER), y))
        correct = predictions[row] == labels[row]
        draw.text((right, middle - 3), predictions[row], RIGHT if correct else WRONG, plain, "ls")
        note = f"{'' if correct else 'wrong, '}probability {scores[row]:.2f}"
        draw.text((right, middle + 5), note, FAINT, small, "lt")
    page.save(path)


def text_width(font, *texts: str) -> int:
    return math.ceil(max(font.getlength(text) for text in texts))

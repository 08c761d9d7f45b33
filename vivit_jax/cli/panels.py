# SPDX-License-Identifier: Apache-2.0
"""Pictures of clips shown one above the other (png) or side by side and moving (mp4, gif).

Drawn with Pillow alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vivit_jax.data.datasets.synthetic import write_mp4

PAPER, INK, FAINT = "#ffffff", "#1f2328", "#6e7781"
RIGHT, WRONG = "#1a7f37", "#cf222e"
MARGIN, COLUMN_GAP, GUTTER, ROW_GAP = 28, 18, 6, 10
TILE, MOVING_TILE = 96, 256  # pixels that a frame is wide, about, where it is scaled up
SMALL_STEP = 16  # between lines of small text
_LEAST_HOLD = 0.001  # seconds, what the time of an mp4 counts
MOST_COLUMNS = 8  # 2,000 pixels where frames are 224 wide
HIDDEN, HATCH = 0.88, 0.62  # grey levels of what is not shown


@dataclasses.dataclass(frozen=True)
class Panels:
    """Clips of the same frames with a label each, and what is to be said about them."""

    title: str
    notes: Sequence[str]
    warning: str | None  # in red
    labels: Sequence[str]  # of clips
    clips: Sequence[np.ndarray]  # uint8 [t, h, w, 3] each
    times: Sequence[str]  # of frames
    group: int = 3  # rows that belong together in a png
    answers: Sequence[tuple[str, str, str]] = ()  # of rows: text, its colour, a remark
    # Draws what lies under the frames: (width in pixels, indices of the frames above) -> picture.
    footer: Callable[[int, Sequence[int]], Any] | None = None

    def save(self, path: Path, holds: Sequence[float]) -> None:
        """What the suffix of `path` says; a png does not move, else frame i stays holds[i] s."""
        kind = path.suffix.lower()
        if kind == ".png":
            self.save_png(path)
        elif kind == ".mp4":
            self.save_mp4(path, holds)
        else:
            self.save_gif(path, holds)

    def save_png(self, path: Path) -> None:
        """A row per clip, a column per frame; of many, MOST_COLUMNS from the first to the last."""
        count = len(self.times)
        shown = [round(i) for i in np.linspace(0, count - 1, min(count, MOST_COLUMNS))]
        rows = [[clip[i] for i in shown] for clip in self.clips]
        noted = self
        if len(shown) < count:
            note = f"{len(shown)} of {count} frames are drawn, evenly spaced from first to last."
            noted = dataclasses.replace(self, notes=[*self.notes, note])
        page = noted._page(rows, self.labels, [self.times[i] for i in shown], TILE, self.answers)
        self._with_footer(page, shown).save(path, "PNG")

    def save_mp4(self, path: Path, holds: Sequence[float]) -> None:
        """The clips side by side."""
        pages = np.stack([np.asarray(page) for page in self._moving()])
        # H.264 stores colour for 2x2 pixels, so both sides have to be even.
        odd = [(0, size % 2) for size in pages.shape[1:3]]
        pages = np.pad(pages, [(0, 0), *odd, (0, 0)], constant_values=255)
        write_mp4(path, pages, holds=holds)

    def save_gif(self, path: Path, holds: Sequence[float]) -> None:
        """The clips side by side, over and over; a gif counts time in hundredths of a second."""
        # The running sum is rounded, so that errors do not add up. Viewers show no frame shorter
        # than 0.02 s, and the file has room for 655 s, also of equal pages, which it makes one.
        hundredths = np.maximum(np.diff(np.rint(100 * np.cumsum([0, *holds]))), 2)
        pages, durations = [], []
        for page, duration in zip(self._moving(), hundredths, strict=True):
            if pages and page.tobytes() == pages[-1].tobytes():
                durations[-1] += duration
            else:
                pages.append(page)
                durations.append(duration)
        times = [10 * min(int(duration), 65535) for duration in durations]
        options = dict(save_all=True, append_images=pages[1:], duration=times, loop=0)
        pages[0].save(path, "GIF", **options)

    def _moving(self) -> list:
        pages = (
            self._page([[clip[i] for clip in self.clips]], [time], self.labels, MOVING_TILE)
            for i, time in enumerate(self.times)
        )
        return [self._with_footer(page, [i]) for i, page in enumerate(pages)]

    def _with_footer(self, page, shown: Sequence[int]):
        """The page and below it what the footer draws for the frames on it."""
        if self.footer is None:
            return page
        from PIL import Image

        below = self.footer(page.width, shown)
        whole = Image.new("RGB", (page.width, page.height + below.height), PAPER)
        whole.paste(page, (0, 0))
        whole.paste(below, (0, page.height))
        return whole

    def _page(self, rows, row_labels, column_labels, tile: int, answers=()):
        """A grid of frames, uint8 [h, w, 3] each, under the title and the notes."""
        from PIL import Image, ImageDraw, ImageFont

        heading, plain, small = (ImageFont.load_default(size) for size in (22, 15, 13))
        row_labels = [_drawable(label, plain) for label in row_labels]
        column_labels = [_drawable(label, small) for label in column_labels]
        answers = [
            (_drawable(answer, plain), colour, _drawable(remark, small))
            for answer, colour, remark in answers
        ]
        height, width = rows[0][0].shape[:2]
        scale = max(1, round(tile / width))
        height, width = scale * height, scale * width
        # Of all labels and times, so that the pages of a moving picture are of one size.
        named = (_drawable(text, plain) for text in (*self.labels, *self.times))
        left = MARGIN + text_width(plain, *named) + COLUMN_GAP
        right = left + len(rows[0]) * (width + GUTTER) - GUTTER
        page_width = right + MARGIN
        if answers:
            beside = (text for answer, _, remark in answers for text in (answer, remark))
            page_width += COLUMN_GAP + text_width(plain, *beside)
        # Few or small frames leave less room than a sentence needs.
        page_width = max(page_width, 640)

        said = [(self.title, INK, heading, 30), *((note, FAINT, plain, 21) for note in self.notes)]
        said += [(self.warning, WRONG, plain, 21)] if self.warning else []
        lines = [
            (line, colour, font, step)
            for text, colour, font, step in said
            for line in _wrapped(_drawable(text, font), font, page_width - 2 * MARGIN)
        ]
        top = MARGIN + sum(step for *_, step in lines) + 34
        top += SMALL_STEP * max(label.count("\n") for label in column_labels)
        tops = [top + i * (height + ROW_GAP) + i // self.group * MARGIN for i in range(len(rows))]
        page_height = tops[-1] + height + MARGIN

        page = Image.new("RGB", (page_width, page_height), PAPER)
        draw = ImageDraw.Draw(page)
        y = MARGIN
        for line, colour, font, step in lines:
            draw.text((MARGIN, y), line, colour, font, "lt")
            y += step
        for i, label in enumerate(column_labels):
            middle = left + i * (width + GUTTER) + width // 2
            for j, line in enumerate(reversed(label.split("\n"))):
                draw.text((middle, top - 8 - j * SMALL_STEP), line, INK, small, "ms")
        for y, label, frames in zip(tops, row_labels, rows, strict=True):
            draw.text((MARGIN, y + height // 2), label, INK, plain, "lm")
            for i, frame in enumerate(frames):
                picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
                page.paste(picture, (left + i * (width + GUTTER), y))
        for y, (answer, colour, remark) in zip(tops, answers, strict=bool(answers)):
            x, middle = right + COLUMN_GAP, y + height // 2
            draw.text((x, middle - 3), answer, colour, plain, "ls")
            draw.text((x, middle + 5), remark, FAINT, small, "lt")
        return page


def as_frames(clip: np.ndarray, hatched: bool = False) -> np.ndarray:
    """A clip [t, h, w, c] in [0, 1] for the screen, uint8 [t, h, w, 3].

    One or two channels show the first in grey, more the first three as red, green and blue. What is
    NaN becomes light grey, hatched if asked.
    """
    clip = np.repeat(clip[..., :1], 3, axis=-1) if clip.shape[-1] < 3 else clip[..., :3]
    height, width = clip.shape[1:3]
    across = (np.arange(height)[:, None] + np.arange(width)) % 4 == 0
    blank = np.where(across & hatched, HATCH, HIDDEN)[..., None]
    return np.rint(255 * np.clip(np.where(np.isnan(clip), blank, clip), 0, 1)).astype(np.uint8)


def real_time(seconds: np.ndarray | None, count: int) -> list[float]:
    """How many seconds each of `count` frames, shown at `seconds` of a file, stays in a movie.

    Until the next one; of the last, of one that stands in for a missing one, and of one without a
    time it is as long as usual (the median). Without times it is a tenth of a second, as in the
    demo's clips.
    """
    steps = np.diff(np.full(count, np.nan) if seconds is None else seconds, append=np.nan)
    known = steps[steps > 0]
    usual = float(np.median(known)) if len(known) else 0.1
    return [max(float(step) if step > 0 else usual, _LEAST_HOLD) for step in steps]


def channels_note(channels: int) -> str | None:
    """What `as_frames` shows of a clip, where it is not all."""
    if channels == 3:
        return None
    shown = "the first is shown" if channels < 3 else "the first three are shown as colours"
    return f"{channels} channel{'s' * (channels > 1)}: {shown}."


def text_width(font, *texts: str) -> int:
    return math.ceil(max(font.getlength(line) for text in texts for line in text.split("\n")))


def _drawable(text: str, font) -> str:
    r"""The text; what the font lacks, and would draw as boxes, is escaped as in Python: \xf6.

    Newlines stay: they are between the lines of a label.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text

    def drawn(letter: str) -> tuple:
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    box = drawn("\uffff")  # no letter, so no font has it

    def shown(letter: str) -> str:
        if letter == "\n" or letter.isascii() and letter.isprintable():
            return letter
        # Half of a surrogate pair, which stands for a byte of a file name, cannot be drawn at all.
        has = not "\ud800" <= letter <= "\udfff" and drawn(letter) != box
        return letter if has else letter.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines no wider than `width`, broken between words, and inside one that is longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(font, longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and text_width(font, lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines

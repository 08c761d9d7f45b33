# SPDX-License-Identifier: Apache-2.0
"""Pictures of clips: one above the other (png), or side by side and moving (mp4, gif)."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from vivit_jax.cli.lettering import DPI, FONT, drawable, families, points, text_width, wrapped
from vivit_jax.data.datasets.synthetic import write_mp4
from vivit_jax.errors import counted

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

PAPER, INK, FAINT = "#ffffff", "#1f2328", "#6e7781"
RIGHT, WRONG = "#1a7f37", "#cf222e"
MARGIN, COLUMN_GAP, GUTTER, ROW_GAP = 28, 18, 6, 10
TILE, MOVING_TILE = 96, 256  # small frames are scaled up to about this width
HEADING, PLAIN, SMALL = 20, 13, 11  # letters, in pixels
HEADING_STEP, PLAIN_STEP, SMALL_STEP = 30, 21, 16  # between lines
LEAST_WIDTH = 640  # of a page: few or small frames leave less room than a sentence needs
_LEAST_HOLD = 0.001  # seconds, the time unit of an mp4
MOST_COLUMNS = 8  # 2,000 pixels of frames that are 224 wide
HIDDEN, HATCH = 0.88, 0.62  # grey levels of what is not shown

Frames = UInt8[np.ndarray, "t h w 3"]
Frame = UInt8[np.ndarray, "h w 3"]
Page = UInt8[np.ndarray, "height width 3"]


# Marks frames of the clip in what is drawn; returns the artists that do.
Highlight = Callable[[Sequence[int]], "list[Artist]"]


class Footer(Protocol):
    """What lies under the frames of a picture."""

    @property
    def height(self) -> int:
        """Pixels that it takes."""
        ...

    def draw(self, figure: "Figure", top: int) -> Highlight:
        """Draw from `top` pixels below the figure's upper edge."""
        ...


@dataclasses.dataclass(frozen=True)
class Panels:
    """Labelled clips of the same frames, with a title and notes."""

    title: str
    notes: Sequence[str]
    warning: str | None  # in red
    labels: Sequence[str]  # of clips
    clips: Sequence[Frames]
    times: Sequence[str]  # of frames
    group: int = 3  # rows of a png that belong together
    answers: Sequence[tuple[str, str, str]] = ()  # of rows: text, its colour, a remark
    footer: Footer | None = None

    def save(self, path: Path, holds: Sequence[float]) -> None:
        """Write the format of the suffix; in a movie frame i stays for holds[i] seconds."""
        kind = path.suffix.lower()
        if kind == ".png":
            self.save_png(path)
        elif kind == ".mp4":
            self.save_mp4(path, holds)
        else:
            self.save_gif(path, holds)

    def save_png(self, path: Path) -> None:
        """A row per clip, a column per frame; at most MOST_COLUMNS evenly spaced frames."""
        from PIL import Image

        count = len(self.times)
        evenly = np.linspace(0, count - 1, min(count, MOST_COLUMNS))
        shown = [int(i) for i in evenly.round()]
        rows = [[clip[i] for i in shown] for clip in self.clips]
        noted = self
        if len(shown) < count:
            note = f"{len(shown)} of {count} frames are drawn, evenly spaced from first to last."
            noted = dataclasses.replace(self, notes=[*self.notes, note])
        times = [self.times[i] for i in shown]
        page = noted._page(rows, self.labels, times, shown)
        Image.fromarray(page).save(path, "PNG")

    def save_mp4(self, path: Path, holds: Sequence[float]) -> None:
        """The clips side by side."""
        pages = np.stack(self._moving())
        # H.264 stores colour for 2x2 pixels, so both sides have to be even.
        odd = [(0, size % 2) for size in pages.shape[1:3]]
        pages = np.pad(pages, [(0, 0), *odd, (0, 0)], constant_values=255)
        write_mp4(path, pages, holds=holds)

    def save_gif(self, path: Path, holds: Sequence[float]) -> None:
        """The clips side by side, in a loop; a gif counts time in hundredths of a second."""
        from PIL import Image

        # The running sum is rounded, so that errors do not add up. Viewers show no frame for less
        # than 0.02 s, and the format has room for 655 s, also of equal pages, which become one.
        hundredths = np.maximum(np.diff(np.rint(100 * np.cumsum([0, *holds]))), 2)
        pages, durations = [], []
        for page, duration in zip(self._moving(), hundredths, strict=True):
            if pages and np.array_equal(page, pages[-1]):
                durations[-1] += duration
            else:
                pages.append(page)
                durations.append(duration)
        times = [10 * min(int(duration), 65535) for duration in durations]
        first, *rest = map(Image.fromarray, pages)
        first.save(path, "GIF", save_all=True, append_images=rest, duration=times, loop=0)

    def _moving(self) -> list[Page]:
        """A page for each frame; only what differs between them is drawn anew."""
        first = [[clip[0] for clip in self.clips]]
        pages: list[Page] = []
        with _style():
            sheet = self._sheet(first, [self.times[0]], self.labels, MOVING_TILE)
            sheet.row_labels[0].set_animated(True)  # not drawn with the rest
            sheet.canvas.draw()
            rest = sheet.canvas.copy_from_bbox(sheet.figure.bbox)
            for i, time in enumerate(self.times):
                sheet.canvas.restore_region(rest)
                sheet.row_labels[0].set_text(drawable(time))
                sheet.figure.draw_artist(sheet.row_labels[0])
                highlighted = sheet.highlight([i])
                for artist in highlighted:
                    sheet.figure.draw_artist(artist)
                    artist.remove()
                pages.append(sheet.filled([[clip[i] for clip in self.clips]]))
        return pages

    def _page(
        self,
        rows: Sequence[Sequence[Frame]],
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        shown: Sequence[int],
    ) -> Page:
        """A page with a column for each of the frames `shown`."""
        with _style():
            sheet = self._sheet(rows, row_labels, column_labels, TILE, self.answers)
            sheet.highlight(shown)
            sheet.canvas.draw()
            return sheet.filled(rows)

    def _sheet(
        self,
        rows: Sequence[Sequence[Frame]],
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        tile: int,
        answers: Sequence[tuple[str, str, str]] = (),
    ) -> "_Sheet":
        """Room for a grid of frames under the title and the notes, and the footer below."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        scale = max(1, round(tile / rows[0][0].shape[1]))
        height, width = (scale * size for size in rows[0][0].shape[:2])
        # Of all labels and times, so that the pages of a movie have one size.
        left = MARGIN + text_width(PLAIN, *self.labels, *self.times) + COLUMN_GAP
        right = left + len(rows[0]) * (width + GUTTER) - GUTTER
        page_width = right + MARGIN
        if answers:
            beside = (text for answer, _, remark in answers for text in (answer, remark))
            page_width += COLUMN_GAP + text_width(PLAIN, *beside)
        page_width = max(page_width, LEAST_WIDTH)

        texts = [(self.title, INK, HEADING, HEADING_STEP)]
        texts += [(note, FAINT, PLAIN, PLAIN_STEP) for note in self.notes]
        texts += [(self.warning, WRONG, PLAIN, PLAIN_STEP)] if self.warning else []
        lines = [
            (line, colour, size, step)
            for text, colour, size, step in texts
            for line in wrapped(text, size, page_width - 2 * MARGIN)
        ]
        top = MARGIN + sum(step for *_, step in lines) + 34
        top += SMALL_STEP * max(label.count("\n") for label in column_labels)
        tops = [top + i * (height + ROW_GAP) + i // self.group * MARGIN for i in range(len(rows))]
        lefts = [left + i * (width + GUTTER) for i in range(len(rows[0]))]
        frames_bottom = tops[-1] + height + MARGIN
        page_height = frames_bottom + (self.footer.height if self.footer else 0)

        size = page_width / DPI, page_height / DPI
        figure = Figure(figsize=size, dpi=DPI, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)

        def write(x: float, y: float, text: str, colour: str, size: int, **align: Any) -> "Text":
            place, text = (x / page_width, 1 - y / page_height), drawable(text)
            how: Any = dict(color=colour, fontsize=points(size), fontfamily=families(text))
            return figure.text(*place, text, **how, **align)

        y = MARGIN
        for line, colour, size, step in lines:
            write(MARGIN, y, line, colour, size, va="top")
            y += step
        for x, label in zip(lefts, column_labels, strict=True):
            write(x + width / 2, top - 6, label, INK, SMALL, ha="center", va="bottom")
        written = [
            write(MARGIN, y + height / 2, label, INK, PLAIN, va="center")
            for y, label in zip(tops, row_labels, strict=True)
        ]
        for y, (answer, colour, remark) in zip(tops, answers, strict=bool(answers)):
            x, middle = right + COLUMN_GAP, y + height / 2
            write(x, middle - 2, answer, colour, PLAIN, va="bottom")
            write(x, middle + 4, remark, FAINT, SMALL, va="top")
        highlight = self.footer.draw(figure, frames_bottom) if self.footer else lambda shown: []
        return _Sheet(figure, canvas, written, highlight, tops, lefts, scale)


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """A page without its frames, which are pasted in after it is drawn."""

    figure: "Figure"
    canvas: "FigureCanvasAgg"
    row_labels: "list[Text]"
    highlight: Highlight
    tops: Sequence[int]
    lefts: Sequence[int]
    scale: int

    def filled(self, rows: Sequence[Sequence[Frame]]) -> Page:
        """What is drawn by now, with the frames."""
        page = np.asarray(self.canvas.buffer_rgba())[..., :3].copy()
        for y, frames in zip(self.tops, rows, strict=True):
            for x, frame in zip(self.lefts, frames, strict=True):
                large = frame.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
                page[y : y + large.shape[0], x : x + large.shape[1]] = large
        return page


def _style():
    """matplotlib's style for pages, whatever the user's own is."""
    import matplotlib

    style: Any = {"font.family": FONT, "text.parse_math": False, "text.color": INK}
    return matplotlib.rc_context(matplotlib.rcParamsDefault | style)


def as_frames(clip: Float[np.ndarray, "t h w c"], hatched: bool = False) -> Frames:
    """A clip in [0, 1] for the screen.

    One or two channels show the first in grey, more show the first three as red, green and blue.
    NaN becomes light grey, or hatched.
    """
    clip = np.repeat(clip[..., :1], 3, axis=-1) if clip.shape[-1] < 3 else clip[..., :3]
    height, width = clip.shape[1:3]
    across = (np.arange(height)[:, None] + np.arange(width)) % 4 == 0
    blank = np.where(across & hatched, HATCH, HIDDEN)[..., None]
    return np.rint(255 * np.clip(np.where(np.isnan(clip), blank, clip), 0, 1)).astype(np.uint8)


def real_time(seconds: Float[np.ndarray, " t"] | None, count: int) -> list[float]:
    """Seconds that each of `count` frames, at `seconds` of a file, stays in a movie.

    A frame stays until the next one. The last frame, a repeated one, and one without a time stay
    for the median; without any times all stay for 0.1 s, as in the demo's clips.
    """
    steps = np.diff(np.full(count, np.nan) if seconds is None else seconds, append=np.nan)
    known = steps[steps > 0]
    usual = float(np.median(known)) if len(known) else 0.1
    return [max(float(step) if step > 0 else usual, _LEAST_HOLD) for step in steps]


def channels_note(channels: int) -> str | None:
    """What `as_frames` shows of a clip, unless it is everything."""
    if channels == 3:
        return None
    shown = "the first is shown" if channels < 3 else "the first three are shown as colours"
    return f"{counted(channels, 'channel')}: {shown}."

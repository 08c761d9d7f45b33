# SPDX-License-Identifier: Apache-2.0
"""The pictures of `vivit-jax predict --draw`: a video with its labels over time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from vivit_jax.cli.lettering import DPI, drawable, families, one_font, points, text_width
from vivit_jax.cli.panels import (
    COLUMN_GAP,
    FAINT,
    INK,
    MARGIN,
    MOST_COLUMNS,
    PAPER,
    PLAIN,
    PLAIN_STEP,
    SMALL,
    SMALL_STEP,
    Highlight,
    Panels,
    real_time,
)
from vivit_jax.data.datasets.synthetic import write_mp4
from vivit_jax.data.video.decode import read_video
from vivit_jax.data.video.frame_stream import open_stream
from vivit_jax.errors import VideoError, counted, printable
from vivit_jax.inference.timeline import Timeline
from vivit_jax.train.pages.chart import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import ImageFont

_TILE = 128, 176  # height and width of a frame of a png, at most
_PLOT = 170  # height of the plot
_LEAST, _MOST = 360, 960  # sides of a movie's frames, in pixels
_TRACK, _OTHER = "#e6e8eb", "#9fc1e4"  # of a bar: behind it, and of a label that is not the best


def save_png(path: Path, video: Path, timeline: Timeline) -> None:
    """A strip of frames along time, and the curve of each label below it."""
    count = min(MOST_COLUMNS, len(timeline.seconds))
    # The middles of equal parts: each frame stands above its time.
    places = ((np.arange(count) + 0.5) * len(timeline.seconds) / count).astype(int)
    frames = np.stack([_within(f, *_TILE) for f in read_video(video, indices=places, lost="few")])
    times, axis = _clock(timeline)
    labels = [f"{times[i]:.3g} s" if axis == "seconds" else f"frame {i}" for i in places]
    windows = counted(len(timeline.middles), "window")
    panels = Panels(
        title=printable(video.name, one_line=True),
        notes=[f"{windows}; labels with the highest score at any time."],
        warning=None,
        labels=[""],
        clips=[frames],
        times=labels,
        footer=_Curves(timeline, times, axis, left=text_width(PLAIN, *labels) + COLUMN_GAP),
    )
    panels.save_png(path)


def _clock(timeline: Timeline) -> tuple[np.ndarray, str]:
    """The place of each frame on a time axis, and what it counts."""
    if np.isfinite(timeline.seconds).all():
        return timeline.seconds, "seconds"
    return np.arange(len(timeline.seconds), dtype=float), "frame"


def _within(frame: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> np.ndarray:
    """The frame made smaller to fit; one that fits stays as it is."""
    from PIL import Image

    scale = min(height / frame.shape[0], width / frame.shape[1])
    if scale >= 1:
        return frame
    size = (max(1, round(scale * frame.shape[1])), max(1, round(scale * frame.shape[0])))
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(size))


@dataclasses.dataclass(frozen=True)
class _Curves:
    """Scores over time, with the labels below."""

    timeline: Timeline
    times: np.ndarray  # of frames
    axis: str
    left: int  # pixels from the margin to the plot: it begins below the first frame

    @property
    def height(self) -> int:
        return _PLOT + 3 * SMALL_STEP + PLAIN_STEP * len(self.timeline.labels) + MARGIN

    def draw(self, figure: "Figure", top: int) -> Highlight:
        width, height = (round(DPI * inches) for inches in figure.get_size_inches())
        left = MARGIN + self.left
        sides = (width - left - MARGIN) / width, _PLOT / height
        axes = figure.add_axes((left / width, 1 - (top + _PLOT) / height, *sides))
        axes.tick_params(labelsize=points(SMALL), labelcolor=INK, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        middles = np.interp(self.timeline.middles, np.arange(len(self.times)), self.times)
        first, last = self.times[0], self.times[-1]
        for i, column in enumerate(self.timeline.scores.T):
            axes.plot([first, *middles, last], [column[0], *column, column[-1]], color=COLOURS[i])
            axes.plot(middles, column, "o", color=COLOURS[i], markersize=3)
            down = 1 - (top + _PLOT + 3 * SMALL_STEP + i * PLAIN_STEP) / height
            most = f"   {column.max():.0%} at most"
            label = drawable(printable(self.timeline.labels[i], one_line=True))
            measure = functools.partial(text_width, PLAIN)
            label = _shortened(label, width - left - 20 - MARGIN - measure(most), measure)
            how: Any = dict(fontsize=points(PLAIN), va="top")
            figure.text(left / width, down, "\u25a0", color=COLOURS[i], **how)
            # Apart: a label that is written from the right would turn the number round.
            beside = (left + 20 + measure(label)) / width, down
            figure.text(*beside, most, color=INK, **how)
            figure.text(
                (left + 20) / width, down, label, color=INK, **how, fontfamily=families(label)
            )
        axes.set(ylim=(0, 1.03), xlim=(first, last) if last > first else (first - 1, first + 1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel(self.axis, fontsize=points(SMALL), color=FAINT)
        return lambda shown: []


def _shortened(text: str, room: float, measure: Callable[[str], float]) -> str:
    """The text, cut at its end so that it measures at most `room`."""
    if measure(text) <= room:
        return text
    letters = len(text)
    while letters > 1 and measure(f"{text[:letters]}...") > room:
        letters -= 1
    return f"{text[:letters]}..."


def save_mp4(path: Path, video: Path, timeline: Timeline) -> None:
    """The whole video, with a bar for each label at the foot of each frame."""
    holds = real_time(timeline.seconds, len(timeline.seconds))
    write_mp4(path, _pages(video, timeline), holds=holds)


def _pages(video: Path, timeline: Timeline) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Each frame with its foot; a damaged frame repeats the one before it."""
    scores, (times, axis) = timeline.over_frames(), _clock(timeline)
    foot, image = None, None
    for frame in open_stream(video):
        try:
            image = _sized(frame.image())
        except VideoError:
            if image is None:
                raise
        foot = foot or _Foot(image.shape[1], timeline.labels)
        at = times[frame.index]
        text = f"{at:.1f} of {times[-1]:.1f} s" if axis == "seconds" else f"frame {frame.index}"
        share = at / times[-1] if times[-1] > 0 else 1.0
        below = foot.drawn(scores[frame.index], text, share)
        page = np.full((image.shape[0] + below.shape[0], below.shape[1], 3), 0, np.uint8)
        left = (page.shape[1] - image.shape[1]) // 2
        page[: image.shape[0], left : left + image.shape[1]] = image
        page[image.shape[0] :] = below
        yield page


def _sized(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "height width 3"]:
    """The frame with even sides that a movie can show: small ones in whole steps larger."""
    height, width = frame.shape[:2]
    larger = max(1, _LEAST // max(height, width))
    frame = _within(frame.repeat(larger, 0).repeat(larger, 1), _MOST, _MOST)
    odd = [(0, size % 2) for size in frame.shape[:2]]
    return np.pad(frame, [*odd, (0, 0)], mode="edge")


class _Foot:
    """What lies below the frames of a movie: a row for each label, its bar and its score."""

    def __init__(self, width: int, labels: Sequence[str]):
        self.width = max(width, _LEAST)
        unit = min(2.0, self.width / _LEAST)
        self._row, self._pad = round(20 * unit), round(8 * unit)
        self._font = _font(round(13 * unit))
        # Pillow takes the letters of a text from one font.
        fitting = [one_font(printable(label, one_line=True)) for label in labels]
        self._fonts = [_font(round(13 * unit), path) for _, path in fitting]
        share = round(self._font.getlength("100%")) + self._pad
        most = (self.width - 3 * self._pad - share) * 3 // 5
        widths = [
            font.getlength(text) for font, (text, _) in zip(self._fonts, fitting, strict=True)
        ]
        widest = max(map(round, widths))
        self._bar = 2 * self._pad + min(widest, most)  # where bars begin
        self._end = self.width - self._pad - share
        self._labels = [
            _shortened(text, min(widest, most), font.getlength)
            for font, (text, _) in zip(self._fonts, fitting, strict=True)
        ]
        height = self._row * (len(labels) + 1) + 2 * self._pad
        self.height = height + height % 2

    def drawn(
        self, scores: Float[np.ndarray, " labels"], text: str, share: float
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The foot at a time, which is the `share` of the video that has passed."""
        from PIL import Image, ImageDraw

        page = Image.new("RGB", (self.width, self.height), PAPER)
        draw = ImageDraw.Draw(page)
        draw.rectangle((0, 0, round(self.width * min(share, 1)), 2), fill=FAINT)
        for i, (label, score) in enumerate(zip(self._labels, scores.tolist(), strict=True)):
            top = self._pad + i * self._row
            middle, best = top + self._row // 2, score == scores.max()
            ink = INK if best else FAINT
            draw.text((self._pad, middle), label, fill=ink, font=self._fonts[i], anchor="lm")
            bar = (self._bar, top + 4, self._end, top + self._row - 4)
            draw.rectangle(bar, fill=_TRACK)
            length = round((self._end - self._bar) * min(max(score, 0), 1))
            if length:
                colour = COLOURS[0] if best else _OTHER
                draw.rectangle((*bar[:2], self._bar + length, bar[3]), fill=colour)
            right = (self.width - self._pad, middle)
            draw.text(right, f"{score:.0%}", fill=ink, font=self._font, anchor="rm")
        bottom = (self.width - self._pad, self._pad + len(scores) * self._row + self._row // 2)
        draw.text(bottom, text, fill=FAINT, font=self._font, anchor="rm")
        return np.asarray(page)


def _font(size: int, path: str | None = None) -> "ImageFont.FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.truetype(path or one_font("")[1], size)

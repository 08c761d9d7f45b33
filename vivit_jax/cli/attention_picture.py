# SPDX-License-Identifier: Apache-2.0
"""Attention laid on frames, its colour bar, and its weight over time; drawn with Pillow alone."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from vivit_jax.cli.panels import FAINT, INK, MARGIN, PAPER, SMALL_STEP, text_width

MARK = (0, 229, 255)  # of the query, a colour that COLOURS does not have
BAR, REST, SHADE = "#8250df", "#c297ff", "#ddf4ff"
# Low attention leaves the darkened grey frame, high attention hides three quarters of it.
DARKENED, LEAST_COVER, MOST_COVER = 0.8, 0.15, 0.75
SATURATED = 99.5  # percentile of the tokens at which the colours end
BAR_WIDTH, BAR_HEIGHT, PLOT_HEIGHT = 320, 14, 110


def scale_top(relative: np.ndarray) -> float:
    """Where the colours end for multiples of uniform attention; at least 2.

    A few tokens may hold most of the attention and would leave all others dark, so of more than 200
    the largest half per cent is cut off. With 2 at least, nearly uniform attention looks it.
    """
    top = max(2.0, float(np.percentile(relative, SATURATED, method="higher")))
    step = 10.0 ** np.floor(np.log10(top)) / 10
    return float(np.ceil(round(top / step, 6)) * step)


def colours(values: np.ndarray) -> np.ndarray:
    """Colours uint8 [..., 3] of values in [0, 1], others at the ends: from dark violet to yellow.

    Their perceived lightness is linear in the value (OKLab, Ottosson 2020), so that equal steps
    look equal, also in grey.
    """
    table = _table()
    places = np.rint(np.clip(values, 0, 1) * (len(table) - 1)).astype(int)
    return table[places]


@functools.cache
def _table(count: int = 256) -> np.ndarray:
    place = np.linspace(0, 1, count)
    light = 0.22 + 0.72 * place
    hue = np.deg2rad(290 + 175 * place)  # violet, red, orange, yellow
    chroma = 0.1 + 0.09 * np.sin(np.pi * place) + 0.05 * place
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cones = np.stack(
        [
            light + 0.3963377774 * a + 0.2158037573 * b,
            light - 0.1055613458 * a - 0.0638541728 * b,
            light - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_linear @ cones**3, 0, 1).T
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * curved).astype(np.uint8)


def blocks(strength: np.ndarray, height: int, width: int) -> np.ndarray:
    """Maps [t, h, w] in [0, 1] as colours [t, height, width, 3], a block for each token."""
    _, h, w = strength.shape
    down, across = np.arange(height) * h // height, np.arange(width) * w // width
    return colours(strength)[:, down][:, :, across]


def overlay(frames: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Maps [t, h, w] in [0, 1], interpolated bilinearly, on frames uint8 [t, height, width, 3].

    Frames turn grey; the stronger the attention, the more of the frame it covers.
    """
    from PIL import Image

    height, width = frames.shape[1:3]
    large = np.stack(
        [
            Image.fromarray(one.astype(np.float32)).resize(
                (width, height), Image.Resampling.BILINEAR
            )
            for one in strength
        ]
    )[..., None]
    grey = DARKENED * (frames @ np.array([0.299, 0.587, 0.114]))[..., None]
    cover = LEAST_COVER + (MOST_COVER - LEAST_COVER) * np.clip(large, 0, 1)
    return np.rint(grey + cover * (colours(large[..., 0]) - grey)).astype(np.uint8)


def mark(frames: np.ndarray, box: tuple[int, int, int, int], where: Sequence[int]) -> np.ndarray:
    """Frames uint8 [t, h, w, 3] with the outline of (top, left, bottom, right) in some of them."""
    frames = frames.copy()
    top, left, bottom, right = box
    line = max(1, (bottom - top) // 12)
    for i in where:
        inside = frames[i, top + line : bottom - line, left + line : right - line].copy()
        frames[i, top:bottom, left:right] = MARK
        frames[i, top + line : bottom - line, left + line : right - line] = inside
    return frames


@dataclasses.dataclass(frozen=True)
class Footer:
    """The colour bar and the plot over time, as `Panels.footer` wants them.

    `weights` [t] are multiples of uniform attention, one for each tubelet of `tubelet` frames;
    `ticks` name the frames.
    """

    top: float  # of the colours
    cut: bool  # whether some tokens lie above
    weights: np.ndarray
    tubelet: int
    ticks: Sequence[str]  # of frames: number, seconds
    axis: str  # what the ticks say

    def __call__(self, width: int, shown: Sequence[int]):
        from PIL import Image, ImageDraw, ImageFont

        plain, small = (ImageFont.load_default(size) for size in (15, 13))
        tick_lines = max(tick.count("\n") for tick in self.ticks) + 1
        bar_top = 24
        plot_top = bar_top + BAR_HEIGHT + 78
        height = plot_top + PLOT_HEIGHT + 12 + SMALL_STEP * tick_lines + 24 + MARGIN
        page = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(page)
        self._bar(page, draw, plain, small, bar_top)
        self._plot(draw, plain, small, plot_top, width, shown)
        return page

    def _bar(self, page, draw, plain, small, y: int) -> None:
        from PIL import Image

        title = "Attention to a token, as a multiple of uniform (1 = the same to every token)"
        draw.text((MARGIN, y - 8), title, INK, plain, "ls")
        ramp = np.broadcast_to(np.linspace(0, 1, BAR_WIDTH), (BAR_HEIGHT, BAR_WIDTH))
        page.paste(Image.fromarray(colours(ramp)), (MARGIN, y))
        for value in bar_ticks(self.top):
            x = MARGIN + round(value / self.top * (BAR_WIDTH - 1))
            draw.line((x, y + BAR_HEIGHT, x, y + BAR_HEIGHT + 4), INK)
            last = value == self.top
            text = f"{value:g} and more" if self.cut and last else f"{value:g}"
            # The last may be long, and has room on its right.
            start = x - text_width(small, f"{value:g}") // 2
            draw.text((start, y + BAR_HEIGHT + 7), text, INK, small, "lt")

    def _plot(self, draw, plain, small, y: int, width: int, shown: Sequence[int]) -> None:
        highest = max(1.25, 1.1 * float(self.weights.max()))
        uniform, most = "1", f"{self.weights.max():.3g}"
        left = MARGIN + text_width(small, uniform, most) + 10
        right, bottom = width - MARGIN, y + PLOT_HEIGHT
        title = "Attention over time: mean of the tokens of a time step, as a multiple of uniform"
        draw.text((MARGIN, y - 10), title, INK, plain, "ls")

        def across(frame: float) -> float:
            return left + frame / len(self.ticks) * (right - left)

        def up(value: float) -> float:
            return bottom - value / highest * PLOT_HEIGHT

        some = len(shown) < len(self.ticks)
        for i in shown if some else ():
            draw.rectangle((across(i), y, across(i + 1) - 1, bottom), SHADE)
        for i, weight in enumerate(self.weights):
            start, end = across(i * self.tubelet), across((i + 1) * self.tubelet)
            gap = 1 if end - start > 4 else 0
            draw.rectangle((start + gap, up(float(weight)), end - 1 - gap, bottom), REST)
            for j in shown:
                if j // self.tubelet == i:
                    here = max(start + gap, across(j)), min(end - 1 - gap, across(j + 1) - 1)
                    draw.rectangle((here[0], up(float(weight)), here[1], bottom), BAR)
        draw.line((left, bottom, right, bottom), INK)
        draw.line((left, y, left, bottom), INK)
        for x in range(left, right, 8):
            draw.line((x, up(1), min(x + 3, right), up(1)), INK)
        draw.text((left - 6, up(1)), uniform, INK, small, "rm")
        draw.text((left - 6, bottom), "0", INK, small, "rm")
        if abs(up(float(self.weights.max())) - up(1)) >= SMALL_STEP:
            draw.text((left - 6, up(float(self.weights.max()))), most, INK, small, "rm")
        self._ticks(draw, small, bottom, across)
        lines = max(tick.count("\n") for tick in self.ticks) + 1
        place = bottom + 10 + SMALL_STEP * lines + 6
        axis = (
            f"{self.axis}; shaded: the frame{'s' * (len(shown) > 1)} above" if some else self.axis
        )
        draw.text(((left + right) / 2, place), axis, FAINT, small, "mt")

    def _ticks(self, draw, small, bottom: int, across) -> None:
        """The first frame of every tubelet, or of every so many where there is no room."""
        room = text_width(small, *self.ticks) + 10
        each = self.tubelet
        while (across(each) - across(0)) < room and each < len(self.ticks):
            each += self.tubelet
        for i in range(0, len(self.ticks), each):
            x = across(i + 0.5)
            draw.line((x, bottom, x, bottom + 4), INK)
            for j, line in enumerate(self.ticks[i].split("\n")):
                draw.text((x, bottom + 8 + j * SMALL_STEP), line, INK, small, "mt")


def bar_ticks(top: float) -> list[float]:
    """Round values from 0 to `top`, both included, at most seven."""
    step = next(s * 10.0**e for e in range(-1, 9) for s in (1, 2, 5) if top / (s * 10.0**e) <= 6)
    inner = (float(f"{i * step:.6g}") for i in range(1, 7))
    return [0.0, *(value for value in inner if value < top - step / 2), top]

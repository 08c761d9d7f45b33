# SPDX-License-Identifier: Apache-2.0
"""Attention laid on frames, its colour bar, and its weight over time."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from vivit_jax.cli.lettering import DPI, points, text_width
from vivit_jax.cli.panels import (
    FAINT,
    INK,
    MARGIN,
    PLAIN,
    SMALL,
    SMALL_STEP,
    Frames,
    Highlight,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "plasma"  # perceived lightness is linear in the value: equal steps look equal
MARK = (0, 229, 255)  # of the query; COLOURS has no such colour
BAR, REST, SHADE = "#8250df", "#c297ff", "#ddf4ff"
# Low attention leaves the darkened grey frame, high attention hides three quarters of it.
DARKENED, LEAST_COVER, MOST_COVER = 0.8, 0.15, 0.75
SATURATED = 99.5  # percentile of the tokens at which the colours end
BAR_WIDTH, BAR_HEIGHT, PLOT_HEIGHT = 320, 14, 110


def scale_top(relative: Float[np.ndarray, "*shape"]) -> float:
    """Where the colours end, as a multiple of uniform attention; at least 2.

    A few tokens may hold most of the attention and leave all others dark, so the largest half per
    cent is cut off. At least 2, so that nearly uniform attention looks uniform.
    """
    top = max(2.0, float(np.percentile(relative, SATURATED, method="higher")))
    step = 10.0 ** np.floor(np.log10(top)) / 10
    return float(np.ceil(round(top / step, 6)) * step)


def colours(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """The colours of values in [0, 1], from dark violet to yellow; others are clipped."""
    from matplotlib import colormaps

    return np.asarray(colormaps[COLOURS](np.clip(values, 0, 1), bytes=True))[..., :3]


def blocks(strength: Float[np.ndarray, "t y x"], height: int, width: int) -> Frames:
    """Maps in [0, 1] as frames of height x width, a block of colour for each token."""
    _, h, w = strength.shape
    down, across = np.arange(height) * h // height, np.arange(width) * w // width
    return colours(strength)[:, down][:, :, across]


def overlay(frames: Frames, strength: Float[np.ndarray, "t y x"]) -> Frames:
    """Maps in [0, 1], interpolated bilinearly, on frames turned grey.

    The stronger the attention, the more of the frame it covers.
    """
    from PIL import Image

    height, width = frames.shape[1:3]
    images = (Image.fromarray(one.astype(np.float32)) for one in strength)
    size, how = (width, height), Image.Resampling.BILINEAR
    large = np.stack([np.asarray(image.resize(size, how)) for image in images])[..., None]
    grey = DARKENED * (frames @ np.array([0.299, 0.587, 0.114]))[..., None]
    cover = LEAST_COVER + (MOST_COVER - LEAST_COVER) * np.clip(large, 0, 1)
    return np.rint(grey + cover * (colours(large[..., 0]) - grey)).astype(np.uint8)


def mark(frames: Frames, box: tuple[int, int, int, int], where: Sequence[int]) -> Frames:
    """Frames with the outline of the box (top, left, bottom, right) in those of `where`."""
    frames = frames.copy()
    top, left, bottom, right = box
    line = max(1, (bottom - top) // 12)
    for i in where:
        inside = frames[i, top + line : bottom - line, left + line : right - line].copy()
        frames[i, top:bottom, left:right] = MARK
        frames[i, top + line : bottom - line, left + line : right - line] = inside
    return frames


@dataclasses.dataclass(frozen=True)
class AttentionFooter:
    """The colour bar and the plot over time, below the frames of `Panels`.

    `weights` are multiples of uniform attention, one for each tubelet of `tubelet` frames; `ticks`
    name the frames.
    """

    top: float  # of the colours
    cut: bool  # whether some tokens lie above
    weights: Float[np.ndarray, " t"]
    tubelet: int
    ticks: Sequence[str]  # of frames: number, seconds
    axis: str  # what the ticks are

    @property
    def height(self) -> int:
        """Pixels that it takes."""
        lines = max(tick.count("\n") for tick in self.ticks) + 1
        return 36 + BAR_HEIGHT + 72 + PLOT_HEIGHT + SMALL_STEP * (lines + 2) + MARGIN

    def draw(self, figure: "Figure", top: int) -> Highlight:
        """Draw from `top` pixels below the figure's upper edge."""
        width, height = (round(DPI * inches) for inches in figure.get_size_inches())

        def axes(left: int, top: int, right: int, bottom: int) -> "Axes":
            sides = (right - left) / width, (bottom - top) / height
            made = figure.add_axes((left / width, 1 - bottom / height, *sides))
            made.tick_params(labelsize=points(SMALL), labelcolor=INK, color=INK)
            return made

        bar = top + 36
        self._bar(axes(MARGIN, bar, MARGIN + BAR_WIDTH, bar + BAR_HEIGHT))
        plot = bar + BAR_HEIGHT + 72
        highest = f"{self.weights.max():.3g}"
        left = MARGIN + text_width(SMALL, "1", highest) + 8
        return self._plot(axes(left, plot, width - MARGIN, plot + PLOT_HEIGHT), highest)

    def _bar(self, axes: "Axes") -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        mapped = ScalarMappable(Normalize(0, self.top), COLOURS)
        extend = "max" if self.cut else "neither"
        axes.figure.colorbar(mapped, cax=axes, orientation="horizontal", extend=extend)
        title = "Attention to a token, as a multiple of uniform (1 = the same to every token)"
        axes.set_title(title, fontsize=points(PLAIN), loc="left")

    def _plot(self, axes: "Axes", highest: str) -> Highlight:
        frames, most = len(self.ticks), float(self.weights.max())
        limit = max(1.25, 1.1 * most)
        starts = np.arange(len(self.weights)) * self.tubelet
        axes.bar(starts, self.weights, self.tubelet, color=REST, align="edge")
        axes.vlines(starts[1:], 0, np.maximum(self.weights[1:], self.weights[:-1]), "w", lw=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlim=(0, frames), ylim=(0, limit))
        apart = abs(most - 1) / limit * PLOT_HEIGHT >= SMALL_STEP  # or one would hide the other
        axes.set_yticks([0, 1, most] if apart else [0, 1], ["0", "1", highest][: 2 + apart])
        axes.tick_params(axis="y", length=0)
        title = "Attention over time: mean of the tokens of a time step, as a multiple of uniform"
        axes.set_title(title, fontsize=points(PLAIN), loc="left")
        axes.set_xlabel(f"{self.axis}; dark: shown above", fontsize=points(SMALL), color=FAINT)
        # The first frame of every tubelet, or of every so many where there is no room.
        room = (text_width(SMALL, *self.ticks) + 10) / (axes.bbox.width / frames)
        each = self.tubelet * max(1, math.ceil(room / self.tubelet))
        places = range(0, frames, each)
        axes.set_xticks([i + 0.5 for i in places], [self.ticks[i] for i in places])

        def highlight(shown: Sequence[int]) -> "list[Artist]":
            above = self.weights[np.asarray(shown) // self.tubelet]
            marked = [*axes.bar(shown, above, 1, color=BAR, align="edge")]
            if len(shown) < frames:
                marked += axes.bar(shown, limit - above, 1, above, color=SHADE, align="edge")
            return [*marked, axes.axhline(1, color=INK, linestyle="--", linewidth=1)]

        return highlight

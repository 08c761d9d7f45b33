# SPDX-License-Identifier: Apache-2.0
"""Figures of `Outcomes`: the confusion matrix, and how sure and how right the answers are."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vivit_jax.train.outcomes import BINS, Outcomes
from vivit_jax.train.pages.chart import COLOURS, INK, captioned, picture, shortened

_NUMBERED, _NAMED, _WORST = 20, 40, 20  # classes: with counts in the cells, with names, drawn apart
_LETTERS = 26  # of a class name
_RIGHT, _WRONG = COLOURS[2], COLOURS[1]
_FAINTEST = 0.3  # of a colour, for one clip of many


def confusion_figure(found: Outcomes) -> str:
    """The confusion matrix as a <figure>; of many classes without names, and the worst apart."""
    matrix, names = found.confusion_matrix(), found.classes
    title = f"Confusion matrix{' of ' + found.head if found.head else ''}"
    note = "Rows: true classes. Columns: answers. Colour: share of the row"
    if len(names) <= _NAMED:
        return _matrix_figure(title, matrix, names, f"{note}.")
    whole = _matrix_figure(title, matrix, None, f"{note}; classes by number.")
    worst = sorted(_worst_classes(found))
    if len(worst) < 2:
        return whole
    part = matrix[np.ix_(worst, worst)]
    title = f"The {len(worst)} most confused classes{' of ' + found.head if found.head else ''}"
    note += f" among these; {int(matrix[worst].sum() - part.sum()):,} clips got other answers."
    return whole + _matrix_figure(title, part, [names[i] for i in worst], note)


def _worst_classes(found: Outcomes) -> list[int]:
    """The classes of the most frequent wrong answers."""
    chosen: dict[int, None] = {}
    for each in found.confusions():
        pair = {each.label: None, each.answer: None}
        if len(chosen | pair) > _WORST:
            break
        chosen |= pair
    return [*chosen]


def _matrix_figure(title: str, matrix: Int[np.ndarray, "n n"], names, note: str) -> str:
    count = len(matrix)
    named = names is not None
    side = 6.0 if not named else max(1.6, min(0.36 * count, 8.0)) if count > 8 else 0.55 * count
    labels = [shortened(name, _LETTERS) for name in names] if named else []
    room = 0.08 * max(map(len, labels)) + 0.7 if named else 0.7
    size = side + room, side + room

    def draw(drawing: Any) -> None:
        axes = drawing.subplots()
        # One pixel of the image for each cell: a path for each would take megabytes.
        axes.imshow(_colours(matrix), interpolation="none", aspect="equal")
        axes.grid(False)
        axes.spines[:].set_visible(True)
        axes.set(xlabel="answer", ylabel="true class")
        if named:
            small = 9 if count <= 12 else 7
            axes.set_xticks(range(count), labels, rotation=90, fontsize=small)
            axes.set_yticks(range(count), labels, fontsize=small)
        if count <= _NUMBERED:
            _write_counts(axes, matrix)

    return captioned(title, note, picture(title, size, draw), width=round(100 * size[0]))


def _write_counts(axes: Any, matrix: Int[np.ndarray, "n n"]) -> None:
    strength = _strength(matrix)
    for row, column in np.argwhere(matrix).tolist():
        value = int(matrix[row, column])
        colour = "#ffffff" if strength[row, column] > 0.6 else INK
        small = 9 if value < 1000 and len(matrix) <= 12 else 7
        axes.text(column, row, f"{value}", ha="center", va="center", color=colour, fontsize=small)


def _strength(matrix: Int[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """How much of its colour a cell has: 0 without clips, 1 for all of the row."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    return np.where(matrix > 0, _FAINTEST + (1 - _FAINTEST) * share, 0)


def _colours(matrix: Int[np.ndarray, "n n"]) -> Float[np.ndarray, "n n 4"]:
    """Right answers in green, wrong ones in orange, on the page."""
    from matplotlib.colors import to_rgb

    image = np.zeros((*matrix.shape, 4))
    image[..., :3] = to_rgb(_WRONG)
    image[np.arange(len(matrix)), np.arange(len(matrix)), :3] = to_rgb(_RIGHT)
    image[..., 3] = _strength(matrix)
    return image


def calibration_figure(found: Outcomes) -> str:
    """How right answers of each confidence are, and how many there are, as a <figure>."""
    error, bins = found.calibration()
    filled = [each for each in bins if each.clips]
    if not filled:
        return ""
    title = f"Confidence{' of ' + found.head if found.head else ''}"

    def draw(drawing: Any) -> None:
        above, below = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        edges = [each.low for each in bins]
        width = 1 / len(bins)
        shares = [each.accuracy if each.clips else 0 for each in bins]
        above.bar(edges, shares, width, align="edge", color=COLOURS[0], alpha=0.8, lw=0)
        above.plot([0, 1], [0, 1], "--", color=INK, lw=1)
        above.plot(
            [e.confidence for e in filled], [e.accuracy for e in filled], "o", color=COLOURS[0]
        )
        above.set(ylabel="right", ylim=(0, 1.02), xlim=(0, 1))
        right = [round(each.clips * share) for each, share in zip(bins, shares, strict=True)]
        wrong = [each.clips - r for each, r in zip(bins, right, strict=True)]
        below.bar(edges, right, width, align="edge", color=_RIGHT, lw=0)
        below.bar(edges, wrong, width, bottom=right, align="edge", color=_WRONG, lw=0)
        below.set(ylabel="clips", xlabel="confidence: probability of the answer")
        below.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        for axis in (above.yaxis, below.xaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")

    note = (
        f"Above: the share of right answers of each confidence; the dashed line is perfect "
        f"calibration. Expected calibration error of {BINS} bins: {error:.1%}. Below: right "
        "answers (green) and wrong ones (orange)."
    )
    return captioned(title, note, picture(title, (5.2, 4.2), draw), width=560)

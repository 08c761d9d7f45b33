# SPDX-License-Identifier: Apache-2.0
"""Curves over steps as inline SVG figures."""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

_LISTED = 6  # steps in a note
_VALUES = 1000  # of a curve that are all drawn; of more, the extremes of half as many stretches
_DOTS = 60  # values that get a dot each, which tells its value
_SMOOTHED = 100  # values from which on their running mean is drawn too

# Of a chart, in its own units: all of it, and the frame that the curves are in.
_WIDTH, _HEIGHT = 520, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 490, 12, 226


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values [n], some of which may not be finite, at steps [n], which do not fall."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    dotted: bool = False  # a dot for each value, even where they are many
    noisy: bool = True  # a running mean is drawn too, where values are many


def figure(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    first: float,
    last: float,
    share: bool = False,
    from_zero: bool = False,
) -> str:
    """A chart with axes, legend and notes as a <figure>.

    `first` and `last` are the steps at the ends of the x axis. `share`: values are parts of 1,
    labelled in per cent; `from_zero`: the y axis includes 0. The page's style is to have
    CHART_STYLE and the colours --line, --dim and --c0 to --c5.
    """
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    legend, notes, drawn = "", [], ""
    finite = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    if from_zero:
        finite = np.append(finite, 0.0)
    x_range = (first, last) if last > first else (first - 1, first + 1)
    y_range = _range(finite)
    for i, curve in enumerate(curves):
        x, y = _across(curve.steps, x_range), _up(curve.values, y_range)
        drawn += f'<g class="c{i % 6}">{_drawn(curve, x, y, share)}</g>'
        legend += f'<span><i class="c{i % 6}"></i>{escape(curve.label)}</span>'
        notes += _notes(curve)
    note = f"<p>{escape('. '.join(notes))}.</p>" if notes else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{unit}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_axes(x_range, y_range, share)}{drawn}</svg>"
        f'<div class="legend">{legend}</div>{note}</figure>'
    )


def escape(text: str) -> str:
    """Text for a page; characters that no page may hold are replaced."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))


def _notes(curve: Curve) -> list[str]:
    notes = []
    odd = [f"{step:,.0f}" for step in curve.steps[~np.isfinite(curve.values)]]
    if odd:
        more = ", ..." if len(odd) > _LISTED else ""
        at = ", ".join(odd[:_LISTED]) + more
        values = "values are" if len(odd) > 1 else "value is"
        notes.append(f"{len(odd):,} {values} not finite ({curve.label}, step {at})")
    if len(curve.values) > _VALUES:
        notes.append(
            f"Thinned: of {len(curve.values):,} values ({curve.label}) the lowest and the highest "
            f"of each of {_VALUES // 2} stretches are drawn"
        )
    if _has_mean(curve):
        notes.append(f"Bold: mean of {_window(curve):,} values ({curve.label})")
    return notes


def _has_dots(curve: Curve) -> bool:
    return len(curve.values) <= (_VALUES if curve.dotted else _DOTS)


def _has_mean(curve: Curve) -> bool:
    return curve.noisy and not _has_dots(curve) and len(curve.values) >= _SMOOTHED


def _window(curve: Curve) -> int:
    return len(curve.values) // 100 * 2 + 1


def _drawn(curve: Curve, x: np.ndarray, y: np.ndarray, share: bool) -> str:
    """The marks of a curve whose values lie at x, y of the chart."""
    if _has_dots(curve):
        rows = zip(x, y, curve.steps, curve.values, strict=True)
        dots = "".join(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.5"><title>step {step:,.0f}: '
            f"{_label(value, share)}</title></circle>"
            for cx, cy, step, value in rows
            if math.isfinite(cy)
        )
        return f'<path d="{_path(x, y)}"/>{dots}'
    thin = _path(*_thinned(x, y))
    if not _has_mean(curve):
        return f'<path d="{thin}"/>'
    return f'<path class="faint" d="{thin}"/><path d="{_path(*_smoothed(x, y, _window(curve)))}"/>'


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_VALUES` points: the extremes of equal stretches, a gap where none is finite."""
    if len(x) <= _VALUES:
        return x, y
    chosen = []
    for stretch in np.array_split(np.arange(len(x)), _VALUES // 2):
        finite = stretch[np.isfinite(y[stretch])]
        ends = {finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]} if len(finite) else {}
        chosen += sorted(ends) or [stretch[0]]
    return x[chosen], y[chosen]


def _smoothed(x: np.ndarray, y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of the finite values around each point, at no more than 300 points."""
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centres = np.unique(np.linspace(0, len(x) - 1, 300).round().astype(int))
    low, high = np.maximum(centres - window // 2, 0), np.minimum(centres + window // 2 + 1, len(x))
    count = counts[high] - counts[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return x[centres], (sums[high] - sums[low]) / np.where(count, count, np.nan)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Lines through the points, with gaps where y is not finite; a lone point is a dot."""
    parts, pen = [], "M"
    for px, py in zip(x, y, strict=True):
        if not math.isfinite(py):
            pen = "M"
            continue
        parts.append(f"{pen}{px:.1f} {py:.1f}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(parts)


def _across(steps: np.ndarray, x_range: tuple[float, float]) -> np.ndarray:
    return _LEFT + (steps - x_range[0]) / (x_range[1] - x_range[0]) * (_RIGHT - _LEFT)


def _up(values: np.ndarray, y_range: tuple[float, float]) -> np.ndarray:
    return _BOTTOM - (values - y_range[0]) / (y_range[1] - y_range[0]) * (_BOTTOM - _TOP)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest, apart from each other, with a margin but at 0."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if low == high == 0:
        return 0.0, 1.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return low - abs(low) / 2, high + abs(high) / 2
    room = (high - low) / 25
    return (low if low == 0 else low - room), (high if high == 0 else high + room)


def _ticks(low: float, high: float, most: int) -> np.ndarray:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return np.arange(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1) * apart


def _labels(values: Sequence[float], share: bool = False) -> list[str]:
    """Ticks as text, with as many digits as tell them apart."""
    for digits in range(3, 12):
        labels = [_label(value, share, digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _label(value: float, share: bool = False, digits: int = 4) -> str:
    if share:
        return f"{value * 100:.{digits}g}%"
    whole = abs(value) >= 1000 and abs(value - round(value)) < 1e-9 * abs(value)
    text = f"{value:,.0f}" if whole else f"{value:.{digits}g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _axes(x_range: tuple[float, float], y_range: tuple[float, float], share: bool) -> str:
    """Grid, tick labels and the name of the x axis."""
    marks = []
    ticks = _ticks(*y_range, most=6)
    for y, label in zip(_up(ticks, y_range), _labels(ticks, share), strict=True):
        marks.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    ticks = _ticks(*x_range, most=6)
    ticks = ticks[np.abs(ticks - ticks.round()) < 1e-6]
    for x, label in zip(_across(ticks, x_range), _labels(ticks), strict=True):
        marks.append(
            f'<path class="grid" d="M{x:.1f} {_BOTTOM}v4"/>'
            f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{label}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    return (
        f"{''.join(marks)}"
        f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>'
        f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">step</text>'
    )


CHART_STYLE = """
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: 8px; }
figcaption small, figure p { color: var(--dim); }
figure p { font-size: .8rem; margin: .3rem 0 0; }
svg { width: 100%; display: block; }
svg text { font-size: 12px; fill: var(--dim); }
svg path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round;
  stroke-linejoin: round; }
svg circle { fill: currentColor; }
svg .faint { stroke-width: 1; opacity: .35; }
svg .grid, svg .axis { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--dim); }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.legend i { display: inline-block; width: 1.1em; height: 3px; margin-right: .4em;
  vertical-align: middle; background: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
"""

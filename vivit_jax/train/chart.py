# SPDX-License-Identifier: Apache-2.0
"""Curves over steps as inline SVG figures, drawn by matplotlib."""

import dataclasses
import html
import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float

_LISTED = 6  # steps in a note
_DOTS, _DOTTED = 60, 1000  # curves of at most as many values get a dot for each
_SMOOTHED = 100  # a curve of at least as many values gets its running mean

# What is drawn in the colours of a light page follows the page's own, which may be dark.
_INK, _GRID = "#5f6670", "#dfe2e6"
_COLOURS = ("#1f6fc4", "#c4500a", "#1a7f4b", "#9a3fb5", "#a37800", "#c02c5e")
_VARIABLES = {_INK: "var(--dim)", _GRID: "var(--line)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(_COLOURS)
}
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.color": _GRID,
    "lines.markersize": 4,
    "path.simplify_threshold": 1.0,  # long curves keep their shape and extremes to a pixel
    "svg.fonttype": "none",  # text stays text
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_METADATA = ("Date", "Creator", "Format", "Type")  # left out: the same page for the same metrics


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values [n] at non-decreasing steps [n]; values that are not finite leave a gap."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    dotted: bool = False  # a dot for each value, unless there are very many
    noisy: bool = True  # long curves get a running mean


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
    labelled in per cent; `from_zero`: the y axis includes 0. The page's style needs CHART_STYLE
    and the colours --line, --dim and --c0 to --c5.
    """
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    legend = "".join(
        f'<span><i class="c{i % len(_COLOURS)}"></i>{escape(curve.label)}</span>'
        for i, curve in enumerate(curves)
    )
    notes = [note for curve in curves for note in _notes(curve)]
    svg = _drawn(curves, (first, last), share, from_zero, salt=_printable(title))
    note = f"<p>{escape('. '.join(notes))}.</p>" if notes else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{unit}</figcaption>"
        f"{_inline(svg, title, curves, share)}"
        f'<div class="legend">{legend}</div>{note}</figure>'
    )


def escape(text: str) -> str:
    """Text for a page; characters that no page may hold are replaced."""
    return html.escape(_printable(text))


def _printable(text: str) -> str:
    """Text with characters that XML may not hold replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _notes(curve: Curve) -> list[str]:
    notes = []
    odd = [f"{step:,.0f}" for step in curve.steps[~np.isfinite(curve.values)]]
    if odd:
        at = ", ".join(odd[:_LISTED]) + (", ..." if len(odd) > _LISTED else "")
        values = "values are" if len(odd) > 1 else "value is"
        notes.append(f"{len(odd):,} {values} not finite ({curve.label}, step {at})")
    if _has_mean(curve):
        notes.append(f"Bold: mean of {_window(curve):,} values ({curve.label})")
    return notes


def _has_dots(curve: Curve) -> bool:
    return len(curve.values) <= (_DOTTED if curve.dotted else _DOTS)


def _has_mean(curve: Curve) -> bool:
    return curve.noisy and not _has_dots(curve) and len(curve.values) >= _SMOOTHED


def _window(curve: Curve) -> int:
    return len(curve.values) // 100 * 2 + 1


def _running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Means of the finite values at most window // 2 away, NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centres = np.arange(len(values))
    low = np.maximum(centres - window // 2, 0)
    high = np.minimum(centres + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count, sums[high] - sums[low], np.nan) / np.maximum(count, 1)


def _drawn(
    curves: Sequence[Curve], ends: tuple[float, float], share: bool, from_zero: bool, salt: str
) -> str:
    """The curves and their axes as matplotlib's SVG file; curve i has the id "curve<i>"."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    first, last = ends
    style: dict[Any, Any] = _STYLE | {"svg.hashsalt": salt}
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style):  # whatever the user's own is
        drawing = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = drawing.subplots()
        for i, curve in enumerate(curves):
            values = np.where(np.isfinite(curve.values), curve.values, np.nan)
            lines = axes.plot(curve.steps, values, marker="o" if _has_dots(curve) else "")
            if _has_mean(curve):
                lines[0].set(alpha=0.35, linewidth=0.8)
                lines += axes.plot(curve.steps, _running_mean(values, _window(curve)))
            for line in lines:
                line.set(color=_COLOURS[i % len(_COLOURS)], gid=f"curve{i}", clip_on=False)
                line.sticky_edges.y.append(0.0)  # no margin below an axis that begins at 0
        if from_zero:
            axes.update_datalim([(first, 0.0)])
        axes.autoscale_view()
        axes.set_xlim((first, last) if last > first else (first - 1, first + 1))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.6g}%")
        file = io.StringIO()
        drawing.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA, None)
        )
    return file.getvalue()


def _inline(svg: str, title: str, curves: Sequence[Curve], share: bool) -> str:
    """An SVG file as part of a page: no namespaces, the page's colours, a tooltip at each dot.

    Only ids that the drawing refers to stay, since a page may hold each id once.
    """
    used = set(re.findall(r"#(\w+)", svg))
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if "}" in name]:
            element.set(name.rpartition("}")[2], element.attrib.pop(name))
        if element.get("id", "").startswith("curve"):
            element.set("class", element.attrib.pop("id"))
        elif element.get("id") not in used:
            element.attrib.pop("id", None)
    for i, curve in enumerate(curves):
        finite = np.isfinite(curve.values)
        dots = list(root.iterfind(f".//g[@class='curve{i}']//use"))
        points = zip(curve.steps[finite], curve.values[finite], strict=True)
        for dot, (step, value) in zip(dots, points if dots else (), strict=True):
            number = f"{value * 100:.4g}%" if share else f"{value:.4g}"
            ElementTree.SubElement(dot, "title").text = f"step {step:,.0f}: {number}"
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": _printable(title),
    }
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


CHART_STYLE = """
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: 8px; }
figcaption small, figure p { color: var(--dim); }
figure p { font-size: .8rem; margin: .3rem 0 0; }
svg { width: 100%; display: block; }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.legend i { display: inline-block; width: 1.1em; height: 3px; margin-right: .4em;
  vertical-align: middle; background: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
"""

# SPDX-License-Identifier: Apache-2.0
"""Figures for a page as inline SVG, drawn by matplotlib: curves over steps, and others."""

import dataclasses
import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float

_LISTED = 6  # steps in a note
_DOTS, _DOTTED = 60, 1000  # curves of at most as many values get a dot for each
_SMOOTHED = 100  # a curve of at least as many values gets its running mean

# What is drawn in the colours of a light page follows the page's own, which may be dark.
INK, _DIM, _GRID = "#1c1e21", "#5f6670", "#dfe2e6"
COLOURS = ("#1f6fc4", "#c4500a", "#1a7f4b", "#9a3fb5", "#a37800", "#c02c5e")
_VARIABLES = {INK: "var(--ink)", _DIM: "var(--dim)", _GRID: "var(--line)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)
}
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _DIM,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _DIM,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.color": _GRID,
    "lines.markersize": 4,
    "text.parse_math": False,
    "path.simplify_threshold": 1.0,  # long curves keep their shape and extremes to a pixel
    "svg.fonttype": "none",  # text stays text
    "xtick.color": _DIM,
    "ytick.color": _DIM,
}
_DPI = 150  # of a PNG file
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
    marked: float | None = None,
) -> str:
    """A chart with axes, legend and notes as a <figure>.

    `first` and `last` are the steps at the ends of the x axis. `share`: values are parts of 1,
    labelled in per cent; `from_zero`: the y axis includes 0; `marked`: a step with a line across.
    The page's style needs CHART_STYLE and the colours --ink, --line, --dim and --c0 to --c5.
    """
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    legend = "".join(
        f'<span><i class="c{i % len(COLOURS)}"></i>{escape(curve.label)}</span>'
        for i, curve in enumerate(curves)
    )
    if marked is not None:
        legend += f'<span class="marked">best step {marked:,.0f}</span>'
    notes = [note for curve in curves for note in _notes(curve)]

    def draw(drawing: Any) -> None:
        _draw_curves(drawing.subplots(), curves, (first, last), share, from_zero)
        if marked is not None:
            drawing.axes[0].axvline(marked, color=_DIM, linestyle="--", linewidth=1, zorder=0)

    svg = picture(title, (5.2, 2.7), draw, lambda root: _add_tooltips(root, curves, share))
    note = f"<p>{escape('. '.join(notes))}.</p>" if notes else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{unit}</figcaption>"
        f"{svg}"
        f'<div class="legend">{legend}</div>{note}</figure>'
    )


def captioned(title: str, note: str, svg: str, width: int) -> str:
    """A picture with its title and a note as a <figure>, at most `width` pixels wide."""
    return (
        f'<figure style="max-width: {width}px"><figcaption><b>{escape(title)}</b></figcaption>'
        f"{svg}<p>{escape(note)}</p></figure>"
    )


def picture(
    title: str,
    size: tuple[float, float],
    draw: Callable[[Any], None],
    finish: Callable[[ElementTree.Element], None] = lambda root: None,
) -> str:
    """What `draw` draws on a matplotlib figure of `size` inches, as SVG in the page's colours.

    `title` is the picture's name, unique on its page. `finish` may change the SVG's elements.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = _STYLE | {"svg.hashsalt": _printable(title)}
    file = io.StringIO()
    # Whatever the user's own style is. Text stays text, for which the reader's fonts have letters.
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        drawing = Figure(figsize=size, layout="constrained")
        draw(drawing)
        drawing.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA, None)
        )
    return _inline(file.getvalue(), title, finish)


def shortened(text: str, letters: int) -> str:
    """A text of at most so many letters: without its middle, as the ends of names differ too."""
    text = _printable(text).replace("\n", " ")
    half = (letters - 1) // 2
    return text if len(text) <= letters else f"{text[:half]}\u2026{text[-half:]}"


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


def _draw_curves(
    axes: Any, curves: Sequence[Curve], ends: tuple[float, float], share: bool, from_zero: bool
) -> None:
    """Draw the curves, with the id "curve<i>" for curve i, and label the axes."""
    from matplotlib.ticker import MaxNLocator

    first, last = ends
    for i, curve in enumerate(curves):
        values = np.where(np.isfinite(curve.values), curve.values, np.nan)
        lines = axes.plot(curve.steps, values, marker="o" if _has_dots(curve) else "")
        if _has_mean(curve):
            lines[0].set(alpha=0.35, linewidth=0.8)
            lines += axes.plot(curve.steps, _running_mean(values, _window(curve)))
        for line in lines:
            line.set(color=COLOURS[i % len(COLOURS)], gid=f"curve{i}", clip_on=False)
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


def _add_tooltips(root: ElementTree.Element, curves: Sequence[Curve], share: bool) -> None:
    """Give each dot a tooltip."""
    for i, curve in enumerate(curves):
        finite = np.isfinite(curve.values)
        dots = list(root.iterfind(f".//g[@class='curve{i}']//use"))
        points = zip(curve.steps[finite], curve.values[finite], strict=True)
        for dot, (step, value) in zip(dots, points if dots else (), strict=True):
            number = f"{value * 100:.4g}%" if share else f"{value:.4g}"
            ElementTree.SubElement(dot, "title").text = f"step {step:,.0f}: {number}"


def _inline(svg: str, title: str, finish: Callable[[ElementTree.Element], None]) -> str:
    """An SVG file as part of a page: no namespaces, and the page's colours.

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
    finish(root)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": _printable(title),
    }
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def save_png(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Write what `draw` draws on a matplotlib figure of `size` inches as a PNG file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault | _STYLE):  # whatever the user's own is
        drawing = Figure(figsize=size, dpi=_DPI, layout="constrained")
        draw(drawing)
        drawing.savefig(path, format="png")


CHART_STYLE = """
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: 8px; }
figcaption small, figure p { color: var(--dim); }
figure p { font-size: .8rem; margin: .3rem 0 0; }
svg { width: 100%; display: block; }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.legend i { display: inline-block; width: 1.1em; height: 3px; margin-right: .4em;
  vertical-align: middle; background: currentColor; }
.legend .marked { color: var(--dim); }
.legend .marked::before { content: "- - "; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
"""

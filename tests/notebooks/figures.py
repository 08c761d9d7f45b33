# SPDX-License-Identifier: Apache-2.0
"""Whether a picture says what it shows: a title, names on its axes, a bar for its colours.

Kernels of the tests import this when they start, and look at every figure when it is drawn.
"""

import functools

# Whose colours are brightness, as of a photograph.
_GREYS = ("gray", "grey", "Greys", "binary")


def problems(figure) -> list[str]:
    """What a matplotlib figure leaves open, a line each."""
    figure.canvas.draw()  # by which ticks have their texts
    bars = [axes for axes in figure.axes if hasattr(axes, "_colorbar")]
    panels = [axes for axes in figure.axes if axes not in bars and axes.has_data()]
    found = []
    if not figure.get_suptitle() and not any(_title(axes) for axes in panels):
        found.append("there is no title")
    shown = [each for axes in panels for each in (*axes.images, *axes.collections)]
    if any(map(_by_colour, shown)) and not bars:
        found.append("numbers are shown as colours without a colour bar")
    for bar in bars:
        if not (_named(bar, "x") or _named(bar, "y") or bar.get_title()):
            found.append("a colour bar does not say what it measures")
    for axes in panels:
        if axes.images or not axes.axison:
            continue
        for way, line in (("x", "colspan"), ("y", "rowspan")):
            # Of a row of panels one names the y axis, and of a column the x axis.
            row = [other for other in panels if _place(other, line) == _place(axes, line)]
            ticks = getattr(axes, f"get_{way}ticklabels")()  # without any there is nothing to name
            if ticks and not any(_named(other, way) for other in (axes, *row)):
                found.append(f"the {way} axis of {_title(axes) or 'a plot'!r} has no name")
    return found


def _place(axes, line: str) -> list[int]:
    return list(getattr(axes.get_subplotspec(), line, ()))


def _title(axes) -> str:
    return "".join(axes.get_title(loc) for loc in ("left", "center", "right"))


def _by_colour(shown) -> bool:
    values = shown.get_array()
    return values is not None and values.ndim <= 2 and shown.get_cmap().name not in _GREYS


def _named(axes, way: str) -> bool:
    axis = getattr(axes, f"{way}axis")
    # Powers of ten are formulas, between dollars.
    texts = [label.get_text() for label in axis.get_ticklabels()]
    names = [text for text in texts if "$" not in text and any(map(str.isalpha, text))]
    return bool(axis.get_label_text() or names)


def watch() -> None:
    """Fail a cell that draws a figure with problems; for a kernel that starts."""
    from IPython import get_ipython
    from matplotlib.backend_bases import FigureCanvasBase

    drawn, found = FigureCanvasBase.print_figure, []

    @functools.wraps(drawn)
    def print_figure(self, *args, **how):
        if self.manager is not None:  # pyplot's; a run's report draws figures of its own
            found.extend(problems(self.figure))
        return drawn(self, *args, **how)

    def tell():
        told = "; ".join(found)
        found.clear()
        assert not told, f"a picture does not say what it shows: {told}"

    FigureCanvasBase.print_figure = print_figure
    # A figure without plt.show() is drawn by a later callback of the same event, and reported when
    # the next cell begins.
    for event in ("post_execute", "pre_execute"):
        get_ipython().events.register(event, tell)

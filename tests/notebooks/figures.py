# SPDX-License-Identifier: Apache-2.0
"""Whether a picture says what it shows: a title, names on its axes, a bar for its colours.

Kernels of the tests import this when they start, and look at every figure before it is drawn.
"""

import sys

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
    coloured = [i for axes in panels for i in axes.images if _by_colour(i)]
    if coloured and not bars:
        found.append("numbers are shown as colours without a colour bar")
    for bar in bars:
        if not (bar.get_xlabel() or bar.get_ylabel() or bar.get_title()):
            found.append("a colour bar does not say what it measures")
    for axes in panels:
        if axes.images or not axes.axison:
            continue
        for way in ("x", "y"):
            together = getattr(axes, f"get_shared_{way}_axes")().get_siblings(axes)
            if not any(_named(other, way) for other in together):
                found.append(f"the {way} axis of {_title(axes) or 'a plot'!r} has no name")
    return found


def _title(axes) -> str:
    return "".join(axes.get_title(loc) for loc in ("left", "center", "right"))


def _by_colour(image) -> bool:
    return image.get_array().ndim == 2 and image.get_cmap().name not in _GREYS


def _named(axes, way: str) -> bool:
    axis = getattr(axes, f"{way}axis")
    texts = [label.get_text() for label in axis.get_ticklabels()]
    return bool(axis.get_label_text()) or any(any(map(str.isalpha, text)) for text in texts)


def watch() -> None:
    """Fail a cell's callbacks, which is seen in its output, where it draws a figure with problems.

    For a kernel that starts: the callback comes before the one that shows figures and closes them.
    """
    from IPython import get_ipython

    get_ipython().events.register("post_execute", _look)


def _look() -> None:
    if "matplotlib.pyplot" not in sys.modules:
        return
    import matplotlib.pyplot as plt

    for number in plt.get_fignums():
        assert not (found := problems(plt.figure(number))), f"figure {number}: {'; '.join(found)}"

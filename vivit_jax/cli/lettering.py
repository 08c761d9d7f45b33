# SPDX-License-Identifier: Apache-2.0
"""The letters of pictures: fonts that have them, and the room that they take.

A letter that matplotlib's own font lacks, as Chinese ones, is drawn by the first font on this
machine that has it. One that none has is escaped, so that no picture shows empty boxes.
"""

import contextlib
import functools
import math
import textwrap

FONT = "DejaVu Sans"  # matplotlib brings it along
DPI = 64  # a power of two: sizes in pixels stay whole numbers
_NO_LETTERS = ("Last Resort", "Adobe Blank")  # have a box, or nothing, for every letter


def points(pixels: int) -> float:
    """A font size as matplotlib counts it."""
    return 72 * pixels / DPI


def text_width(size: int, *texts: str) -> int:
    """Pixels that the longest line takes in letters of `size` pixels."""
    lines = (drawable(line) for text in texts for line in text.split("\n"))
    return math.ceil(max(_measured(line, size) for line in lines))


def wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines no wider than `width`, broken between words, and inside a word that is longer."""
    text = drawable(text)
    for letters in range(2 * width // size, 1, -1):
        lines = textwrap.wrap(text, letters) or [""]
        if text_width(size, *lines) <= width:
            return lines
    return list(text)


def drawable(text: str) -> str:
    r"""The text with letters that no font has escaped as in Python: \xf6; newlines stay."""
    return "".join(
        letter if letter == "\n" or _font_of(letter) else letter.encode("unicode_escape").decode()
        for letter in text
    )


def families(text: str) -> list[str]:
    """The names of the fonts for the letters of a `drawable` text, as matplotlib takes them."""
    others = (found for letter in text if (found := _font_of(letter)) is not None)
    return list(dict.fromkeys([FONT, *(name for name, _ in others)]))


def one_font(text: str) -> tuple[str, str]:
    """The text for a drawer that takes one font, and the file of the font that has its letters.

    Where no font has all of them, those that matplotlib's lacks are escaped.
    """
    text, main = drawable(text), _main()[1]
    found = (_font_of(letter) for letter in text)
    for path in dict.fromkeys([main, *(each[1] for each in found if each is not None)]):
        if all(ord(letter) in _letters(path) for letter in text):
            return text, path
    known = _letters(main)
    escaped = (c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped), main


@functools.cache
def _main() -> tuple[str, str]:
    """The name and the file of the usual font."""
    from matplotlib.font_manager import FontProperties, findfont

    return FONT, str(findfont(FontProperties(family=FONT)))


@functools.cache
def _font_of(letter: str) -> tuple[str, str] | None:
    """The name and the file of the first font that has a letter, None if none has it."""
    if not letter.isprintable():
        return None
    return next((f for f in (_main(), *_others()) if ord(letter) in _letters(f[1])), None)


@functools.cache
def _others() -> tuple[tuple[str, str], ...]:
    """The upright fonts of usual weight on this machine, those without serifs first."""
    from matplotlib.font_manager import fontManager

    found: dict[str, str] = {}
    for font in fontManager.ttflist:
        usual = font.style == "normal" and font.weight in (400, "normal", "regular")
        if usual and not font.name.startswith(_NO_LETTERS):
            found.setdefault(font.name, font.fname)
    return tuple(sorted(found.items(), key=lambda f: ("Sans" not in f[0], "Mono" in f[0], f[0])))


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """The code points that a font has; none if it cannot be drawn at any size."""
    from matplotlib.font_manager import get_font

    with contextlib.suppress(OSError, RuntimeError):
        font = get_font(path)
        if font.scalable:
            return frozenset(font.get_charmap())
    return frozenset()


def _measured(line: str, size: int) -> float:
    """Pixels that a drawable line takes."""
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family=families(line), size=points(size))
    return _renderer().get_text_width_height_descent(line, font, ismath=False)[0]


@functools.cache
def _renderer():
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, DPI)

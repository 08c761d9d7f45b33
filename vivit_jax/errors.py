# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on: each states the field, what was got, what was expected, the way out.

The command lines print these as one line and exit with status 2; anything else is a bug and keeps
its stack trace.
"""

import difflib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

# Characters that terminals act on or that mislead readers: control characters except tab and
# newline, marks that change the direction of text, and separators that some take for line ends.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_ANY_CONTROL = re.compile(rf"[\t\n]|{_CONTROL.pattern}")
_SHOWN = 200


class UserError(ValueError):
    """Base of every error that the caller's input caused."""


class ConfigError(UserError):
    """A model or processor configuration that is wrong or not supported."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the model tensor for tensor."""


class VideoError(UserError):
    """A video that cannot be opened, holds no video stream, or has too few frames."""


class WriteError(UserError):
    """A file that cannot be written, as on a full disk; what was there before is unchanged."""


class StorageError(UserError):
    """An object store or web server that cannot be reached, or does not permit what is asked."""


class MissingExtra(UserError, ImportError):
    """An optional dependency that is not installed; names the pip extra that has it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: {install(extra)}"
        )


def install(extra: str) -> str:
    """The command that installs an extra here.

    In a checkout that is what pip installed; elsewhere pip has the package under its name, and
    looks for nothing but the extra's packages on an index.
    """
    root = Path(__file__).parents[1]
    settings = root / "pyproject.toml"
    if not (settings.is_file() and 'name = "vivit_jax"' in settings.read_text(encoding="utf-8")):
        return f"{_pip()} install 'vivit_jax[{extra}]'"
    place = "." if os.path.samefile(root, os.curdir) else str(root)
    return f"{_pip()} install -e {shlex.quote(f'{place}[{extra}]')}"


def _pip() -> str:
    """The pip of this Python, as a shell in this directory finds it."""
    own = Path(sys.executable).with_name("pip.exe" if os.name == "nt" else "pip")
    found = shutil.which("pip")
    if not own.exists() or found is not None and Path(found).absolute() == own.absolute():
        return "pip"
    path = os.path.relpath(own)
    return shlex.quote(str(own) if path.startswith(os.pardir) else path)


def similar(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that are like this one, the closest first."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.65)


def closest(name: str, known: Iterable[str], short: bool = False) -> str:
    """The end of a message about an unknown name: similar names, and all known names.

    `short` omits the second if there is the first.
    """
    known = list(known)
    close = similar(name, known)
    meant = [f"did you mean {' or '.join(close)}?"] if close else []
    listed = [] if close and short else [f"known: {', '.join(known)}"]
    return f"; {' '.join(meant + listed)}"


def printable(text: str, one_line: bool = False) -> str:
    """A text with its control characters as \\u escapes, as JSON writes them.

    Labels, paths and libraries' messages may hold some, which a terminal would act on. Tabs and
    newlines stay, unless the text has to be one line.
    """
    pattern = _ANY_CONTROL if one_line else _CONTROL
    return pattern.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def quoted(text: object) -> str:
    """A user's input, for a message: on one line, without the middle if it is long."""
    shown = printable(str(text), one_line=True)
    half = _SHOWN // 2
    return shown if len(shown) <= _SHOWN else f"{shown[:half]}...{shown[-half:]}"


def counted(count: int, noun: str) -> str:
    """A number of things in words: "1 class", "2 classes", "1,000 epochs"."""
    plural = f"{noun}es" if noun.endswith(("s", "x", "sh", "tch")) else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def there_are(count: int, noun: str) -> str:
    """`counted` as a clause: "there is 1 frame", "there are 2 frames"."""
    return f"there {'is' if count == 1 else 'are'} {counted(count, noun)}"


def first_line(reason: BaseException | str) -> str:
    """The first line of a message, or the name of an error that has none."""
    return (str(reason).strip() or repr(reason)).splitlines()[0]

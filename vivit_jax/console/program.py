# SPDX-License-Identifier: Apache-2.0
"""A program: its commands, which are imported when they run, its help and its versions."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from vivit_jax.errors import closest, quoted
from vivit_jax.progress import bold

Command = Callable[..., int | None]
CACHE_FLAG = "--compilation-cache"
PRINT_COMPLETION, WRITE_COMPLETION = "--tyro-print-completion", "--tyro-write-completion"
_OPTIONS = {
    "--help": "show this, or the options of a command before it",
    "--version": "print the version",
    "--versions": "print the versions of Python, jax and other packages too",
    f"{CACHE_FLAG} DIR": "keep compiled programs here for later runs",
    f"{PRINT_COMPLETION} SHELL": "for bash, zsh, tcsh or fish",
}
# What a report of an error should name: jax and what computes, reads and writes beside it.
_PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy",
    "av", "pillow", "grain", "tyro", "huggingface_hub", "torch", "transformers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
    """A command line of several commands.

    A command is a function or its place, "package.module:function". `groups` are the titles of the
    help's sections, with the commands of each; those of no group come last.
    """

    name: str
    description: str
    commands: Mapping[str, Command | str]
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def imported(self, command: str) -> Command:
        """The function of a command."""
        found = self.commands[command]
        if not isinstance(found, str):
            return found
        module, _, function = found.partition(":")
        return getattr(importlib.import_module(module), function)

    def unknown(self, word: str) -> str:
        """An error message on a first argument that is neither a command nor an option."""
        if word.startswith("-"):
            options = [option.split()[0] for option in _OPTIONS]
            return f"there is no option {quoted(word)}{closest(word, options)}"
        return f"there is no command {quoted(word)}{closest(word, self.commands, short=True)}"

    def help(self) -> str:
        """What the program does, a line for each command, and its options."""
        sections = {title: {n: self._summary(n) for n in names} for title, names in self._grouped()}
        sections["Options"] = _OPTIONS
        names = max(map(len, self.commands))
        lines = [f"usage: {self.name} COMMAND [OPTIONS]", "", self.description]
        for title, section in sections.items():
            width = max(map(len, section)) if section is _OPTIONS else names
            lines += ["", bold(f"{title}:")]
            lines += [f"  {bold(name.ljust(width))}  {text}" for name, text in section.items()]
        return "\n".join(lines)

    def _grouped(self) -> Iterator[tuple[str, list[str]]]:
        rest = list(self.commands)
        for title, names in self.groups.items():
            there = [name for name in names if name in rest]
            if there:
                yield title, there
            rest = [name for name in rest if name not in names]
        if rest:
            yield ("More" if self.groups else "Commands"), rest

    def _summary(self, command: str) -> str:
        """The first line of the docstring of a command, which is not imported for it."""
        found = self.commands[command]
        if not isinstance(found, str):
            return (inspect.getdoc(found) or "").partition("\n")[0]
        module, _, function = found.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, found
        tree = ast.parse(Path(spec.origin).read_bytes())
        node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
        return (ast.get_docstring(node) or "").partition("\n")[0]


def versions() -> list[str]:
    """Lines with Python, the system, and the packages that matter to a report of an error."""
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return lines

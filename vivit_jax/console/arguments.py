# SPDX-License-Identifier: Apache-2.0
"""The arguments of a command, by tyro: what they call, its help, and what is wrong in one line.

tyro prints help and errors in boxes. They are taken as text and said again: help without what only
repeats, errors in one line with what was meant.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vivit_jax.console.options import checked_path, offered, path_fault
from vivit_jax.console.program import PRINT_COMPLETION, Command, Program
from vivit_jax.errors import UserError, closest, quoted, similar
from vivit_jax.files.addresses import address_text, is_address
from vivit_jax.progress import bold

_SHELLS = ("bash", "zsh", "tcsh", "fish")
_WIDEST = 100  # columns of help
_COLUMN = 24  # of the texts that explain options
_RULE = re.compile(r" *-{3,}")
_REPEATED = re.compile(r"\{?\[+(\S+) \[\1 \.\.\.\]+\}?")  # such as [[PATH [PATH ...]]]


def parsed(prog: str, command: Command, args: Sequence[str]) -> Callable[[], int | None] | str:
    """The call of a command that the arguments ask for, or the text of its help.

    `prog` is the program with the command, as in "vivit-jax evaluate". Raises UserError, in one
    line, for arguments that the command does not take.
    """
    if {"-h", "--help"} & set(args):
        return _help(prog, command)
    call, _ = _tried(prog, command, args)
    if call is None:
        raise UserError(_in_one_line(prog, command, args))
    return call


def completion(program: Program, args: Sequence[str]) -> str:
    """The completion script that `--tyro-print-completion SHELL` asks for.

    The scripts hold the options of all commands, which are imported for it. Raises UserError.
    """
    flag, shell, *more = [*args, "", ""][: max(len(args), 2)]
    wanted = 0 if flag == PRINT_COMPLETION else 1
    if shell not in _SHELLS or len(more) != wanted:
        where = " and a file to write" if wanted else ""
        raise UserError(f"{flag} takes one of {', '.join(_SHELLS)}{where}, got {shell!r}")
    said = io.StringIO()
    with _captured(said), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            {name: program.imported(name) for name in program.commands},
            prog=program.name,
            args=args,
        )
    if said.getvalue().startswith("Error"):
        raise UserError(f"{flag} {shell}: {said.getvalue().removeprefix('Error: ').strip()}")
    return said.getvalue().rstrip()


def _tried(
    prog: str, command: Command, args: Sequence[str], *markers: Any
) -> tuple[Callable[[], int | None] | None, str]:
    """The call of a command, or None; and what tyro printed."""

    @functools.wraps(command)
    def deferred(*given, **named):
        return functools.partial(command, *given, **named)

    said, refused = io.StringIO(), list[str]()
    with _captured(said), contextlib.suppress(SystemExit):
        call = tyro.cli(
            deferred, prog=prog, args=list(args), config=markers, registry=_local_paths(refused)
        )
        if refused:
            raise UserError(
                f"{refused[0]} is not on this machine, and {prog.rpartition(' ')[2]} takes a local "
                "path there; copy it here, or write here and copy the result"
            )
        return call, ""
    return None, _without_boxes(said.getvalue())


def _local_paths(refused: list[str]) -> ConstructorRegistry:
    """How tyro makes a Path: `refused` gets the addresses, which a Path would damage."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not Path:
            return None

        def made(given: list[str]) -> Path:
            refused.extend(address_text(text) for text in given if is_address(text))
            return Path(checked_path(given[0]))

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=made,
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _without_boxes(text: str) -> str:
    """What tyro says as later releases print where there are no characters for boxes."""
    text = re.sub(r"^╭─ (.*?) ─*╮$", r" \1\n ---", text, flags=re.MULTILINE)
    text = re.sub(r"^│ (.*) │$", r"  \1", text, flags=re.MULTILINE)
    text = re.sub(r"^╰─*╯$", "", text, flags=re.MULTILINE)
    return text.replace("─", "-")


@contextlib.contextmanager
def _captured(stream: io.StringIO) -> Iterator[None]:
    """Print what the block prints to `stream`, without breaking lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


# --- help -----------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    option: str  # as on a command line: "--overwrite, --no-overwrite", "--out PATH", "SRC"
    text: str


def _sections(prog: str, command: Command) -> tuple[str, dict[str, list[_Entry]]]:
    """The usage and description of a command, and its arguments under their titles."""
    # "{None}|STR" says nothing that "STR" does not.
    _, said = _tried(prog, command, ["--help"], tyro.conf.DisallowNone)
    lines = [line.rstrip() for line in said.splitlines()]
    head, found = list[str](), dict[str, list[list[str]]]()
    entries = list[list[str]]()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if _RULE.fullmatch(following):
            entries = found.setdefault(line.strip(), [])
        elif not found:
            head.append(line)
        elif line.startswith("   "):  # the text of the option above it
            entries[-1].append(line.strip())
        elif line and not _RULE.fullmatch(line):
            entries.append(re.split(r"  +", line.strip(), maxsplit=1))
    sections = {
        title: [_Entry(option, " ".join(text)) for option, *text in entries]
        for title, entries in found.items()
    }
    return "\n".join(head).strip(), sections


def _help(prog: str, command: Command) -> str:
    """The help of a command, no wider than the terminal."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    head, sections = _sections(prog, command)
    usage, *paragraphs = head.split("\n\n")
    usage = re.sub(r"\[-h\] ?", "", usage)
    lines = [_REPEATED.sub(r"[\1 ...]", re.sub(r" \| --no-[\w-]+", "", usage)).rstrip()]
    for paragraph in paragraphs:
        lines += ["", *textwrap.wrap(paragraph, width, break_on_hyphens=False)]
    for title, entries in sections.items():
        lines += ["", bold(f"{title.capitalize()}:")]
        for entry in sorted(entries, key=_place):
            lines += _entry_lines(*_tidied(entry), width)
    return "\n".join(lines)


def _place(entry: _Entry) -> int:
    """What is required comes first, and --help last."""
    return -entry.text.endswith("(required)") or entry.option.endswith("--help")


def _tidied(entry: _Entry) -> _Entry:
    """An entry without what only repeats."""
    option, text = _REPEATED.sub(r"[\1 ...]", entry.option), entry.text
    if text.endswith("(default: False)"):
        option = re.sub(r", --no-[\w-]+$", "", option)
    return _Entry(option, re.sub(r" ?\(default: (None|False)?\)$", "", text))


def _entry_lines(option: str, text: str, width: int) -> list[str]:
    indent = " " * _COLUMN
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    room = _COLUMN - 2 - len(option)
    if lines and room >= 2:
        return [f"  {bold(option)}{' ' * room}{lines[0].strip()}", *lines[1:]]
    return [f"  {bold(option)}", *lines]


# --- errors ---------------------------------------------------------------------------------------

_CHOICE = re.compile(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.")
_MISSING_VALUE = re.compile(r"Missing value for argument .*?([\w-]+)\W+Expected (\d+) values\.")
_VALUE = re.compile(r"Error parsing (\S+): (.*)")
_STRAY = re.compile(r"Unrecognized options: (.*)")
_NO_TYPE = re.compile(r"no type matching (.*?) could be instantiated from")
_NUMBERS = {
    r"invalid literal for int\(\) with base 10: ('.*')": "a whole number",
    r"could not convert string to float: ('.*')": "a number",
}


def _in_one_line(prog: str, command: Command, args: Sequence[str]) -> str:
    """What is wrong with arguments that tyro refuses."""
    name, more = prog.rpartition(" ")[2], f"; see {prog} --help"
    _, sections = _sections(prog, command)
    unknown = _unknown_option(command, args, sections)
    if unknown is not None:
        return f"{name} has no option {unknown[0]}{unknown[1] or more}"
    # What may take the place of None is all that a message should say, as in help.
    _, complaint = _tried(prog, command, args, tyro.conf.DisallowNone)
    lines = [line for line in complaint.splitlines() if line.strip()]
    missing = [line.strip() for line in lines if re.match(r" {6}\S", line)]
    if lines and lines[0].strip() == "Required options" and missing:
        known = {entry.option for entries in sections.values() for entry in entries}
        return f"{name} needs {' and '.join(m for m in missing if m in known)}{more}"
    # Between two rules; below the second is where help is to be had.
    said = " ".join(lines[2:]).partition(" ---")[0]
    said = re.sub(r"\s+", " ", said).strip()
    if found := _CHOICE.fullmatch(said):
        value, option, choices = found.groups()
        known = [choice.strip(" '\"") for choice in choices.split(",")]
        if "None" in known:  # the default, with which tyro's order differs from run to run
            known = sorted(choice for choice in known if choice != "None")
        meant = closest(value.strip(" '\""), known)
        return f"{name}: {option} is {value}{meant}"
    if found := _MISSING_VALUE.fullmatch(said):
        values = "a value" if found[2] == "1" else f"{found[2]} values"
        return f"{name}: {found[1]} needs {values}{more}"
    if found := _STRAY.fullmatch(said):
        if found[1].startswith("-") and os.path.exists(found[1]):
            more = f"; write the file as {quoted(os.path.join(os.curdir, found[1]))}"
        return f"{name} takes no argument {quoted(found[1])}{more}"
    if found := _VALUE.fullmatch(said):
        option, reason = found.groups()
        for pattern, words in _NUMBERS.items():
            if number := re.search(pattern, reason):
                return f"{name}: {option} must be {words}, got {number[1]}"
        if wanted := _NO_TYPE.match(reason):
            return f"{name}: {option} takes {wanted[1].strip('{}')}{more}"
        return f"{name}: {option}: {reason}"
    if "Could not find valid parse" in said:  # of several paths it says no more
        fault = next(filter(None, map(path_fault, args)), None)
        if fault is not None:
            return f"{name}: {fault}"
    return f"{name}: {said}{more}"


def _unknown_option(
    command: Command, args: Sequence[str], sections: dict[str, list[_Entry]]
) -> tuple[str, str] | None:
    """The first option that there is not, and what may be meant."""
    texts = (entry.option for entries in sections.values() for entry in entries)
    known = {name for text in texts for name in re.findall(r"(?:^|, )--([\w-]+)", text)}
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        option, equals, value = arg.partition("=")
        if option.startswith("--") and len(option) > 2:
            name = option[2:].replace("_", "-")
            if name not in known:
                value = value if equals or following.startswith("--") else following
                meant = [f"--{each}" for each in similar(name, known)]
                meant += offered(command, name, value)
                return quoted(option), f"; did you mean {' or '.join(meant)}?" if meant else ""
    return None

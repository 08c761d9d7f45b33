# SPDX-License-Identifier: Apache-2.0
"""Types of options that many commands have."""

import itertools
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from vivit_jax.errors import ConfigError
from vivit_jax.files.addresses import Place, names_no_bucket, place

# Annotates a dataclass of flags, which then have no prefix.
FLAT = tyro.conf.arg(name="")

# Takes both `--config a=1 b=2` and `--config a=1 --config b=2`.
KeyValues = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="KEY=VALUE"),
]

Function = TypeVar("Function", bound=Callable)
# What to write in place of an option that there is not, of its name and its value, "" for none.
Instead = Callable[[str, str], list[str]]


def offers(instead: Instead) -> Callable[[Function], Function]:
    """Marks a command that can do under other names what some unknown options ask for."""

    def marked(command: Function) -> Function:
        setattr(command, _INSTEAD, instead)
        return command

    return marked


def offered(command: Callable, option: str, value: str) -> list[str]:
    """What a command offers in place of an unknown option."""
    instead: Instead | None = getattr(command, _INSTEAD, None)
    return [] if instead is None else instead(option, value)


_INSTEAD = "_vivit_jax_instead"


def path_fault(text: str) -> str | None:
    """What is wrong with a path as it is given; None if nothing is.

    An empty one would stand for this directory, and gs:// for a directory here named gs:.
    """
    if not text:
        return "a path is empty; expected a file or a directory, . for this one"
    if names_no_bucket(text):
        return (
            f"{text} names no bucket and no server; expected such as gs://bucket/directory, or "
            f"./{text} for a directory here"
        )
    return None


def checked_path(text: str) -> str:
    """A path as it is given. ValueError for one that has a fault."""
    if (fault := path_fault(text)) is not None:
        raise ValueError(fault)
    return text


# A local path or an address. A plain Path is local: `vivit_jax.console.arguments` refuses others.
PlaceOption = Annotated[
    Place,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: place(checked_path(given[0])),
        is_instance=lambda value: isinstance(value, Place),
        str_from_instance=lambda value: [str(value)],
    ),
]

ConfigOption = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="KEY=VALUE",
        help="Changes to the config, by the field names of config.json. A file without config.json "
        "may need some, such as num_frames=32 image_size=224.",
    ),
]


def in_order(settings: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings in the order given."""
    return tuple(itertools.chain.from_iterable(settings))


def joined(config: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All settings of `--config`.

    Raises ConfigError for a value without "=", usually a positional placed after --config.
    """
    settings = in_order(config)
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(
                f"--config takes KEY=VALUE, got {setting!r}; put positional arguments before it"
            )
    return settings

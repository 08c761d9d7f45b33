# SPDX-License-Identifier: Apache-2.0
"""Dispatch of both command lines, and how they fail."""

import sys
from collections.abc import Callable, Sequence

from vivit_jax.errors import UserError


def run(
    prog: str,
    description: str,
    commands: dict[str, Callable[..., int | None]],
    args: Sequence[str] | None = None,
) -> int:
    """Parse `args` (default: the process's), call the command and return the exit status.

    0 success, 1 the command's own negative answer, 2 wrong input, told in one line on stderr, 130
    interrupted. Anything else is a bug and keeps its stack trace.
    """
    import tyro

    try:
        status = tyro.extras.subcommand_cli_from_dict(
            commands, prog=prog, description=description, args=args
        )
    except (UserError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"{prog}: error: not enough memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return status or 0

# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert`: one module per command; a new command is one file and one entry here."""

import sys
from collections.abc import Sequence

from vivit_jax.console import run

COMMANDS = {
    "inspect": "checkpoints_convert.inspect:inspect",
    "convert": "checkpoints_convert.convert:convert",
    "verify": "checkpoints_convert.verify:verify",
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(
        "vivit-convert", "Inspect, convert and verify video model checkpoints.", COMMANDS, args
    )


if __name__ == "__main__":
    sys.exit(main())

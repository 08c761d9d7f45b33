# SPDX-License-Identifier: Apache-2.0
"""The command lines, run in this process."""

import checkpoints_convert.__main__
import vivit_jax.cli.__main__


def run_command(capsys, command: str, *args) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of `vivit-jax COMMAND` or `vivit-convert COMMAND`."""
    programs = (vivit_jax.cli.__main__, checkpoints_convert.__main__)
    (program,) = [each for each in programs if command in each.COMMANDS]
    capsys.readouterr()  # what fixtures printed
    status = program.main([command, *map(str, args)])
    return status, *capsys.readouterr()

# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on: each states the field, what was got, what was expected, the way out.

The command lines print these as one line and exit with status 2; anything else is a bug and keeps
its stack trace.
"""


class UserError(ValueError):
    """Base of every error that the caller's input caused."""


class ConfigError(UserError):
    """A model or processor configuration that is wrong or asks for what is not supported."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the model tensor for tensor."""


class VideoError(UserError):
    """A video that cannot be opened, holds no video stream, or has too few frames."""


class WriteError(UserError):
    """A file that cannot be written, as on a full disk; what was there before is as it was."""


class MissingExtra(UserError, ImportError):
    """An optional dependency that is not installed; names the pip extra that supplies it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"pip install 'vivit_jax[{extra}]'"
        )


def first_line(reason: BaseException | str) -> str:
    """The first line of a message, or the name of an error that has none."""
    return (str(reason).strip() or repr(reason)).splitlines()[0]

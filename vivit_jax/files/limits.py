# SPDX-License-Identifier: Apache-2.0
"""How much memory a file may ask for beyond its own size.

A few bytes can declare an enormous tensor, table of positions or compressed entry. What a file
asks for is compared with one limit before anything is allocated: 1 GiB, or 32 times the size of the
file if that is more, unless the environment's VIVIT_JAX_UNPACK_LIMIT (bytes) says otherwise.
"""

import os

from vivit_jax.errors import UserError

VARIABLE = "VIVIT_JAX_UNPACK_LIMIT"
_DEFAULT = 2**30
_TIMES = 32


def unpack_limit(held: int = 0) -> int:
    """The memory in bytes that a file of `held` bytes may take; UserError for a wrong variable."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return max(_DEFAULT, _TIMES * held)
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text)):
        raise UserError(f"{VARIABLE} is {text!r}, expected a positive number of bytes")
    return int(text)


def check_unpacked(what: str, size: int, held: int = 0, error: type[UserError] = UserError) -> None:
    """Raise `error` if `what`, in a file of `held` bytes, takes more than the limit."""
    limit = unpack_limit(held)
    if size > limit:
        raise error(
            f"{what} would take {size:,} bytes of memory, expected at most {limit:,}; if you trust "
            f"it, set the environment's {VARIABLE}={size}"
        )

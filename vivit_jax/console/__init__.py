# SPDX-License-Identifier: Apache-2.0
"""Both command lines: dispatch, arguments and help, exit status, shared options."""

from vivit_jax.console.devices import answer_libtpu, has_tpu
from vivit_jax.console.options import (
    FLAT,
    ConfigOption,
    KeyValues,
    PlaceOption,
    in_order,
    joined,
    offers,
)
from vivit_jax.console.run import Command, end_by, keep_compiled, run, stopped_by

__all__ = [
    "FLAT", "Command", "ConfigOption", "KeyValues", "PlaceOption", "answer_libtpu", "end_by",
    "has_tpu", "in_order", "joined", "keep_compiled", "offers", "run", "stopped_by",
]  # fmt: skip
